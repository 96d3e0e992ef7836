"""Ranges and profiles: parsing the options, and the profile of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfx.errors import BuildError
from lfx.runtime.profile import CHOICES, Profile, Range, choose_profile, profiles
from lfx.signature import GRAPH_INPUTS, Signature, TensorSpec

SIGNATURE = Signature(
    architecture="LongformerModel",
    task="feature-extraction",
    precision="fp32",
    inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS),
    outputs=(),
    attention_windows=(8,),
    max_seqlen=128,
)


@pytest.mark.parametrize(("text", "sizes"), [("4", (4, 4, 4)), ("1:2:3", (1, 2, 3)), ("7:7:7", (7, 7, 7))])
def test_a_range_is_three_numbers_or_one(text: str, sizes: tuple[int, int, int]) -> None:
    assert Range.parse(text, "--batch") == Range(*sizes)
    assert Range.parse(str(Range(*sizes)), "--batch") == Range(*sizes)


def test_a_single_integer_is_a_range() -> None:
    assert Range.parse(4, "--batch") == Range.parse(np.int64(4), "--batch") == Range(4, 4, 4)


@pytest.mark.parametrize(
    "text", [1.5, True, None, [], b"8", "", "a", "1:2", "1:2:3:4", "1::3", "-1", "1.5", "1:2:x", "²"]
)
def test_text_that_is_no_range_is_refused_with_an_example(text: Any) -> None:
    with pytest.raises(BuildError, match=r"--batch .* is not a size; give MIN:OPT:MAX or one number"):
        Range.parse(text, "--batch")


@pytest.mark.parametrize("text", ["0", "3:2:4", "1:5:4", "0:1:2", str(2**31)])
def test_sizes_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(BuildError, match="is out of order; it must be 1 ≤ MIN ≤ OPT ≤ MAX"):
        Range.parse(text, "--seqlen")


def test_pairs_of_options_are_profiles_and_a_single_option_is_used_for_all() -> None:
    two = profiles(["1", "8"], ["1:64:64", "65:128:128"], SIGNATURE)
    assert [str(p) for p in two] == ["batch 1:1:1, seqlen 1:64:64", "batch 8:8:8, seqlen 65:128:128"]
    assert [str(p.batch) for p in profiles(["2"], ["1:8:8", "9:16:16"], SIGNATURE)] == ["2:2:2", "2:2:2"]
    assert len(profiles(["1", "2", "3"], ["8"], SIGNATURE)) == 3


@pytest.mark.parametrize("ranges", [5, "8", "1:64:128", None, [], {"8": 1}, b"8"], ids=str)
def test_profiles_that_are_no_list_are_refused(ranges: Any) -> None:
    for batch, seqlen in ((ranges, ["8"]), (["1"], ranges)):
        with pytest.raises(BuildError, match=r"give a list of MIN:OPT:MAX or numbers, one for each profile"):
            profiles(batch, seqlen, SIGNATURE)


def test_different_numbers_of_batch_and_seqlen_are_refused() -> None:
    with pytest.raises(BuildError, match="2 --batch and 3 --seqlen make no profiles"):
        profiles(["1", "2"], ["1", "2", "3"], SIGNATURE)


def test_sequences_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(BuildError, match="--seqlen 1:64:129 is above the model's maximum 128"):
        profiles(["1"], ["1:64:129"], SIGNATURE)
    assert profiles(["1"], ["1:64:129"], replace(SIGNATURE, max_seqlen=None))[0].seqlen.max == 129


@pytest.mark.parametrize(
    ("axes", "smallest", "largest"),
    [
        (("batch", "sequence"), (1, 16), (8, 128)),
        (("batch", "choices", "sequence"), (1, CHOICES[0], 16), (8, CHOICES[2], 128)),
        (("batch", 3), (1, 3), (8, 3)),
    ],
)
def test_shapes_follow_the_axes_of_the_input(axes: Any, smallest: Any, largest: Any) -> None:
    shapes = Profile(Range(1, 2, 8), Range(16, 64, 128)).shapes(TensorSpec("input_ids", "int64", axes))
    assert (shapes[0], shapes[2]) == (smallest, largest)
    assert all(low <= best <= high for low, best, high in zip(*shapes, strict=True))


def test_a_batch_takes_the_profile_tuned_for_the_nearest_shape() -> None:
    short = Profile(Range(1, 1, 8), Range(1, 64, 512))
    long = Profile(Range(1, 1, 2), Range(1, 4096, 4096))
    assert choose_profile((short, long), 1, 64) == 0
    assert choose_profile((short, long), 1, 500) == 0
    assert choose_profile((short, long), 1, 4000) == 1
    assert choose_profile((short, long), 8, 512) == 0
    assert choose_profile((short, long), 8, 513) is None
    assert choose_profile((), 1, 1) is None
