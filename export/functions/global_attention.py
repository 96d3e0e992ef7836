"""`GlobalAttention`: the global tokens attend all keys. `lfx.export.functions` explains the letters in shapes."""

from __future__ import annotations

from onnxscript import opset17 as op
from onnxscript import script

from lfx.export.functions.domain import MASK_FILL, lfx


@script(lfx, default_opset=op)
def GlobalAttention(  # noqa: N802
    query,  # (B, G, H·D)
    key,  # (B, S, H·D)
    value,  # (B, S, H·D)
    key_mask,  # (B, S) int32, 1 = real token
    num_heads: int,
    scale: float = 0.0,
):
    """Attention from the global tokens to all real keys; docs/ops.md has the definition."""
    axis1 = op.Constant(value_ints=[1])
    axis12 = op.Constant(value_ints=[1, 2])
    keep = op.Constant(value_ints=[0])
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    head_size = op.Div(op.Shape(query, start=2, end=3), heads)
    split = op.Concat(keep, keep, heads, head_size, axis=0)
    default_scale = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    scale_attribute = op.Cast(op.Constant(value_float=scale), to=1)  # some tools inline the attribute as float64
    factor = op.Where(op.Equal(scale_attribute, op.Constant(value_float=0.0)), default_scale, scale_attribute)
    scaled = op.Mul(query, op.CastLike(factor, query))
    q = op.Transpose(op.Reshape(scaled, split), perm=[0, 2, 3, 1])  # (B, H, D, G)
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])  # (B, H, S, D)
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    visible = op.Unsqueeze(op.Cast(key_mask, to=9), axis12)  # (B, 1, 1, S)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=MASK_FILL))
    # key · queryᵀ, transposed afterwards: the scores are small since G is, and the keys need no transpose.
    scores = op.Transpose(op.MatMul(k, q), perm=[0, 1, 3, 2])  # (B, H, G, S)
    weights = op.Softmax(op.Add(op.Cast(scores, to=1), bias), axis=-1)
    weights = op.Where(visible, weights, op.Constant(value_float=0.0))  # a row without a real key is zero
    context = op.Transpose(op.MatMul(op.CastLike(weights, query), v), perm=[0, 2, 1, 3])
    return op.Reshape(context, op.Concat(keep, keep, op.Mul(heads, head_size), axis=0))
