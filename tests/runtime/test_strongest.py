"""The strongest attention weights, against a search of each query's weights one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError
from lfx.runtime.strongest import KEPT, Spans, strongest

Dense = np.ndarray  # (L, H, S, S), the weight of each query on each token


def layers_of(windows: list[int], tokens: list[int], seqlen: int, slots: int, heads: int = 2) -> tuple[Any, Dense]:
    """Random attention outputs of a batch of one in Hugging Face's layout, and the same as dense weights."""
    random = np.random.default_rng(len(tokens) + seqlen)
    dense = random.random((len(windows), heads, seqlen, seqlen)).astype(np.float32) ** 4
    outputs: dict[str, Any] = {}
    for layer, window in enumerate(windows):
        far = abs(np.arange(seqlen)[:, None] - np.arange(seqlen)) > window
        far[:, tokens], far[tokens] = False, False
        dense[layer][:, far] = 0.0
        dense[layer] /= dense[layer].sum(axis=-1, keepdims=True)
        local = np.zeros((1, heads, seqlen, slots + 2 * window + 1), np.float32)
        for i in (i for i in range(seqlen) if i not in tokens):
            local[0, :, i, : len(tokens)] = dense[layer][:, i, tokens]
            for j in (j for j in range(max(0, i - window), min(seqlen, i + window + 1)) if j not in tokens):
                local[0, :, i, slots + j - i + window] = dense[layer][:, i, j]
        outputs[f"attentions.{layer}"] = local
        if slots:
            rows = np.zeros((1, heads, seqlen, slots), np.float32)
            rows[0, ..., : len(tokens)] = dense[layer][:, tokens].transpose(0, 2, 1)
            outputs[f"global_attentions.{layer}"] = rows
    return outputs, dense


def spans_of(weights: np.ndarray, anchor: int, top: int) -> list[tuple[int, int, float]]:
    """The strongest spans (start, length, weight) of one query with dense weights (S,)."""
    kept = sorted(int(j) for j in np.argsort(-weights)[:KEPT] if weights[j] > 0 and j != anchor)
    runs: list[list[int]] = []
    for j in kept:
        if runs and runs[-1][-1] == j - 1:
            runs[-1].append(j)
        else:
            runs.append([j])
    spans = [(run[0], len(run), float(weights[run].sum())) for run in runs]
    return sorted(spans, key=lambda span: -span[2])[:top]


def check(spans: Spans, dense: np.ndarray, anchor: int, top: int) -> None:
    """Compare spans (…, S, top) with dense weights (…, S, S)."""
    for index in np.ndindex(dense.shape[:-1]):
        expected = spans_of(dense[index], anchor, top)
        assert [int(n) for n in spans.start[index][: len(expected)]] == [start for start, _, _ in expected]
        assert [int(n) for n in spans.length[index][: len(expected)]] == [length for _, length, _ in expected]
        np.testing.assert_allclose(spans.weight[index][: len(expected)], [w for _, _, w in expected], rtol=1e-4)
        assert not spans.length[index][len(expected) :].any()


@pytest.mark.parametrize("tokens", [[], [0], [3, 4, 5, 40], [59]], ids=["none", "first", "scattered", "last"])
@pytest.mark.parametrize("unused", [0, 2])
def test_spans_are_those_of_a_search_token_by_token(tokens: list[int], unused: int) -> None:
    outputs, dense = layers_of([16, 5], tokens, 60, len(tokens) + unused)
    result = strongest(outputs, 60, top=(3, 4, 5))
    anchor = tokens[0] if tokens else 0
    assert result.anchor == anchor
    assert result.global_tokens.tolist() == tokens
    check(result.heads, dense, anchor, 3)
    check(result.layers, dense.mean(axis=1), anchor, 4)
    check(result.model, dense.mean(axis=(0, 1)), anchor, 5)
    np.testing.assert_allclose(result.to_anchor, dense[..., anchor], rtol=1e-6)
    if tokens:
        assert result.of_anchor is not None
        np.testing.assert_allclose(result.of_anchor, dense[:, :, anchor], rtol=1e-6)
    else:
        assert result.of_anchor is None


@pytest.mark.parametrize("seqlen", [1, 2, 5])
def test_a_short_sequence_of_a_padded_batch_has_its_own_spans(seqlen: int) -> None:
    outputs, dense = layers_of([4], [0], seqlen, 1)
    padded = {
        name: np.pad(array, ((1, 0), (0, 0), (0, 3), (0, 0))) for name, array in outputs.items()
    }  # row 1 of a batch of longer rows
    result = strongest(padded, seqlen, row=1)
    check(result.heads, dense, 0, 4)


def test_another_layout_is_refused() -> None:
    outputs, _ = layers_of([4, 4], [0], 9, 1)
    changes: tuple[dict[str, Any], ...] = (
        {"attentions.1": outputs["attentions.1"][:, :1]},  # fewer heads
        {"attentions.1": outputs["attentions.1"][..., 1:]},  # an even window
        {"attentions.0": outputs["attentions.0"][:, :, :5]},  # fewer tokens
        {"global_attentions.1": outputs["global_attentions.1"][..., :0]},
        {"attentions.0": outputs["attentions.0"] * 0.0},  # more rows of zeros than global tokens
    )
    for change in changes:
        with pytest.raises(InputError, match="do not have Hugging Face's layout"):
            strongest({**outputs, **change}, 9)


def test_outputs_without_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match="export with --output-attentions"):
        strongest({"logits": np.ones((1, 2))}, 3)
