"""The ops in PyTorch's own operators: blocks of queries, each with the keys of its windows, through fused attention.

    B batch    S sequence length    H heads    D head size    G global slots    b block size    T subsequence length

`scaled_dot_product_attention` computes a block without storing its scores, and a block's keys and values are slices of
the sequence. Nothing depends on the values of a tensor on the host, so that CUDA graphs can capture the calls.
"""

from __future__ import annotations

import math

import torch
from torch import nn

# Number of queries in a block. A block reads BLOCK + 2 · window keys, of which a query sees 2 · window + 1.
BLOCK = 256
# With fewer queries GlobalAttention in float32 is two matrix products: fused attention on a CPU has one task for each
# head and 32 or more queries, which leaves threads idle. In other dtypes a matrix product would round the scores.
_FEW_QUERIES = 64


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor,
    global_index: torch.Tensor,
    global_context: torch.Tensor,
    *,
    num_heads: int,
    window: int,
    dilation: int,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """`lfx.reference.banded_attention` in PyTorch, in the inputs' dtype with sums in float32."""
    batch, seqlen, width = query.shape
    slots = global_index.shape[1]
    used = (global_index >= 0) & (global_index < seqlen)
    token_or_end = torch.where(used, global_index, seqlen).long()  # unused slots write past the end
    is_local = torch.cat([key_mask != 0, key_mask.new_zeros((batch, 1), dtype=torch.bool)], dim=1)
    is_local = is_local.scatter(1, token_or_end, False)  # (B, S + 1): real and not global
    q, k, v = (_by_head(x, num_heads) for x in (query, key, value))  # (B, H, S, D)
    rows = token_or_end.clamp(max=seqlen - 1)[:, None, :, None].expand(-1, num_heads, -1, q.shape[3])
    slot_keys, slot_values = k.gather(2, rows), v.gather(2, rows)  # (B, H, G, D)

    # One row more than the output: the contexts of unused slots are written there.
    pool = query.new_empty((batch * seqlen + 1, width))
    out = pool[:-1].view(batch, seqlen, width)
    heads_out = _by_head(out, num_heads)  # (B, H, S, D)
    for first in range(min(dilation, seqlen)):  # of the interleaved subsequences
        sub_q, sub_k, sub_v = (x[:, :, first::dilation] for x in (q, k, v))  # (B, H, T, D)
        sub_local = is_local[:, :-1][:, first::dilation]
        sub_out = heads_out[:, :, first::dilation]
        length = sub_q.shape[2]
        for start in range(0, length, BLOCK):
            queries = slice(start, min(start + BLOCK, length))
            last = queries.stop if causal else min(queries.stop + window, length)
            keys = slice(max(start - window, 0), last)
            positions = torch.arange(length, device=query.device)
            distance = positions[keys][None, :] - positions[queries][:, None]  # (b, keys)
            in_band = (distance >= -window) & (distance <= (0 if causal else window))
            in_band = in_band & sub_local[:, None, keys]  # (B, b, keys)
            visible = torch.cat([used[:, None, :].expand(-1, in_band.shape[1], -1), in_band], dim=2)
            sub_out[:, :, queries] = nn.functional.scaled_dot_product_attention(
                sub_q[:, :, queries],
                torch.cat([slot_keys, sub_k[:, :, keys]], dim=2),
                torch.cat([slot_values, sub_v[:, :, keys]], dim=2),
                _bias(visible, query.dtype)[:, None],
                scale=scale,
            )
    out.masked_fill_((key_mask == 0)[:, :, None], 0.0)
    first_row = torch.arange(batch, device=query.device)[:, None] * seqlen
    row = torch.where(used, first_row + global_index, batch * seqlen).reshape(batch * slots)
    pool.index_put_((row,), global_context.reshape(batch * slots, width))
    return out


def global_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """`lfx.reference.global_attention` in PyTorch, in the inputs' dtype with sums in float32."""
    q, k, v = (_by_head(x, num_heads) for x in (query, key, value))  # (B, H, G or S, D)
    visible = key_mask != 0  # (B, S)
    if query.shape[1] < _FEW_QUERIES and query.dtype == torch.float32:
        scores = (q * scale) @ k.transpose(2, 3) + _bias(visible, query.dtype)[:, None, None]  # (B, H, G, S)
        context = scores.softmax(dim=-1) @ v
    else:
        bias = _bias(visible, query.dtype)[:, None, None].expand(-1, -1, query.shape[1], -1)
        context = nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    has_key = visible.any(dim=1)[:, None, None, None]
    return torch.where(has_key, context, 0.0).transpose(1, 2).flatten(2).contiguous()


def _by_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A view of (B, S, H·D) as (B, H, S, D)."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 for a visible key, and a finite number that hides a key otherwise: infinities give NaN where no key is seen."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def default_scale(width: int, num_heads: int) -> float:
    """1/√D."""
    return 1.0 / math.sqrt(width // num_heads)
