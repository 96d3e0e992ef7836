"""Selects the strongest attention weights of a sequence from the attention outputs of a bundle, for `lfx explain`.

A span is a run of adjacent tokens among the `KEPT` strongest ones of a query; its weight is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError
from lfx.signature import ATTENTIONS, GLOBAL_ATTENTIONS

KEPT = 24  # number of the strongest tokens of a query that spans are made of
_APART = 1 << 40  # position that is adjacent to no token's
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Spans:
    """The strongest spans of each query, strongest first.

    Attributes:
        start: (…, S, top) int64, position of the span's first token.
        length: (…, S, top) int64, number of its tokens; 0 = the query has no such span.
        weight: (…, S, top) float32, the sum of their weights.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    weight: Float


@dataclass(frozen=True)
class Strongest:
    """The strongest attention weights of one sequence of S tokens, in L layers of H heads.

    Attributes:
        anchor: position of the classification token: the first global token, or token 0 if no token is global.
        global_tokens: positions of the global tokens, ascending.
        to_anchor: (L, H, S), the weight of each query on the anchor; 0 if it is outside the query's window.
        of_anchor: (L, H, S), the weights of a global anchor on all tokens; None if the anchor is not global.
        heads: spans (L, H, S, top) of each head, without the anchor.
        layers: spans (L, S, top) of the mean over the heads of each layer.
        model: spans (S, top) of the mean over all layers and heads.
    """

    anchor: int
    global_tokens: NDArray[np.int64]
    to_anchor: Float
    of_anchor: Float | None
    heads: Spans
    layers: Spans
    model: Spans


def strongest(
    outputs: Mapping[str, NDArray[Any]], length: int, *, row: int = 0, top: tuple[int, int, int] = (4, 6, 12)
) -> Strongest:
    """Select the strongest weights of one sequence.

    Args:
        outputs: of a bundle with attention outputs; others are not read.
        length: S, number of the sequence's tokens; the positions after them are padding.
        row: index of the sequence in the batch.
        top: number of spans for each query: of a head, of a layer's mean, and of the mean over all layers and heads.
    Raises:
        InputError: there are no attention outputs.
    """
    local, global_ = _layers(outputs, row, length)
    if not local:
        raise InputError("the outputs have no attention probabilities; export with --output-attentions")
    _check_layout(local, global_, length)
    # Rows of global tokens are zero in the local probabilities, and those of other tokens sum to 1.
    tokens = np.flatnonzero(local[0][0].sum(axis=-1) < 0.5)
    anchor = int(tokens[0]) if len(tokens) else 0
    count = global_[0].shape[-1] if global_ else 0  # of the batch; this row may have fewer global tokens
    slots = np.concatenate([tokens, np.full(count - len(tokens), _APART)])
    layers, heads = len(local), local[0].shape[0]
    widest = max(weights.shape[-1] - count for weights in local)
    local_mean = np.zeros((length, count + widest), np.float32)
    rows_mean = np.zeros((length, len(tokens)), np.float32)
    to_anchor = np.zeros((layers, heads, length), np.float32)
    of_anchor = np.zeros((layers, heads, length), np.float32) if len(tokens) else None
    by_head, by_layer = [], []
    for layer, weights in enumerate(local):
        rows = global_[layer][..., : len(tokens)] if global_ else np.zeros((heads, length, 0), np.float32)
        for head in range(heads):
            to_anchor[layer, head] = _to_anchor(weights[head], rows[head], tokens, count)
            if of_anchor is not None:
                of_anchor[layer, head] = rows[head, :, 0]
            by_head.append(_spans(weights[head], rows[head], slots, tokens, anchor, top[0]))
        mean, global_mean = weights.mean(axis=0), rows.mean(axis=0)
        by_layer.append(_spans(mean, global_mean, slots, tokens, anchor, top[1]))
        margin = (widest - (mean.shape[-1] - count)) // 2  # of a layer with a narrower window
        local_mean[:, :count] += mean[:, :count] / layers
        local_mean[:, count + margin : count + widest - margin] += mean[:, count:] / layers
        rows_mean += global_mean / layers
    return Strongest(
        anchor,
        tokens,
        to_anchor,
        of_anchor,
        _stack(by_head, (layers, heads)),
        _stack(by_layer, (layers,)),
        _spans(local_mean, rows_mean, slots, tokens, anchor, top[2]),
    )


def _layers(outputs: Mapping[str, NDArray[Any]], row: int, length: int) -> tuple[list[Float], list[Float]]:
    """Local probabilities (H, S, x + 2·window + 1) and global ones (H, S, x) of each layer, of one row."""

    def read(prefix: str) -> list[Float]:
        layers: list[Float] = []
        while (name := f"{prefix}.{len(layers)}") in outputs:
            layers.append(outputs[name][row][:, :length])
        return layers

    return read(ATTENTIONS), read(GLOBAL_ATTENTIONS)


