"""The context of the global tokens, computed in the cheaper of two forms; the exporter inlines these functions."""

from __future__ import annotations

from onnxscript import opset17 as op
from onnxscript import script

from lfx.export.functions.domain import lfx


@script(lfx, default_opset=op)
def ProjectedGlobalContext(  # noqa: N802
    query,  # (B, G, H·D), query_global of the global tokens
    hidden,  # (B, S, hidden)
    key_mask,  # (B, S) int32
    key_weight,  # (H·D, hidden)
    key_bias,  # (H·D)
    value_weight,  # (H·D, hidden)
    value_bias,  # (H·D)
    num_heads: int,
    scale: float,
):
    """Global context from the projected keys and values of all tokens: 2·S·hidden² multiply-adds for any G."""
    key = op.Add(op.MatMul(hidden, op.Transpose(key_weight, perm=[1, 0])), key_bias)
    value = op.Add(op.MatMul(hidden, op.Transpose(value_weight, perm=[1, 0])), value_bias)
    return lfx.GlobalAttention(query, key, value, key_mask, num_heads=num_heads, scale=scale)


@script(lfx, default_opset=op)
def FoldedGlobalContext(  # noqa: N802
    query,  # (B, G, H·D), query_global of the global tokens
    hidden,  # (B, S, hidden)
    key_mask,  # (B, S) int32
    key_weight,  # (H·D, hidden)
    key_bias,  # (H·D), unused: q·b_k adds one constant to all scores of a query, which softmax cancels
    value_weight,  # (H·D, hidden)
    value_bias,  # (H·D)
    num_heads: int,
    scale: float,
):
    """Global context with the key projection folded into the query, and the value projection after the weighted sum.

    score = (q·W_k)·x + q·b_k and context = W_v·(Σ p·x) + b_v, so only the global tokens are projected:
    2·S·hidden·H·G multiply-adds, fewer than in the projected form if G < D. The attention op computes one head of size
    `hidden` with G·H queries.
    """
    axis1 = op.Constant(value_ints=[1])
    inferred = op.Constant(value_ints=[-1])
    batch = op.Shape(query, start=0, end=1)
    slots = op.Shape(query, start=1, end=2)
    width = op.Shape(query, start=2, end=3)
    hidden_size = op.Shape(hidden, start=2, end=3)
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    head_size = op.Div(width, heads)
    per_head = op.Concat(heads, head_size, hidden_size, axis=0)
    split = op.Concat(batch, slots, heads, head_size, axis=0)
    by_head = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])  # (B, H, G, D)
    folded = op.MatMul(by_head, op.Reshape(key_weight, per_head))  # (B, H, G, hidden)
    folded = op.Reshape(folded, op.Concat(batch, inferred, hidden_size, axis=0))  # (B, H·G, hidden)
    weighted_sum = lfx.GlobalAttention(folded, hidden, hidden, key_mask, num_heads=1, scale=scale)
    weighted_sum = op.Reshape(weighted_sum, op.Concat(batch, heads, slots, hidden_size, axis=0))
    unfold = op.Transpose(op.Reshape(value_weight, per_head), perm=[0, 2, 1])  # (H, hidden, D)
    context = op.Transpose(op.MatMul(weighted_sum, unfold), perm=[0, 2, 1, 3])  # (B, G, H, D)
    return op.Add(op.Reshape(context, op.Concat(batch, slots, width, axis=0)), value_bias)


@script(lfx, default_opset=op)
def GlobalContext(  # noqa: N802
    query,
    hidden,
    key_mask,
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    num_heads: int,
    scale: float,
):
    """Global context in the cheaper of the two forms, chosen by the number of global slots G of the input."""
    heads = op.Constant(value_int=num_heads)
    head_size = op.Div(op.Squeeze(op.Shape(query, start=2, end=3)), heads)
    few = op.Less(op.Squeeze(op.Shape(query, start=1, end=2)), head_size)
    if few:
        rows = lfx.FoldedGlobalContext(
            query,
            hidden,
            key_mask,
            key_weight,
            key_bias,
            value_weight,
            value_bias,
            num_heads=num_heads,
            scale=scale,
        )
    else:
        rows = lfx.ProjectedGlobalContext(
            query,
            hidden,
            key_mask,
            key_weight,
            key_bias,
            value_weight,
            value_bias,
            num_heads=num_heads,
            scale=scale,
        )
    return rows
