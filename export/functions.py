"""The bodies of the lfx ops: ONNX local functions made of standard ops that mean the same in opsets 17 to 23.

Each function below is one op of domain `lfx`, version 1. A runtime that knows the op (the TensorRT plugin)
uses its own kernel; any other inlines the body. The letters in the shapes:

    B batch            S sequence length          H heads        D head size
    G global slots     d dilation                 T = ceil(S / d), length of one interleaved subsequence
    N query blocks     b block, queries a block   W = min(b + 2·window, T), keys that a block can see
    X = G + W          L = N·b ≥ T

Block form: every block of queries gathers the keys that it can see, so that attention is two batched matrix
products over (B·d, H, N): no diagonal skewing, no loop. Nothing is scattered: global rows and the zero rows of
masked queries are put in their places by one gather from the pool (computed rows, global rows, a zero row).

All index and mask nodes depend on the mask and the shape alone. They are the same in every layer of one window,
and a runtime that shares common subexpressions (ONNX Runtime does) computes them once.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxscript import opset17 as op
from onnxscript import script
from onnxscript.values import Opset

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "lfx"
VERSION = 1
lfx = Opset(DOMAIN, VERSION)

# Queries a block. 96 to 128 was the fastest of 64 to 384 in ONNX Runtime for base-4096 (window 256, head size 64):
# smaller blocks score fewer masked pairs but gather each key more often.
BLOCK = 128
# Added to the score of a key that must not be seen. The lowest finite float32, as Hugging Face has it: with -inf a
# query that sees nothing would be NaN.
HIDDEN = -3.4028234663852886e38


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
    lanes = op.Mul(batch, step)  # B·d: each subsequence is a batch row of its own
    sublen = op.Div(op.Add(seqlen, op.Sub(step, axis1)), step)  # T
    padded_len = op.Mul(sublen, step)  # T·d ≥ S
    block = op.Min(op.Constant(value_ints=[BLOCK]), sublen)  # b
    blocks = op.Div(op.Add(sublen, op.Sub(block, axis1)), block)  # N
    span = op.Min(op.Add(block, op.Add(window_1d, window_1d)), sublen)  # W

    # Where each block's queries and keys stand in their subsequence. The keys of the first and last blocks are moved
    # inside; queries behind the end repeat the last one, and are never read.
    block_at = op.Unsqueeze(op.Mul(op.Range(start, op.Squeeze(blocks), stride), block), axis1)  # (N, 1)
    block_range = op.Unsqueeze(op.Range(start, op.Squeeze(block), stride), axis0)  # (1, b)
    span_range = op.Unsqueeze(op.Range(start, op.Squeeze(span), stride), axis0)  # (1, W)
    query_at = op.Min(op.Add(block_at, block_range), op.Sub(sublen, axis1))  # (N, b)
    first_key = op.Max(op.Min(op.Sub(block_at, window_1d), op.Sub(sublen, span)), axis0)  # (N, 1)
    key_at = op.Add(first_key, span_range)  # (N, W)
    slot_range = op.Range(start, op.Squeeze(slots), stride)  # (G)
    slot_at = op.Expand(op.Unsqueeze(slot_range, axis0), op.Concat(blocks, slots, axis=0))
    gather_at = op.Concat(slot_at, op.Add(key_at, slots), axis=1)  # (N, X): global slots stand first

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
    tail = op.Expand(axis0, op.Concat(batch, op.Sub(op.Add(padded_len, axis1), seqlen), axis=0))
    local = op.ScatterElements(
        op.Concat(real, tail, axis=1), index_or_end, op.Expand(axis0, op.Shape(index_or_end)), axis=1
    )
    local = op.Slice(local, axis0, padded_len, axis1)  # (B, T·d): real and not global
    local = op.Transpose(op.Reshape(local, op.Concat(batch, sublen, step, axis=0)), perm=[0, 2, 1])
    local = op.Reshape(local, op.Concat(lanes, sublen, axis=0))
    key_seen = op.Cast(op.Gather(local, key_at, axis=1), to=9)  # (B·d, N, W)
    seen = op.And(op.Unsqueeze(key_seen, axis2), in_band)  # (B·d, N, b, W)
    slot_seen = op.Expand(op.Unsqueeze(used, axis1), op.Concat(batch, step, slots, axis=0))
    slot_seen = op.Reshape(slot_seen, op.Concat(lanes, axis1, axis1, slots, axis=0))
    slot_seen = op.Expand(slot_seen, op.Concat(lanes, blocks, block, slots, axis=0))
    visible = op.Unsqueeze(op.Concat(slot_seen, seen, axis=3), axis1)  # (B·d, 1, N, b, X)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=HIDDEN))

    # Heads and subsequences to the front.
    root = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    given = op.Constant(value_float=scale)
    factor = op.Where(op.Equal(given, op.Constant(value_float=0.0)), root, given)
    scaled = op.Mul(query, op.CastLike(factor, query))
    pads = op.Concat(axis0, axis0, axis0, axis0, op.Sub(padded_len, seqlen), axis0, axis=0)
    split = op.Concat(batch, sublen, step, heads, head_size, axis=0)
    rows = op.Concat(lanes, heads, sublen, head_size, axis=0)
    q = op.Reshape(op.Transpose(op.Reshape(op.Pad(scaled, pads), split), perm=[0, 2, 3, 1, 4]), rows)
    k = op.Reshape(op.Transpose(op.Reshape(op.Pad(key, pads), split), perm=[0, 2, 3, 1, 4]), rows)
    v = op.Reshape(op.Transpose(op.Reshape(op.Pad(value, pads), split), perm=[0, 2, 3, 1, 4]), rows)

    # The keys and values of the global tokens, in front of every subsequence.
    slot_index = op.Unsqueeze(op.Max(index, axis0), axis2)  # (B, G, 1)
    slot_split = op.Concat(batch, slots, axis1, heads, head_size, axis=0)
    slot_tile = op.Concat(batch, step, heads, slots, head_size, axis=0)
    slot_rows = op.Concat(lanes, heads, slots, head_size, axis=0)
    k_slot = op.Reshape(op.GatherND(key, slot_index, batch_dims=1), slot_split)
    v_slot = op.Reshape(op.GatherND(value, slot_index, batch_dims=1), slot_split)
    k_slot = op.Reshape(op.Expand(op.Transpose(k_slot, perm=[0, 2, 3, 1, 4]), slot_tile), slot_rows)
    v_slot = op.Reshape(op.Expand(op.Transpose(v_slot, perm=[0, 2, 3, 1, 4]), slot_tile), slot_rows)

    # Attention of each block; softmax in float32.
    q_block = op.Gather(q, query_at, axis=2)  # (B·d, H, N, b, D)
    k_block = op.Gather(op.Concat(k_slot, k, axis=2), gather_at, axis=2)  # (B·d, H, N, X, D)
    v_block = op.Gather(op.Concat(v_slot, v, axis=2), gather_at, axis=2)
    scores = op.MatMul(q_block, op.Transpose(k_block, perm=[0, 1, 2, 4, 3]))  # (B·d, H, N, b, X)
    weights = op.Softmax(op.Add(op.Cast(scores, to=1), bias), axis=-1)
    attended = op.MatMul(op.CastLike(weights, query), v_block)  # (B·d, H, N, b, D)

    # Back to (B, S, H·D): every position takes its row from the pool.
    length = op.Mul(blocks, block)  # L
    attended = op.Reshape(attended, op.Concat(batch, step, heads, length, head_size, axis=0))
    attended = op.Transpose(attended, perm=[0, 3, 1, 2, 4])
    computed = op.Mul(length, step)  # L·d
    attended = op.Reshape(attended, op.Concat(batch, computed, width, axis=0))
    zero_row = op.Expand(op.CastLike(op.Constant(value_float=0.0), query), op.Concat(batch, axis1, width, axis=0))
    pool = op.Concat(attended, global_context, zero_row, axis=1)  # (B, L·d + G + 1, H·D)
    position = op.Unsqueeze(op.Range(start, op.Squeeze(seqlen), stride), axis0)
    row_at = op.Where(op.Equal(real, axis0), op.Add(computed, slots), position)
    row_at = op.Concat(row_at, op.Expand(axis0, op.Concat(batch, axis1, axis=0)), axis=1)
    slot_row = op.Expand(op.Add(slot_range, computed), op.Shape(index_or_end))
    row_at = op.Slice(op.ScatterElements(row_at, index_or_end, slot_row, axis=1), axis0, seqlen, axis1)
    return op.GatherND(pool, op.Unsqueeze(row_at, axis2), batch_dims=1)


@script(lfx, default_opset=op)
def GlobalAttention(  # noqa: N802
    query,  # (B, G, H·D)
    key,  # (B, S, H·D)
    value,  # (B, S, H·D)
    key_mask,  # (B, S) int32, 1 = real token
    num_heads: int,
    scale: float = 0.0,
):
    """Attention of the global tokens over all real keys; see docs/ops.md for the definition."""
    axis1 = op.Constant(value_ints=[1])
    axis12 = op.Constant(value_ints=[1, 2])
    keep = op.Constant(value_ints=[0])
    heads = op.Reshape(op.Constant(value_int=num_heads), axis1)
    head_size = op.Div(op.Shape(query, start=2, end=3), heads)
    split = op.Concat(keep, keep, heads, head_size, axis=0)
    root = op.Reciprocal(op.Sqrt(op.Cast(head_size, to=1)))
    given = op.Constant(value_float=scale)
    factor = op.Where(op.Equal(given, op.Constant(value_float=0.0)), root, given)
    scaled = op.Mul(query, op.CastLike(factor, query))
    q = op.Transpose(op.Reshape(scaled, split), perm=[0, 2, 3, 1])  # (B, H, D, G)
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])  # (B, H, S, D)
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    visible = op.Unsqueeze(op.Cast(key_mask, to=9), axis12)  # (B, 1, 1, S)
    bias = op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=HIDDEN))
    # key · queryᵀ, then turned: G is small, and the keys are read as they lie.
    scores = op.Transpose(op.MatMul(k, q), perm=[0, 1, 3, 2])  # (B, H, G, S)
    weights = op.Softmax(op.Add(op.Cast(scores, to=1), bias), axis=-1)
    weights = op.Where(visible, weights, op.Constant(value_float=0.0))  # a row without a real key is 0
    context = op.Transpose(op.MatMul(op.CastLike(weights, query), v), perm=[0, 2, 1, 3])
    return op.Reshape(context, op.Concat(keep, keep, op.Mul(heads, head_size), axis=0))


@script(lfx, default_opset=op)
def ProjectedGlobalRows(  # noqa: N802
    query,  # (B, G, H·D), the global tokens through query_global
    hidden,  # (B, S, hidden)
    key_mask,
    key_weight,  # (H·D, hidden)
    key_bias,  # (H·D)
    value_weight,
    value_bias,
    num_heads: int,
    scale: float,
):
    """Global rows with the keys and values of all tokens projected: 4·S·hidden² multiply-adds for any G."""
    key = op.Add(op.MatMul(hidden, op.Transpose(key_weight, perm=[1, 0])), key_bias)
    value = op.Add(op.MatMul(hidden, op.Transpose(value_weight, perm=[1, 0])), value_bias)
    return lfx.GlobalAttention(query, key, value, key_mask, num_heads=num_heads, scale=scale)


@script(lfx, default_opset=op)
def FoldedGlobalRows(  # noqa: N802
    query,  # (B, G, H·D)
    hidden,  # (B, S, hidden)
    key_mask,
    key_weight,  # (H·D, hidden)
    key_bias,  # (H·D): q·b_k shifts all scores of a query alike, so softmax does not see it
    value_weight,
    value_bias,
    num_heads: int,
    scale: float,
):
    """Global rows with the key projection folded into the query and the value projection put after the sum.

    score = (q·W_k)·x + q·b_k and context = W_v·(Σ p·x) + b_v, so no token but the global ones is projected:
    4·S·hidden·H·G multiply-adds, fewer than the projected form's while G < D. To the op it is one head of size
    `hidden` with G·H queries.
    """
    axis1 = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
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
    folded = op.Reshape(folded, op.Concat(batch, rest, hidden_size, axis=0))  # (B, H·G, hidden)
    mixed = lfx.GlobalAttention(folded, hidden, hidden, key_mask, num_heads=1, scale=scale)
    mixed = op.Reshape(mixed, op.Concat(batch, heads, slots, hidden_size, axis=0))
    unfold = op.Transpose(op.Reshape(value_weight, per_head), perm=[0, 2, 1])  # (H, hidden, D)
    context = op.Transpose(op.MatMul(mixed, unfold), perm=[0, 2, 1, 3])  # (B, G, H, D)
    return op.Add(op.Reshape(context, op.Concat(batch, slots, width, axis=0)), value_bias)


@script(lfx, default_opset=op)
def GlobalRows(  # noqa: N802
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
    """The cheaper of the two forms, by the number of global slots that the input has."""
    heads = op.Constant(value_int=num_heads)
    head_size = op.Div(op.Squeeze(op.Shape(query, start=2, end=3)), heads)
    few = op.Less(op.Squeeze(op.Shape(query, start=1, end=2)), head_size)
    if few:
        rows = lfx.FoldedGlobalRows(
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
        rows = lfx.ProjectedGlobalRows(
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


# What stays a node of the exported graph, and what the exporter inlines.
OPS = (BandedAttention, GlobalAttention)
HELPERS = (GlobalRows, FoldedGlobalRows, ProjectedGlobalRows)


def function(definition: object, opset: int) -> ir.Function:
    """One of the functions above as an IR function that imports `opset` of the standard domain."""
    import onnx_ir as ir

    result = ir.serde.deserialize_function(definition.to_function_proto())  # type: ignore[attr-defined]
    result.opset_imports.update({"": opset, DOMAIN: VERSION})  # onnxscript does not see calls inside an If
    return result
