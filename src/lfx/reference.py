"""Dense reference implementation of the lfx ops in float64 numpy, O(S²). It defines their correct outputs.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


def banded_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_mask: ArrayLike,
    global_index: ArrayLike,
    global_context: ArrayLike,
    *,
    num_heads: int,
    window: int,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
) -> Float:
    """Each query attends to its window and to the global tokens of its batch row, with one softmax over both.

    Args:
        query, key, value: (B, S, H·D) floats.
        key_mask: (B, S), 1 = real token. A masked key gets no weight from the window.
        global_index: (B, G) positions of the global tokens, unused slots -1. All queries attend to them, whatever the
            key_mask.
        global_context: (B, G, H·D), the output rows of the global tokens.
        num_heads: H, a divisor of H·D.
        window: one-sided, in steps of `dilation` tokens, 1 or more.
        dilation: distance in tokens between neighbouring keys of a window, 1 or more.
        causal: whether the window has no keys after the query.
        scale: factor of the scores; None = 1/√D.
    Returns:
        (B, S, H·D) float64. A global token's row is its row of global_context; every other masked token's row is 0.
    """
    q, k, v, global_rows = (np.asarray(x, dtype=np.float64) for x in (query, key, value, global_context))
    real = np.asarray(key_mask).astype(bool)
    index = np.asarray(global_index).astype(np.int64)
    batch, seqlen, _ = q.shape
    scale = scale if scale is not None else (q.shape[2] // num_heads) ** -0.5
    distance = np.arange(seqlen)[None, :] - np.arange(seqlen)[:, None]  # key - query
    band = (abs(distance) <= window * dilation) & (distance % dilation == 0)
    if causal:
        band &= distance <= 0
    out = np.zeros_like(q)
    for b in range(batch):
        used = index[b] >= 0
        is_global = np.zeros(seqlen, dtype=bool)
        is_global[index[b][used]] = True
        visible = (band & real[b][None, :]) | is_global[None, :]
        out[b] = _attend(q[b], k[b], v[b], visible, num_heads, scale)
        out[b][~real[b]] = 0.0
        out[b][index[b][used]] = global_rows[b][used]
    return out


def global_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_mask: ArrayLike,
    *,
    num_heads: int,
    scale: float | None = None,
) -> Float:
    """Each global query attends to all real keys of its batch row.

    Args:
        query: (B, G, H·D) floats.
        key, value: (B, S, H·D) floats.
        key_mask: (B, S), 1 = real token.
        num_heads: H, a divisor of H·D.
        scale: factor of the scores; None = 1/√D.
    Returns:
        (B, G, H·D) float64; 0 for a batch row without real keys.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    real = np.asarray(key_mask).astype(bool)
    scale = scale if scale is not None else (q.shape[2] // num_heads) ** -0.5
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        visible = np.broadcast_to(real[b], (q.shape[1], k.shape[1]))
        out[b] = _attend(q[b], k[b], v[b], visible, num_heads, scale)
    return out


def banded_probabilities(
    query: ArrayLike,
    key: ArrayLike,
    key_mask: ArrayLike,
    global_index: ArrayLike,
    *,
    num_heads: int,
    window: int,
    scale: float | None = None,
) -> Float:
    """The weights of `banded_attention` without dilation, in the layout of Hugging Face's `attentions`.

    Args:
        query, key, key_mask, global_index, num_heads, window, scale: those of `banded_attention`.
    Returns:
        (B, H, S, x + 2·window + 1) float64, where x is the largest number of global tokens in a row of the batch.
        Columns 0 to x - 1 have the weights on the global tokens, in the order of global_index. Column x + c of query i
        has the weight on key i - window + c; 0 if that key is global. The rows of masked and of global tokens are 0.
    """
    q, k = (np.asarray(x, dtype=np.float64) for x in (query, key))
    real = np.asarray(key_mask).astype(bool)
    index = np.asarray(global_index).astype(np.int64)
    batch, seqlen, width = q.shape
    head_size = width // num_heads
    scale = scale if scale is not None else head_size**-0.5
    most = int((index >= 0).sum(axis=1).max())
    positions = np.arange(seqlen)
    band = abs(positions[None, :] - positions[:, None]) <= window
    columns = positions[:, None] + np.arange(2 * window + 1)
    out = np.zeros((batch, num_heads, seqlen, most + 2 * window + 1))
    for b in range(batch):
        used = index[b][index[b] >= 0]
        is_global = np.isin(positions, used)
        visible = (band & real[b][None, :]) | is_global[None, :]
        for h in range(num_heads):
            head = slice(h * head_size, (h + 1) * head_size)
            weights = _weights(q[b][:, head], k[b][:, head], visible, scale)
            out[b, h, :, : len(used)] = weights[:, used]
            padded = np.pad(np.where(is_global, 0.0, weights), ((0, 0), (window, window)))
            out[b, h, :, most:] = np.take_along_axis(padded, columns, axis=1)
        out[b][:, ~real[b] | is_global] = 0.0
    return out


def global_probabilities(
    query: ArrayLike,
    key: ArrayLike,
    key_mask: ArrayLike,
    global_index: ArrayLike,
    *,
    num_heads: int,
    scale: float | None = None,
) -> Float:
    """The weights of `global_attention`, in the layout of Hugging Face's `global_attentions`.

    Args:
        query, key, key_mask, num_heads, scale: those of `global_attention`.
        global_index: (B, G), unused slots -1.
    Returns:
        (B, H, S, x) float64, where x is the largest number of global tokens in a row of the batch; 0 for unused slots.
    """
    q, k = (np.asarray(x, dtype=np.float64) for x in (query, key))
    real = np.asarray(key_mask).astype(bool)
    used = np.asarray(global_index) >= 0
    head_size = q.shape[2] // num_heads
    scale = scale if scale is not None else head_size**-0.5
    out = np.zeros((len(q), num_heads, k.shape[1], int(used.sum(axis=1).max())))
    for b, h in np.ndindex(out.shape[:2]):
        head = slice(h * head_size, (h + 1) * head_size)
        count = int(used[b].sum())
        visible = np.broadcast_to(real[b], (count, k.shape[1]))
        out[b, h, :, :count] = _weights(q[b][used[b]][:, head], k[b][:, head], visible, scale).T
    return out


def _weights(q: Float, k: Float, visible: NDArray[np.bool_], scale: float) -> Float:
    """Attention weights of one head, (Q, D) over (S, D); a query without visible keys gets 0."""
    scores = np.where(visible, q @ k.T * scale, -np.inf)
    row_max = scores.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(row_max), row_max, 0.0))
    row_sum = weights.sum(axis=1, keepdims=True)
    result: Float = weights / np.where(row_sum > 0, row_sum, 1.0)
    return result


def _attend(q: Float, k: Float, v: Float, visible: NDArray[np.bool_], num_heads: int, scale: float) -> Float:
    """Masked attention of one batch row, (Q, H·D) over (S, H·D), head by head; a query without visible keys gets 0."""
    head_size = q.shape[1] // num_heads
    out = np.zeros_like(q)
    for head in range(num_heads):
        columns = slice(head * head_size, (head + 1) * head_size)
        out[:, columns] = _weights(q[:, columns], k[:, columns], visible, scale) @ v[:, columns]
    return out
