"""`BandedAttention`: a sliding window, and the keys of the global tokens; the letters are in `lfx.export.functions`."""

from __future__ import annotations

from onnxscript import opset17 as op
from onnxscript import script

from lfx.export.functions.domain import HIDDEN, lfx

# Queries a block. 96 and 128 were the fastest of 64 to 256 in ONNX Runtime for base-4096 (window 256, head size 64):
# smaller blocks score fewer masked pairs but gather each key more often.
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
    """Sliding-window attention plus the keys of global tokens; see docs/ops.md for the definition."""
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    rest = op.Constant(value_ints=[-1])
    start = op.Constant(value_int=0)
    stride = op.Constant(value_int=1)
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    window_1d = op.Reshape(op.Constant(value_int=window), axis1)
    step = op.Reshape(op.Constant(value_int=dilation), axis1)
    not_causal = op.Sub(axis1, op.Reshape(op.Constant(value_int=causal), axis1))

    batch = op.Shape(key_mask, start=0, end=1)  # of the mask, not the query: the same value in every layer
    seqlen = op.Shape(key_mask, start=1, end=2)
    width = op.Shape(query, start=2, end=3)
    slots = op.Shape(global_index, start=1, end=2)
    head_size = op.Div(width, heads)
    sublen = op.Div(op.Add(seqlen, op.Sub(step, axis1)), step)  # T
    block = op.Min(op.Constant(value_ints=[BLOCK]), sublen)  # b
    blocks = op.Div(op.Add(sublen, op.Sub(block, axis1)), block)  # N
    span = op.Min(op.Add(block, op.Add(window_1d, window_1d)), sublen)  # W
    keys = op.Add(slots, span)  # X

    # Where each block's queries and keys stand in their subsequence. The keys of the first and last blocks are moved
    # inside; queries behind the end are never read.
    block_at = op.Unsqueeze(op.Mul(op.Range(start, op.Squeeze(blocks), stride), block), axis1)  # (N, 1)
    query_at = op.Add(block_at, op.Unsqueeze(op.Range(start, op.Squeeze(block), stride), axis0))  # (N, b)
    first_key = op.Max(op.Min(op.Sub(block_at, window_1d), op.Sub(sublen, span)), axis0)  # (N, 1)
    key_at = op.Add(first_key, op.Unsqueeze(op.Range(start, op.Squeeze(span), stride), axis0))  # (N, W)

    # Where in the sequence: subsequence r has the tokens r, r + d, r + 2d, ... Behind the end the last one stands in.
    lane = op.Reshape(op.Range(start, op.Squeeze(step), stride), op.Constant(value_ints=[-1, 1, 1]))  # (d, 1, 1)
    last = op.Sub(seqlen, axis1)
    query_token = op.Min(op.Add(op.Mul(query_at, step), lane), last)  # (d, N, b)
    key_position = op.Add(op.Mul(key_at, step), lane)  # (d, N, W)
    key_token = op.Min(key_position, last)
    slot_range = op.Range(start, op.Squeeze(slots), stride)  # (G)
    slot_at = op.Expand(slot_range, op.Concat(step, blocks, slots, axis=0))
    gather_at = op.Concat(slot_at, op.Add(key_token, slots), axis=2)  # (d, N, X): global slots stand first

    # Which of them a query may see.
    distance = op.Sub(op.Unsqueeze(key_at, axis1), op.Unsqueeze(query_at, axis2))  # (N, b, W)
    in_band = op.And(
        op.GreaterOrEqual(distance, op.Neg(window_1d)),
        op.LessOrEqual(distance, op.Mul(window_1d, not_causal)),
    )
    index = op.Cast(global_index, to=7)
    used = op.GreaterOrEqual(index, axis0)
    index_or_end = op.Where(used, index, seqlen)  # unused slots write behind the sequence
    real = op.Cast(key_mask, to=7)
    tail = op.Expand(axis0, op.Concat(batch, step, axis=0))  # nothing behind the end is real
    local = op.ScatterElements(
        op.Concat(real, tail, axis=1), index_or_end, op.Expand(axis0, op.Shape(index_or_end)), axis=1
    )  # (B, S + d): real and not global
    key_seen = op.Cast(op.Gather(local, key_position, axis=1), to=9)  # (B, d, N, W)
    seen = op.And(op.Unsqueeze(key_seen, op.Constant(value_ints=[3])), in_band)  # (B, d, N, b, W)
    slot_seen = op.Unsqueeze(used, op.Constant(value_ints=[1, 2, 3]))
    slot_seen = op.Expand(slot_seen, op.Concat(batch, step, blocks, block, slots, axis=0))
    visible = op.Concat(slot_seen, seen, axis=4)
    visible = op.Reshape(visible, op.Concat(rest, axis1, block, keys, axis=0))  # (B·d·N, 1, b, X)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=HIDDEN))

    root = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    given = op.Cast(op.Constant(value_float=scale), to=1)  # some tools inline it as float64
    factor = op.Where(op.Equal(given, op.Constant(value_float=0.0)), root, given)
    scaled = op.Mul(query, op.CastLike(factor, query))

    # The keys and values of the global tokens, in front of the sequence.
    slot_index = op.Unsqueeze(op.Max(index, axis0), axis2)  # (B, G, 1)
    k = op.Concat(op.GatherND(key, slot_index, batch_dims=1), key, axis=1)  # (B, G + S, H·D)
    v = op.Concat(op.GatherND(value, slot_index, batch_dims=1), value, axis=1)

    # Each block's rows of each head: token t's head h is row t·H + h.
    head = op.Unsqueeze(op.Range(start, op.Squeeze(heads), stride), axis1)  # (H, 1)
    query_row = op.Add(op.Mul(op.Unsqueeze(query_token, axis2), heads), head)  # (d, N, H, b)
    key_row = op.Add(op.Mul(op.Unsqueeze(gather_at, axis2), heads), head)  # (d, N, H, X)
    rows = op.Concat(batch, rest, head_size, axis=0)
    queries_of = op.Concat(rest, heads, block, head_size, axis=0)
    keys_of = op.Concat(rest, heads, keys, head_size, axis=0)
    q_block = op.Reshape(op.Gather(op.Reshape(scaled, rows), query_row, axis=1), queries_of)  # (B·d·N, H, b, D)
    k_block = op.Reshape(op.Gather(op.Reshape(k, rows), key_row, axis=1), keys_of)  # (B·d·N, H, X, D)
    v_block = op.Reshape(op.Gather(op.Reshape(v, rows), key_row, axis=1), keys_of)

    # Attention of each block; softmax in float32.
    scores = op.MatMul(q_block, op.Transpose(k_block, perm=[0, 1, 3, 2]))  # (B·d·N, H, b, X)
    weights = op.Softmax(op.Add(op.Cast(scores, to=1), bias), axis=-1)
    attended = op.MatMul(op.CastLike(weights, query), v_block)  # (B·d·N, H, b, D)

    # Back to (B, S, H·D): every position takes its row from the pool.
    by_lane = op.Concat(batch, step, blocks, heads, block, head_size, axis=0)
    attended = op.Transpose(op.Reshape(attended, by_lane), perm=[0, 2, 4, 1, 3, 5])  # (B, N, b, d, H, D)
    computed = op.Mul(op.Mul(blocks, block), step)  # L·d
    attended = op.Reshape(attended, op.Concat(batch, computed, width, axis=0))
    zero_row = op.Expand(op.CastLike(op.Constant(value_float=0.0), query), op.Concat(batch, axis1, width, axis=0))
    pool = op.Concat(attended, global_context, zero_row, axis=1)  # (B, L·d + G + 1, H·D)
    position = op.Unsqueeze(op.Range(start, op.Squeeze(seqlen), stride), axis0)
    row_at = op.Where(op.Equal(real, axis0), op.Add(computed, slots), position)
    row_at = op.Concat(row_at, op.Expand(axis0, op.Concat(batch, axis1, axis=0)), axis=1)
    slot_row = op.Expand(op.Add(slot_range, computed), op.Shape(index_or_end))
    row_at = op.Slice(op.ScatterElements(row_at, index_or_end, slot_row, axis=1), axis0, seqlen, axis1)
    return op.GatherND(pool, op.Unsqueeze(row_at, axis2), batch_dims=1)
