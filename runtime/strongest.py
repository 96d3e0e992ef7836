"""Selects the strongest attention weights of a sequence from the attention outputs of a bundle, for `lfx explain`.

For each query the `KEPT` tokens with the largest weights are selected. A span is a run of adjacent ones, and its weight
is the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError
from lfx.signature import ATTENTIONS, GLOBAL_ATTENTIONS

KEPT = 24  # number of tokens of a query that are joined into spans
_APART = 1 << 40  # a position that is adjacent to no token
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Spans:
    """The strongest spans of each query, strongest first.

    Attributes:
        start: (…, S, top) int64, position of the span's first token.
        length: (…, S, top) int64, number of tokens of the span; 0 = the query has fewer spans.
        weight: (…, S, top) float32, the sum of the tokens' weights.
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
        of_anchor: (L, H, S), the weight of the anchor on each token; None if the anchor is not global.
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
        outputs: outputs of a bundle with attention outputs; only the attention outputs are read.
        length: S, number of tokens of the sequence; later positions are padding.
        row: index of the sequence in the batch.
        top: number of spans for each query: of a head, of a layer's mean, and of the mean over all layers and heads.
    Raises:
        InputError: there are no attention outputs, or they have another layout.
    """
    local, global_ = _read_layers(outputs, row, length)
    if not local:
        raise InputError("the outputs have no attention probabilities; export with --output-attentions")
    _check_layout(local, global_, length)
    # Rows of global tokens are zero in the local probabilities, and those of other tokens sum to 1.
    global_tokens = np.flatnonzero(local[0][0].sum(axis=-1) < 0.5)
    anchor = int(global_tokens[0]) if len(global_tokens) else 0
    count = global_[0].shape[-1] if global_ else 0  # global columns of the batch; this row may use fewer
    slots = np.concatenate([global_tokens, np.full(count - len(global_tokens), _APART)])
    layers, heads = len(local), local[0].shape[0]
    max_width = max(weights.shape[-1] - count for weights in local)
    model_mean = np.zeros((length, count + max_width), np.float32)
    model_global_mean = np.zeros((length, len(global_tokens)), np.float32)
    to_anchor = np.zeros((layers, heads, length), np.float32)
    of_anchor = np.zeros((layers, heads, length), np.float32) if len(global_tokens) else None
    by_head, by_layer = [], []
    for layer, weights in enumerate(local):
        of_globals = global_[layer][..., : len(global_tokens)] if global_ else np.zeros((heads, length, 0), np.float32)
        for head in range(heads):
            to_anchor[layer, head] = _to_anchor(weights[head], of_globals[head], global_tokens, count)
            if of_anchor is not None:
                of_anchor[layer, head] = of_globals[head, :, 0]
            by_head.append(_spans(weights[head], of_globals[head], slots, global_tokens, anchor, top[0]))
        mean, global_mean = weights.mean(axis=0), of_globals.mean(axis=0)
        by_layer.append(_spans(mean, global_mean, slots, global_tokens, anchor, top[1]))
        margin = (max_width - (mean.shape[-1] - count)) // 2  # columns on each side that a narrower window lacks
        model_mean[:, :count] += mean[:, :count] / layers
        model_mean[:, count + margin : count + max_width - margin] += mean[:, count:] / layers
        model_global_mean += global_mean / layers
    return Strongest(
        anchor,
        global_tokens,
        to_anchor,
        of_anchor,
        _stack(by_head, (layers, heads)),
        _stack(by_layer, (layers,)),
        _spans(model_mean, model_global_mean, slots, global_tokens, anchor, top[2]),
    )


def _read_layers(outputs: Mapping[str, NDArray[Any]], row: int, length: int) -> tuple[list[Float], list[Float]]:
    """Return each layer's local (H, S, x + 2·window + 1) and global (H, S, x) probabilities for one sequence."""

    def read(prefix: str) -> list[Float]:
        layers: list[Float] = []
        while (name := f"{prefix}.{len(layers)}") in outputs:
            layers.append(outputs[name][row][:, :length])
        return layers

    return read(ATTENTIONS), read(GLOBAL_ATTENTIONS)


