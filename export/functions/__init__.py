"""The bodies of the lfx ops: ONNX local functions of standard ops that have the same meaning in opsets 17 to 23.

Each function is one op of domain `lfx`, version 1. A runtime that has a kernel for the op (TensorRT's plugin, ONNX
Runtime's custom op) runs the kernel; otherwise it inlines the body. The shapes in the comments use these letters:

    B batch            S sequence length              H heads        D head size
    G global slots     d dilation                     T = ceil(S / d), length of one interleaved subsequence
    N query blocks     b block size, in queries       W = min(b + 2·window, T), keys that a block reads
    X = G + W          L = N·b ≥ T

Block form: each block of queries gathers the keys of its windows, so that attention is two batched matrix products
over (B·d·N, H), without diagonal skewing, a loop, or padding of the sequence. Queries, keys and values are gathered
per head from the outputs of the projections, viewed as (B, S·H, D), without a transpose. The result is plain rank-4
attention, which OpenVINO fuses into one layer. The output is one gather from the concatenation of the computed rows,
the global rows and a zero row, which every masked query takes.

All index and mask nodes depend only on the mask and the shape. They are the same in all layers of one window size,
and a runtime with common subexpression elimination, such as ONNX Runtime, computes them once.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfx.export.functions.banded_attention import BLOCK, BandedAttention
from lfx.export.functions.domain import DOMAIN, MASK_FILL, VERSION
from lfx.export.functions.global_attention import GlobalAttention
from lfx.export.functions.global_context import FoldedGlobalContext, GlobalContext, ProjectedGlobalContext
from lfx.export.functions.probabilities import BandedAttentionProbabilities, GlobalAttentionProbabilities
from lfx.export.passes.tensor_constants import make_constants_tensors

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "BLOCK",
    "DOMAIN",
    "HELPERS",
    "MASK_FILL",
    "OPS",
    "VERSION",
    "BandedAttention",
    "BandedAttentionProbabilities",
    "FoldedGlobalContext",
    "GlobalAttention",
    "GlobalAttentionProbabilities",
    "GlobalContext",
    "ProjectedGlobalContext",
    "function",
]

# OPS are nodes of the exported graph; the exporter inlines HELPERS.
OPS = (BandedAttention, GlobalAttention, BandedAttentionProbabilities, GlobalAttentionProbabilities)
HELPERS = (GlobalContext, FoldedGlobalContext, ProjectedGlobalContext)


def function(definition: object, opset: int) -> ir.Function:
    """Convert an onnxscript function to an IR function that imports `opset` of the standard domain."""
    import onnx_ir as ir

    result = ir.serde.deserialize_function(definition.to_function_proto())  # type: ignore[attr-defined]
    make_constants_tensors(result)
    result.opset_imports.update({"": opset, DOMAIN: VERSION})  # onnxscript omits the domain of a call inside an If
    return result
