"""`decomposing_in_place`: decompose a traced program for torch.onnx without tracing it again, where that is possible.

`ExportedProgram.run_decompositions` runs the program twice with symbolic shapes, which takes half the time of an
export. In most Longformers it only replaces one op by one op, which needs no trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
# Composite ops that have an ONNX function, so that torch.onnx keeps them.
_KEPT = {
    _ATEN.layer_norm.default,
    _ATEN.linear.default,
    _ATEN.matmul.default,
    _ATEN.pad.default,
    _ATEN.softmax.int,
    _ATEN.sym_size.int,
    _ATEN.type_as.default,
    _ATEN.where.ScalarOther,
}
# Ops that turn constants of the module into tensors; run_decompositions lifts these constants.
_LIFTED = {_ATEN.lift.default, _ATEN.lift_fresh.default, _ATEN.lift_fresh_copy.default}
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # op, arguments and options


@contextlib.contextmanager
def decomposing_in_place() -> Iterator[None]:
    """Let `ExportedProgram.run_decompositions` change the graph in place if it only replaces one op by one op."""
    original: Callable[..., ExportedProgram] = ExportedProgram.run_decompositions

    def run_decompositions(
        program: ExportedProgram, decomp_table: dict[Any, Any] | None = None, **options: Any
    ) -> ExportedProgram:
        if decomp_table is not None and not options and decompose(program.graph_module, decomp_table):
            return program
        return original(program, decomp_table, **options)

    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = original  # type: ignore[method-assign]


def decompose(module: fx.GraphModule, decompositions: Mapping[Any, Any]) -> bool:
    """Decompose a graph in place; return False, and change nothing, if an op would become more than one op.

    Args:
        decompositions: the ops that are decomposed, in addition to composite ops.
    """
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    if not all(_is_identity(node) or _decomposed(node, decompositions) is not None for node in nodes):
        return False
    for node in nodes:
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif (call := _decomposed(node, decompositions)) is not None:
            node.target, node.args, node.kwargs = call
    module.recompile()
    return True


def _decomposed(node: fx.Node, decompositions: Mapping[Any, Any]) -> _Call | None:
    """Return the call that replaces a node's, which is its own if the op is kept; None if it needs more than one op."""
    op, args, kwargs = node.target, node.args, dict(node.kwargs)
    if node.op != "call_function":
        return None
    if op == _ATEN.item.default:
        return _ATEN._local_scalar_dense.default, args, kwargs
    if op == _ATEN.dropout.default and not args[2]:
        return _ATEN.clone.default, args[:1], {}
    if op == _ATEN.contiguous.default and len(args) == 1 and not kwargs and not _is_output(args[0]):
        return _ATEN.clone.default, args, {"memory_format": torch.contiguous_format}
    if op == _ATEN.to.dtype and len(args) == 2 and not kwargs:
        return _ATEN._to_copy.default, args[:1], {"dtype": args[1]}
    return (op, args, kwargs) if _is_kept(op, decompositions) else None


def _is_identity(node: fx.Node) -> bool:
    """Return whether a node converts a tensor to the dtype that it has, and the graph does not return the result."""
    if node.target not in (_ATEN.to.dtype, _ATEN.to.dtype_layout) or _is_output(node):
        return False
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    options = {"dtype": node.args[1]} if len(node.args) == 2 else dict(node.kwargs)
    unchanged = {"dtype": value.dtype, "device": value.device, "layout": value.layout}
    return len(node.args) + bool(node.kwargs) == 2 and all(unchanged.get(k) == v for k, v in options.items())


def _is_output(node: Any) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_kept(op: Any, decompositions: Mapping[Any, Any]) -> bool:
    """Return whether run_decompositions keeps an op: it has no decomposition, and does not modify its inputs."""
    if not isinstance(op, torch._ops.OpOverload):
        return getattr(op, "__module__", None) in ("_operator", "torch")  # arithmetic of sizes
    if op in _KEPT:
        return op not in decompositions
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not (composite or op._schema.is_mutable or op in decompositions or op in _LIFTED)
