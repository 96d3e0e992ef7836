"""The dense reference against a scalar implementation and against Hugging Face."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lfx.export.torch_runners import reference_runner, torch_runner
from lfx.parity import full_cases, inputs_of
from lfx.reference import banded_attention, global_attention
from tests.models import VOCAB_SIZE, WINDOW, tiny_model


def _scalar_attention(q, k, v, mask, index, rows, *, heads, window, dilation, causal, scale):
    """The op's definition, one query and one key at a time."""
    batch, seqlen, width = q.shape
    size = width // heads
    out = np.zeros_like(q)
    for b in range(batch):
        tokens = {int(p): s for s, p in enumerate(index[b]) if p >= 0}
        for i in range(seqlen):
            if i in tokens:
                out[b, i] = rows[b, tokens[i]]
                continue
            if not mask[b, i]:
                continue
            local = [
                j
                for j in range(seqlen)
                if abs(i - j) <= window * dilation
                and (i - j) % dilation == 0
                and (j <= i or not causal)
                and mask[b, j]
                and j not in tokens
            ]
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                seen = [*tokens, *local]
                weights = [math.exp(float(q[b, i, part] @ k[b, j, part]) * scale) for j in seen]
                for weight, j in zip(weights, seen, strict=True):
                    out[b, i, part] += weight / sum(weights) * v[b, j, part]
    return out


@pytest.mark.parametrize(("window", "dilation", "causal"), [(1, 1, False), (3, 1, True), (2, 3, False), (4, 2, True)])
def test_banded_attention_equals_the_definition_one_pair_at_a_time(window: int, dilation: int, causal: bool) -> None:
    random = np.random.default_rng(0)
    q, k, v = random.standard_normal((3, 2, 13, 8))
    mask = np.ones((2, 13), dtype=int)
    mask[0, 10:] = 0
    index = np.array([[4, -1, 7], [-1, -1, -1]])
    rows = random.standard_normal((2, 3, 8))
    actual = banded_attention(
        q, k, v, mask, index, rows, num_heads=2, window=window, dilation=dilation, causal=causal, scale=0.3
    )
    expected = _scalar_attention(
        q, k, v, mask, index, rows, heads=2, window=window, dilation=dilation, causal=causal, scale=0.3
    )
    np.testing.assert_allclose(actual, expected, atol=1e-13)


def test_a_window_of_the_whole_sequence_is_full_attention() -> None:
    q, k, v = torch.randn(3, 1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = [x.view(1, 9, 2, 4).transpose(1, 2) for x in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, 9, 8)
    ones, none = np.ones((1, 9)), np.full((1, 1), -1)
    banded = banded_attention(q, k, v, ones, none, np.zeros((1, 1, 8)), num_heads=2, window=9)
    np.testing.assert_allclose(banded, plain.numpy(), atol=1e-13)
    np.testing.assert_allclose(global_attention(q, k, v, ones, num_heads=2), plain.numpy(), atol=1e-13)


def test_rows_without_a_visible_key_are_zero() -> None:
    x = np.ones((1, 4, 4))
    none = np.full((1, 1), -1)
    assert not banded_attention(x, x, x, np.zeros((1, 4)), none, x[:, :1], num_heads=1, window=2).any()
    assert not global_attention(x[:, :2], x, x, np.zeros((1, 4)), num_heads=1).any()


def test_dense_model_agrees_with_hugging_face() -> None:
    """The two models share no attention code; the tolerance covers Hugging Face's float32 rounding."""
    model = tiny_model()
    dense, eager = reference_runner(model), torch_runner(model)
    for case in full_cases(WINDOW, 128):
        inputs = inputs_of(case, vocab_size=VOCAB_SIZE, pad_token_id=1)
        dense_outputs, eager_outputs = dense(inputs), eager(inputs)
        for name in dense_outputs:
            np.testing.assert_allclose(dense_outputs[name], eager_outputs[name], atol=2e-5, err_msg=f"{name}, {case}")
