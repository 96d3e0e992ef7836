"""`BandedAttentionProbabilities` and `GlobalAttentionProbabilities`: attention weights in Hugging Face's layout.

Only a bundle with attention outputs has these nodes. They read the inputs of the attention nodes. The other outputs of
such a bundle are bitwise those of a bundle without attention outputs, because a runtime fuses the attention nodes of
both in the same way. For this, the blocks here differ from those of the attention nodes, so that common subexpression
elimination does not merge scores and softmax. The scaling of the query is the same, so that it is merged, and the
projection of the query has one reader: only then does OpenVINO fuse the projection with the scaling.
`lfx.export.functions` explains the letters in shapes.
"""

from __future__ import annotations

from onnxscript import opset17 as op
from onnxscript import script

from lfx.export.functions.banded_attention import BLOCK
from lfx.export.functions.domain import MASK_FILL, lfx


@script(lfx, default_opset=op)
def BandedAttentionProbabilities(  # noqa: N802, PLR0915
    query,  # (B, S, H·D)
    key,  # (B, S, H·D)
    key_mask,  # (B, S) int32, 1 = real token
    global_index,  # (B, G) int32, -1 = unused slot
    num_heads: int,
    window: int,
    scale: float = 0.0,
):
    """Weights of BandedAttention without dilation, (B, H, S, x + 2·window + 1); docs/ops.md has the definition."""
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    axis3 = op.Constant(value_ints=[3])
    inferred = op.Constant(value_ints=[-1])
    start = op.Constant(value_int=0)
    stride = op.Constant(value_int=1)
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    window_1d = op.Reshape(op.Constant(value_int=window), axis1)
    both_sides = op.Add(window_1d, window_1d)

    batch = op.Shape(key_mask, start=0, end=1)
    seqlen = op.Shape(key_mask, start=1, end=2)
    slots = op.Shape(global_index, start=1, end=2)
    head_size = op.Div(op.Shape(query, start=2, end=3), heads)
    block = op.Min(op.Constant(value_ints=[BLOCK]), seqlen)  # b
    blocks = op.Div(op.Add(seqlen, op.Sub(block, axis1)), block)  # N
    span = op.Add(block, both_sides)  # W, here including keys outside the sequence, which are masked
    keys = op.Add(slots, span)  # X

    # Positions of each block's queries and keys. Those outside the sequence are clamped to it.
    block_start = op.Unsqueeze(op.Mul(op.Range(start, op.Squeeze(blocks), stride), block), axis1)  # (N, 1)
    query_range = op.Unsqueeze(op.Range(start, op.Squeeze(block), stride), axis0)  # (1, b)
    key_range = op.Unsqueeze(op.Range(start, op.Squeeze(span), stride), axis0)  # (1, W)
    last_token = op.Sub(seqlen, axis1)
    query_token = op.Min(op.Add(block_start, query_range), last_token)  # (N, b)
    key_position = op.Sub(op.Add(block_start, key_range), window_1d)  # (N, W)
    key_token = op.Max(op.Min(key_position, last_token), axis0)
    slot_columns = op.Expand(op.Range(start, op.Squeeze(slots), stride), op.Concat(blocks, slots, axis=0))
    gather_index = op.Concat(slot_columns, op.Add(key_token, slots), axis=1)  # (N, X): global slots come first

    # Attention mask of each block: the used global slots, and the keys in the band that are real and not global.
    offset = op.Sub(key_range, op.Unsqueeze(op.Squeeze(query_range, axis0), axis1))  # (b, W): column of HF's window
    in_band = op.And(op.GreaterOrEqual(offset, axis0), op.LessOrEqual(offset, both_sides))
    unordered = op.Cast(global_index, to=7)
    unordered = op.Where(op.GreaterOrEqual(unordered, axis0), unordered, seqlen)
    # Sort the global positions, with the unused slots last: the TopK that lists the global tokens compares equal flags,
    # and OpenVINO may return these in any order. Unused slots get index S, the extra column of is_local.
    token_or_end, _ = op.TopK(unordered, slots, axis=1, largest=0, sorted=1)
    slot_used = op.Less(token_or_end, seqlen)
    is_local = op.ScatterElements(
        op.Concat(op.Cast(key_mask, to=7), op.Expand(axis0, op.Concat(batch, axis1, axis=0)), axis=1),
        token_or_end,
        op.Expand(axis0, op.Shape(token_or_end)),
        axis=1,
    )  # (B, S + 1): 1 = real and not global
    inside = op.Equal(key_position, key_token)
    key_visible = op.And(op.Cast(op.Gather(is_local, key_token, axis=1), to=9), inside)  # (B, N, W)
    local_visible = op.And(op.Unsqueeze(key_visible, axis2), in_band)  # (B, N, b, W)
    slot_visible = op.Unsqueeze(slot_used, op.Constant(value_ints=[1, 2]))
    slot_visible = op.Expand(slot_visible, op.Concat(batch, blocks, block, slots, axis=0))
    visible = op.Concat(slot_visible, local_visible, axis=3)
    visible = op.Reshape(visible, op.Concat(inferred, axis1, block, keys, axis=0))  # (B·N, 1, b, X)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=MASK_FILL))

    default_scale = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    scale_attribute = op.Cast(op.Constant(value_float=scale), to=1)  # some tools inline the attribute as float64
    factor = op.Where(op.Equal(scale_attribute, op.Constant(value_float=0.0)), default_scale, scale_attribute)
    scaled = op.Mul(query, op.CastLike(factor, query))
    slot_index = op.Unsqueeze(op.Min(token_or_end, last_token), axis2)  # (B, G, 1)
    k = op.Concat(op.GatherND(key, slot_index, batch_dims=1), key, axis=1)  # (B, G + S, H·D)

    # Gather each block's queries and keys per head: head h of token t is row t·H + h.
    head = op.Unsqueeze(op.Range(start, op.Squeeze(heads), stride), axis1)  # (H, 1)
    query_row = op.Add(op.Mul(op.Unsqueeze(query_token, axis1), heads), head)  # (N, H, b)
    key_row = op.Add(op.Mul(op.Unsqueeze(gather_index, axis1), heads), head)  # (N, H, X)
    rows_shape = op.Concat(batch, inferred, head_size, axis=0)
    query_shape = op.Concat(inferred, heads, block, head_size, axis=0)
    key_shape = op.Concat(inferred, heads, keys, head_size, axis=0)
    q_block = op.Reshape(op.Gather(op.Reshape(scaled, rows_shape), query_row, axis=1), query_shape)  # (B·N, H, b, D)
    k_block = op.Reshape(op.Gather(op.Reshape(k, rows_shape), key_row, axis=1), key_shape)  # (B·N, H, X, D)
    scores = op.MatMul(q_block, op.Transpose(k_block, perm=[0, 1, 3, 2]))  # (B·N, H, b, X)
    weights = op.Softmax(op.Add(op.Cast(scores, to=1), bias), axis=-1)

    # Column c of query r is key r + c of the block. Reading the same numbers as rows of W + 1 moves it to column c.
    flat = op.Reshape(op.Slice(weights, slots, keys, axis3), op.Concat(inferred, heads, op.Mul(block, span), axis=0))
    fill = op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0]), block, axis=0)
    skewed = op.Reshape(op.Pad(flat, fill), op.Concat(inferred, heads, block, op.Add(span, axis1), axis=0))
    columns = op.Add(both_sides, axis1)
    local = op.Slice(skewed, axis0, columns, axis3)  # (B·N, H, b, 2·window + 1)

    # Keep the columns of the used global slots; `used` is the largest number of global tokens in a row of the batch.
    slot_number = op.Add(op.Range(start, op.Squeeze(slots), stride), axis1)
    used = op.Reshape(op.ReduceMax(op.Where(slot_used, slot_number, axis0), keepdims=0), axis1)
    weights = op.Concat(op.Slice(weights, axis0, used, axis3), local, axis=3)
    width = op.Add(used, columns)
    weights = op.Reshape(weights, op.Concat(batch, blocks, heads, block, width, axis=0))
    weights = op.Transpose(weights, perm=[0, 2, 1, 3, 4])  # (B, H, N, b, width)
    weights = op.Reshape(weights, op.Concat(batch, heads, op.Mul(blocks, block), width, axis=0))
    weights = op.Slice(weights, axis0, seqlen, axis2)  # (B, H, S, width)
    attends = op.Cast(op.Slice(is_local, axis0, seqlen, axis1), to=9)
    attends = op.Unsqueeze(attends, op.Constant(value_ints=[1, 3]))
    return op.Where(attends, weights, op.Constant(value_float=0.0))  # rows of masked and of global tokens are zero