def _check_layout(local: list[Float], global_: list[Float], length: int) -> None:
    """Check that the outputs of a bundle, which a stranger may have made, have the layout of docs/ops.md.

    Raises:
        InputError: they do not.
    """
    heads = len(local[0])
    count = global_[0].shape[-1] if global_ else 0
    widths = [weights.shape[-1] - count for weights in local]
    same = all(weights.shape[:2] == (heads, length) for weights in (*local, *global_))
    if (
        not same
        or not all(width > 0 and width % 2 for width in widths)
        or len(global_) not in (0, len(local))
        or any(weights.shape[-1] != count for weights in global_)
        or int((local[0][0].sum(axis=-1) < 0.5).sum()) > count
    ):
        raise InputError("the attention outputs do not have Hugging Face's layout; export the model again")


def _to_anchor(weights: Float, rows: Float, tokens: NDArray[np.int64], count: int) -> Float:
    """The weight (S,) of each query on the classification token."""
    if len(tokens):
        to_anchor: Float = weights[:, 0].copy()
        to_anchor[tokens] = rows[tokens[0]]
        return to_anchor
    to_anchor = np.zeros(len(weights), np.float32)
    window = (weights.shape[1] - count) // 2
    near = np.arange(min(window + 1, len(weights)))
    to_anchor[near] = weights[near, count + window - near]
    return to_anchor


def _spans(
    weights: Float, rows: Float, slots: NDArray[np.int64], tokens: NDArray[np.int64], anchor: int, top: int
) -> Spans:
    """The strongest spans of each query of one head.

    Args:
        weights: (S, x + 2·window + 1), local probabilities. rows: (S, globals), global probabilities.
        slots: (x,), positions of the global tokens, unused slots far away. tokens: (globals,), those of this sequence.
        anchor: the token that no span contains.
    """
    count, window = len(slots), (weights.shape[1] - len(slots)) // 2
    queries = np.arange(len(weights))[:, None]
    columns = _largest(weights, KEPT)
    nearby = queries - window + columns - count
    positions = np.where(columns < count, slots[np.minimum(columns, count - 1)], nearby) if count else nearby
    spans = _join(np.take_along_axis(weights, columns, axis=1), positions, anchor, top)
    if len(tokens):
        of_globals = rows.T
        positions = _largest(of_globals, KEPT)
        joined = _join(np.take_along_axis(of_globals, positions, axis=1), positions, anchor, top)
        spans.start[tokens], spans.length[tokens], spans.weight[tokens] = joined.start, joined.length, joined.weight
    return spans


def _largest(weights: Float, count: int) -> NDArray[np.int64]:
    """Columns of the largest weights of each row, in no order."""
    if weights.shape[1] <= count:
        return np.broadcast_to(np.arange(weights.shape[1]), weights.shape)
    return np.argpartition(weights, -count, axis=1)[:, -count:]


def _join(weights: Float, positions: NDArray[np.int64], anchor: int, top: int) -> Spans:
    """Join adjacent positions of each row to spans, and return the `top` strongest.

    Args:
        weights, positions: (rows, kept).
    """
    rows, kept = weights.shape
    is_token = (weights > 0) & (positions != anchor)
    # No two of the others are adjacent, and they come last.
    positions = np.where(is_token, positions, _APART + 2 * np.arange(kept))
    order = positions.argsort(axis=1)
    positions = np.take_along_axis(positions, order, axis=1)
    weights = np.take_along_axis(np.where(is_token, weights, 0.0), order, axis=1)
    begins = np.diff(positions, axis=1, prepend=-2) != 1
    span = begins.cumsum(axis=1) - 1  # number of the span within its row
    flat = (np.arange(rows)[:, None] * kept + span).ravel()
    total = np.bincount(flat, weights.ravel(), rows * kept).reshape(rows, kept)
    length = np.bincount(flat, minlength=rows * kept).reshape(rows, kept)
    start = np.zeros((rows, kept), np.int64)
    start[np.nonzero(begins)[0], span[begins]] = positions[begins]
    best = np.argsort(-total, axis=1, kind="stable")[:, :top]
    start, length, total = (np.take_along_axis(array, best, axis=1) for array in (start, length, total))
    if (missing := top - best.shape[1]) > 0:
        start, length, total = (np.pad(array, ((0, 0), (0, missing))) for array in (start, length, total))
    exists = total > 0
    return Spans(np.where(exists, start, 0), np.where(exists, length, 0), total.astype(np.float32))


def _stack(spans: list[Spans], shape: tuple[int, ...]) -> Spans:
    def stacked(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        return np.stack(arrays).reshape(*shape, *arrays[0].shape)

    return Spans(
        stacked([s.start for s in spans]), stacked([s.length for s in spans]), stacked([s.weight for s in spans])
    )
