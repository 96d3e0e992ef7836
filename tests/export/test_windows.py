"""The conventions of attention windows and dilations: Hugging Face's, allenai's and the ops'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx import reference
from lfx.errors import ExportError
from lfx.export.original import from_original
from lfx.export.windows import both_sides, head_dilations, head_groups, layer_dilations

ORIGINAL = {"model_type": "roberta", "attention_window": [256, 3], "attention_dilation": [1, 2]}


def test_hugging_face_counts_both_sides() -> None:
    attention = LongformerSelfAttention(LongformerConfig(attention_window=[12]), 0)
    assert attention.one_sided_attn_window_size == 6
    assert both_sides(6) == 12


def test_allenai_counts_one_side() -> None:
    assert from_original(ORIGINAL, Path("config.json"))["attention_window"] == [512, 6]
    assert from_original({**ORIGINAL, "attention_window": 8}, Path("config.json"))["attention_window"] == 16


def test_the_op_counts_one_side_in_steps_of_the_dilation() -> None:
    """A query sees 2·window + 1 keys, the farthest of them window·dilation tokens away."""
    seqlen, window, dilation = 41, 3, 5
    query, value = np.zeros((1, seqlen, 1)), np.eye(seqlen)[None]  # each value says which key it is of
    seen = np.concatenate(
        [
            reference.banded_attention(
                query,
                query,
                value[:, :, key : key + 1],
                np.ones((1, seqlen)),
                np.full((1, 1), -1),
                np.zeros((1, 1, 1)),
                num_heads=1,
                window=window,
                dilation=dilation,
            )
            for key in range(seqlen)
        ],
        axis=2,
    )[0]
    assert np.flatnonzero(seen[20]).tolist() == [5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ((1, 1, 1), (1, 1, 1))),
        (2, ((2, 2, 2), (2, 2, 2))),
        ([1, 4], ((1, 1, 1), (4, 4, 4))),
        ([[1, 2, 3], [3, 2, 1]], ((1, 2, 3), (3, 2, 1))),
        ([2, (1, 1, 2)], ((2, 2, 2), (1, 1, 2))),
    ],
    ids=["none", "one number", "by layer", "by head", "by layer or head"],
)
def test_a_dilation_is_one_number_or_by_layer_or_by_head(value: Any, expected: Any) -> None:
    assert tuple(head_dilations(entry, 3) for entry in layer_dilations(value, 2, 3)) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "attention_dilation 0 is out of range"),
        ([1], "attention_dilation has 1 entries for 2 layers"),
        ([1, [1, 2]], "attention_dilation has 2 entries for 3 heads"),
        ([1, [1, 2, "x"]], "attention_dilation is 'x'"),
        (True, "attention_dilation is True"),
        (65, "attention_dilation 65 is out of range; give a whole number from 1 to 64"),
    ],
)
def test_another_dilation_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        layer_dilations(value, 2, 3, largest=64)


def test_heads_of_one_dilation_are_a_group() -> None:
    assert head_groups((3, 1, 3, 1, 1)) == {3: [0, 2], 1: [1, 3, 4]}
