"""The dense definition of the lfx ops, O(S²) in float64 numpy: every other implementation is measured against it.

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
    """Every query over its window and the global tokens of its row, one softmax over the union.

    Args:
        query, key, value: (B, S, H·D).
        key_mask: (B, S), 1 = real token. A masked key is seen by no query through the window.
        global_index: (B, G) positions of global tokens, unused slots -1. All queries see them, masked or not.
        global_context: (B, G, H·D), the rows that the global tokens get.
        window: one-sided, in steps of `dilation` tokens.
        scale: of the scores; None = 1/√D.
    Returns:
        (B, S, H·D). The row of a global token is its global_context; that of any other masked token is 0.
    """
    q, k, v, rows = (np.asarray(x, dtype=np.float64) for x in (query, key, value, global_context))
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
        out[b][index[b][used]] = rows[b][used]
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
    """The global queries over all real keys of their row.

    Args:
        query: (B, G, H·D). key, value: (B, S, H·D). key_mask: (B, S), 1 = real token.
    Returns:
        (B, G, H·D); 0 where the row has no real key.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    real = np.asarray(key_mask).astype(bool)
    scale = scale if scale is not None else (q.shape[2] // num_heads) ** -0.5
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        visible = np.broadcast_to(real[b], (q.shape[1], k.shape[1]))
        out[b] = _attend(q[b], k[b], v[b], visible, num_heads, scale)
    return out


def _attend(q: Float, k: Float, v: Float, visible: NDArray[np.bool_], num_heads: int, scale: float) -> Float:
    """Masked attention of one batch row, head by head: (Q, H·D) over (S, H·D); 0 where nothing is visible."""
    size = q.shape[1] // num_heads
    out = np.zeros_like(q)
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = np.where(visible, q[:, part] @ k[:, part].T * scale, -np.inf)
        peak = scores.max(axis=1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
        total = weights.sum(axis=1, keepdims=True)
        out[:, part] = (weights / np.where(total > 0, total, 1.0)) @ v[:, part]
    return out