def _check_layout(local: list[Float], global_: list[Float], length: int) -> None:
    """Check that the outputs have the layout of docs/ops.md; the bundle may come from an untrusted source.

    Raises:
        InputError: they do not have it.
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


def _to_anchor(weights: Float, of_globals: Float, global_tokens: NDArray[np.int64], count: int) -> Float:
    """The weight (S,) of each query on the classification token; the arguments are those of `_spans`."""
    if len(global_tokens):
        to_anchor: Float = weights[:, 0].copy()
        to_anchor[global_tokens] = of_globals[global_tokens[0]]
        return to_anchor
    to_anchor = np.zeros(len(weights), np.float32)
    window = (weights.shape[1] - count) // 2
    near = np.arange(min(window + 1, len(weights)))
    to_anchor[near] = weights[near, count + window - near]
    return to_anchor


def _spans(
    weights: Float,
    of_globals: Float,
    slots: NDArray[np.int64],
    global_tokens: NDArray[np.int64],
    anchor: int,
    top: int,
) -> Spans:
    """The strongest spans of each query of one head.

    Args:
        weights: (S, x + 2·window + 1), local probabilities.
        of_globals: (S, globals), probabilities of the global tokens.
        slots: (x,), position of the token of each global column; _APART for an unused column.
        global_tokens: (globals,), positions of the global tokens.
        anchor: position of the classification token, which no span contains.
        top: number of spans of a query.
    """
    count, window = len(slots), (weights.shape[1] - len(slots)) // 2
    queries = np.arange(len(weights))[:, None]
    columns = _largest(weights, KEPT)
    nearby = queries - window + columns - count
    positions = np.where(columns < count, slots[np.minimum(columns, count - 1)], nearby) if count else nearby
    spans = _join(np.take_along_axis(weights, columns, axis=1), positions, anchor, top)
    if len(global_tokens):
        positions = _largest(of_globals.T, KEPT)
        joined = _join(np.take_along_axis(of_globals.T, positions, axis=1), positions, anchor, top)
        spans.start[global_tokens] = joined.start
        spans.length[global_tokens] = joined.length
        spans.weight[global_tokens] = joined.weight
    return spans


def _largest(weights: Float, count: int) -> NDArray[np.int64]:
    """Return the columns of the `count` largest weights of each row, in any order."""
    if weights.shape[1] <= count:
        return np.broadcast_to(np.arange(weights.shape[1]), weights.shape)
    return np.argpartition(weights, -count, axis=1)[:, -count:]


def _join(weights: Float, positions: NDArray[np.int64], anchor: int, top: int) -> Spans:
    """Join adjacent positions of each row into spans, and return the `top` strongest.

    Args:
        weights, positions: (rows, kept).
        anchor: position that no span contains.
    """
    rows, kept = weights.shape
    is_candidate = (weights > 0) & (positions != anchor)
    # The others get positions that are not adjacent to any, and sort last.
    positions = np.where(is_candidate, positions, _APART + 2 * np.arange(kept))
    order = positions.argsort(axis=1)
    positions = np.take_along_axis(positions, order, axis=1)
    weights = np.take_along_axis(np.where(is_candidate, weights, 0.0), order, axis=1)
    is_first = np.diff(positions, axis=1, prepend=-2) != 1
    span = is_first.cumsum(axis=1) - 1  # index of the span in its row
    flat = (np.arange(rows)[:, None] * kept + span).ravel()
    total = np.bincount(flat, weights.ravel(), rows * kept).reshape(rows, kept)
    length = np.bincount(flat, minlength=rows * kept).reshape(rows, kept)
    start = np.zeros((rows, kept), np.int64)
    start[np.nonzero(is_first)[0], span[is_first]] = positions[is_first]
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