@script(lfx, default_opset=op)
def GlobalAttentionProbabilities(  # noqa: N802
    query,  # (B, G, H·D)
    key,  # (B, S, H·D)
    key_mask,  # (B, S) int32, 1 = real token
    global_index,  # (B, G) int32, -1 = unused slot
    num_heads: int,
    scale: float = 0.0,
):
    """Weights of GlobalAttention, (B, H, S, x) float32; docs/ops.md has the definition."""
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis3 = op.Constant(value_ints=[3])
    start = op.Constant(value_int=0)
    stride = op.Constant(value_int=1)
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    head_size = op.Div(op.Shape(query, start=2, end=3), heads)
    split = op.Concat(axis0, axis0, heads, head_size, axis=0)
    default_scale = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    scale_attribute = op.Cast(op.Constant(value_float=scale), to=1)  # some tools inline the attribute as float64
    factor = op.Where(op.Equal(scale_attribute, op.Constant(value_float=0.0)), default_scale, scale_attribute)
    scaled = op.Mul(query, op.CastLike(factor, query))

    # Sort the queries by position, with the unused slots last, as in BandedAttentionProbabilities.
    seqlen = op.Shape(key, start=1, end=2)
    slots = op.Shape(global_index, start=1, end=2)
    slot_token = op.Cast(global_index, to=7)
    slot_token = op.Where(op.GreaterOrEqual(slot_token, axis0), slot_token, seqlen)
    position, order = op.TopK(slot_token, slots, axis=1, largest=0, sorted=1)
    slot_used = op.Less(position, seqlen)
    scaled = op.GatherND(scaled, op.Unsqueeze(order, op.Constant(value_ints=[2])), batch_dims=1)

    q = op.Transpose(op.Reshape(scaled, split), perm=[0, 2, 3, 1])  # (B, H, D, G)
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])  # (B, H, S, D)
    visible = op.Unsqueeze(op.Cast(key_mask, to=9), op.Constant(value_ints=[1, 3]))  # (B, 1, S, 1)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=MASK_FILL))
    weights = op.Softmax(op.Add(op.Cast(op.MatMul(k, q), to=1), bias), axis=2)  # (B, H, S, G)
    visible = op.And(visible, op.Unsqueeze(slot_used, op.Constant(value_ints=[1, 2])))
    weights = op.Where(visible, weights, op.Constant(value_float=0.0))
    slot_number = op.Add(op.Range(start, op.Squeeze(slots), stride), axis1)
    used = op.Reshape(op.ReduceMax(op.Where(slot_used, slot_number, axis0), keepdims=0), axis1)
    return op.Slice(weights, axis0, used, axis3)
