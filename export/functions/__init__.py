"""The bodies of the lfx ops: ONNX local functions made of standard ops that mean the same in opsets 17 to 23.

Each function below is one op of domain `lfx`, version 1. A runtime that knows the op (the TensorRT plugin)
uses its own kernel; any other inlines the body. The letters in the shapes:

    B batch            S sequence length          H heads        D head size
    G global slots     d dilation                 T = ceil(S / d), length of one interleaved subsequence
    N query blocks     b block, queries a block   W = min(b + 2·window, T), keys that a block can see
    X = G + W          L = N·b ≥ T

Block form: every block of queries gathers the keys that it can see, so that attention is two batched matrix
products over (B·d·N, H): no diagonal skewing, no loop, no padding to a multiple. Queries, keys and values are gathered
head by head from where the projections left them, (B, S·H, D), with nothing rearranged before. It is attention as
everyone writes it, of rank 4, which OpenVINO computes in one fused layer. Nothing is scattered: global rows and the
zero rows of masked queries are put in their places by one gather from the pool (computed rows, global rows, a zero
row).

All index and mask nodes depend on the mask and the shape alone. They are the same in every layer of one window,
and a runtime that shares common subexpressions (ONNX Runtime does) computes them once.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfx.export.functions.banded_attention import BLOCK, BandedAttention
from lfx.export.functions.domain import DOMAIN, HIDDEN, VERSION
from lfx.export.functions.global_attention import GlobalAttention
from lfx.export.functions.global_context import FoldedGlobalContext, GlobalContext, ProjectedGlobalContext
from lfx.export.passes.tensor_constants import make_constants_tensors

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "BLOCK",
    "DOMAIN",
    "HELPERS",
    "HIDDEN",
    "OPS",
    "VERSION",
    "BandedAttention",
    "FoldedGlobalContext",
    "GlobalAttention",
    "GlobalContext",
    "ProjectedGlobalContext",
    "function",
]

# What stays a node of the exported graph, and what the exporter inlines.
OPS = (BandedAttention, GlobalAttention)
HELPERS = (GlobalContext, FoldedGlobalContext, ProjectedGlobalContext)


def function(definition: object, opset: int) -> ir.Function:
    """One of the functions above as an IR function that imports `opset` of the standard domain."""
    import onnx_ir as ir

    result = ir.serde.deserialize_function(definition.to_function_proto())  # type: ignore[attr-defined]
    make_constants_tensors(result)
    result.opset_imports.update({"": opset, DOMAIN: VERSION})  # onnxscript does not see calls inside an If
    return result
