"""`BandedAttention`: each query attends a window and the global tokens. `lfx.export.functions` explains the letters."""

from __future__ import annotations

from onnxscript import opset17 as op
from onnxscript import script

from lfx.export.functions.domain import MASK_FILL, lfx

# Number of queries in a block. 96 and 128 were the fastest of 64 to 256 in ONNX Runtime for base-4096 (window 256, head
# size 64): smaller blocks compute fewer masked scores, but gather each key more often.
BLOCK = 128


@script(lfx, default_opset=op)
def BandedAttention(  # noqa: N802, PLR0915
    query,  # (B, S, H·D)
    key,  # (B, S, H·D)
    value,  # (B, S, H·D)
    key_mask,  # (B, S) int32, 1 = real token
    global_index,  # (B, G) int32, -1 = unused slot
    global_context,  # (B, G, H·D)
    num_heads: int,
    window: int,
    dilation: int = 1,
    causal: int = 0,
    scale: float = 0.0,
):
    """Attention of each query over a sliding window and the global tokens; docs/ops.md has the definition."""
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    inferred = op.Constant(value_ints=[-1])
    start = op.Constant(value_int=0)
    stride = op.Constant(value_int=1)
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    window_1d = op.Reshape(op.Constant(value_int=window), axis1)
    step = op.Reshape(op.Constant(value_int=dilation), axis1)
    not_causal = op.Sub(axis1, op.Reshape(op.Constant(value_int=causal), axis1))

    batch = op.Shape(key_mask, start=0, end=1)  # of the mask, not the query: the same value in all layers
    seqlen = op.Shape(key_mask, start=1, end=2)
    hidden_size = op.Shape(query, start=2, end=3)
    slots = op.Shape(global_index, start=1, end=2)
    head_size = op.Div(hidden_size, heads)
    subsequence_length = op.Div(op.Add(seqlen, op.Sub(step, axis1)), step)  # T
    block = op.Min(op.Constant(value_ints=[BLOCK]), subsequence_length)  # b
    blocks = op.Div(op.Add(subsequence_length, op.Sub(block, axis1)), block)  # N
    span = op.Min(op.Add(block, op.Add(window_1d, window_1d)), subsequence_length)  # W
    keys = op.Add(slots, span)  # X

    # Index of each block's queries and keys in a subsequence. The key ranges of the first and the last blocks are
    # shifted to lie inside it. The last block may have queries past the end; their results are discarded.
    block_start = op.Unsqueeze(op.Mul(op.Range(start, op.Squeeze(blocks), stride), block), axis1)  # (N, 1)
    query_index = op.Add(block_start, op.Unsqueeze(op.Range(start, op.Squeeze(block), stride), axis0))  # (N, b)
    first_key = op.Max(op.Min(op.Sub(block_start, window_1d), op.Sub(subsequence_length, span)), axis0)  # (N, 1)
    key_index = op.Add(first_key, op.Unsqueeze(op.Range(start, op.Squeeze(span), stride), axis0))  # (N, W)

    # Position of each query and key in the sequence: subsequence r holds the tokens r, r + d, r + 2d, ...
    # Positions past the end are clamped to the last token; their results are discarded.
    subsequence = op.Range(start, op.Squeeze(step), stride)
    subsequence = op.Reshape(subsequence, op.Constant(value_ints=[-1, 1, 1]))  # (d, 1, 1)
    last_token = op.Sub(seqlen, axis1)
    query_token = op.Min(op.Add(op.Mul(query_index, step), subsequence), last_token)  # (d, N, b)
    key_position = op.Add(op.Mul(key_index, step), subsequence)  # (d, N, W)
    key_token = op.Min(key_position, last_token)
    slot_range = op.Range(start, op.Squeeze(slots), stride)  # (G)
    slot_columns = op.Expand(slot_range, op.Concat(step, blocks, slots, axis=0))
    gather_index = op.Concat(slot_columns, op.Add(key_token, slots), axis=2)  # (d, N, X): global slots come first

    # Attention mask of each block: the used global slots, and the keys in the band that are real and not global.
    distance = op.Sub(op.Unsqueeze(key_index, axis1), op.Unsqueeze(query_index, axis2))  # (N, b, W)
    in_band = op.And(
        op.GreaterOrEqual(distance, op.Neg(window_1d)),
        op.LessOrEqual(distance, op.Mul(window_1d, not_causal)),
    )
    slot_token = op.Cast(global_index, to=7)
    slot_used = op.GreaterOrEqual(slot_token, axis0)
    token_or_end = op.Where(slot_used, slot_token, seqlen)  # unused slots write past the end
    is_real = op.Cast(key_mask, to=7)
    padding = op.Expand(axis0, op.Concat(batch, step, axis=0))  # positions past the end are masked
    is_local = op.ScatterElements(
        op.Concat(is_real, padding, axis=1), token_or_end, op.Expand(axis0, op.Shape(token_or_end)), axis=1
    )  # (B, S + d): 1 = real and not global
    key_visible = op.Cast(op.Gather(is_local, key_position, axis=1), to=9)  # (B, d, N, W)
    local_visible = op.And(op.Unsqueeze(key_visible, op.Constant(value_ints=[3])), in_band)  # (B, d, N, b, W)
    slot_visible = op.Unsqueeze(slot_used, op.Constant(value_ints=[1, 2, 3]))
    slot_visible = op.Expand(slot_visible, op.Concat(batch, step, blocks, block, slots, axis=0))
    visible = op.Concat(slot_visible, local_visible, axis=4)
    visible = op.Reshape(visible, op.Concat(inferred, axis1, block, keys, axis=0))  # (B·d·N, 1, b, X)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=MASK_FILL))

    default_scale = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    scale_attribute = op.Cast(op.Constant(value_float=scale), to=1)  # some tools inline the attribute as float64
    factor = op.Where(op.Equal(scale_attribute, op.Constant(value_float=0.0)), default_scale, scale_attribute)
    scaled = op.Mul(query, op.CastLike(factor, query))

    # Prepend the keys and values of the global tokens to the sequence.
    slot_index = op.Unsqueeze(op.Max(slot_token, axis0), axis2)  # (B, G, 1)
    k = op.Concat(op.GatherND(key, slot_index, batch_dims=1), key, axis=1)  # (B, G + S, H·D)
    v = op.Concat(op.GatherND(value, slot_index, batch_dims=1), value, axis=1)

    # Gather each block's queries, keys and values per head: head h of token t is row t·H + h.
    head = op.Unsqueeze(op.Range(start, op.Squeeze(heads), stride), axis1)  # (H, 1)
    query_row = op.Add(op.Mul(op.Unsqueeze(query_token, axis2), heads), head)  # (d, N, H, b)
    key_row = op.Add(op.Mul(op.Unsqueeze(gather_index, axis2), heads), head)  # (d, N, H, X)
    rows_shape = op.Concat(batch, inferred, head_size, axis=0)
    query_shape = op.Concat(inferred, heads, block, head_size, axis=0)
    key_shape = op.Concat(inferred, heads, keys, head_size, axis=0)
    q_rows = op.Reshape(scaled, rows_shape)
    q_block = op.Reshape(op.Gather(q_rows, query_row, axis=1), query_shape)  # (B·d·N, H, b, D)
    k_block = op.Reshape(op.Gather(op.Reshape(k, rows_shape), key_row, axis=1), key_shape)  # (B·d·N, H, X, D)
    v_block = op.Reshape(op.Gather(op.Reshape(v, rows_shape), key_row, axis=1), key_shape)

    # Attention of each block; softmax in float32.
    scores = op.MatMul(q_block, op.Transpose(k_block, perm=[0, 1, 3, 2]))  # (B·d·N, H, b, X)
    weights = op.Softmax(op.Add(op.Cast(scores, to=1), bias), axis=-1)
    attended = op.MatMul(op.CastLike(weights, query), v_block)  # (B·d·N, H, b, D)

    # Output (B, S, H·D): each position gathers its row from the pool of computed rows, global rows and a zero row.
    block_shape = op.Concat(batch, step, blocks, heads, block, head_size, axis=0)
    attended = op.Transpose(op.Reshape(attended, block_shape), perm=[0, 2, 4, 1, 3, 5])  # (B, N, b, d, H, D)
    computed = op.Mul(op.Mul(blocks, block), step)  # L·d
    attended = op.Reshape(attended, op.Concat(batch, computed, hidden_size, axis=0))
    zero_row = op.Expand(op.CastLike(op.Constant(value_float=0.0), query), op.Concat(batch, axis1, hidden_size, axis=0))
    pool = op.Concat(attended, global_context, zero_row, axis=1)  # (B, L·d + G + 1, H·D)
    position = op.Unsqueeze(op.Range(start, op.Squeeze(seqlen), stride), axis0)
    row_index = op.Where(op.Equal(is_real, axis0), op.Add(computed, slots), position)
    row_index = op.Concat(row_index, op.Expand(axis0, op.Concat(batch, axis1, axis=0)), axis=1)
    slot_row = op.Expand(op.Add(slot_range, computed), op.Shape(token_or_end))
    row_index = op.Slice(op.ScatterElements(row_index, token_or_end, slot_row, axis=1), axis0, seqlen, axis1)
    return op.GatherND(pool, op.Unsqueeze(row_index, axis2), batch_dims=1)
