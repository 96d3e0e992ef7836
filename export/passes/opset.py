"""Graph pass: convert a graph from opset 18, which torch.onnx writes, to the requested opset."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir

from lfx.errors import ExportError
from lfx.signature import OPSETS

TRACED = 18


def set_opset(model: ir.Model, opset: int) -> bool:
    """Convert the standard-domain nodes of `model`, which has no functions yet, from opset 18 to `opset`.

    Returns:
        Whether the model was changed.
    Raises:
        ExportError: a node has no equivalent in `opset`.
    """
    if opset == TRACED:
        return False
    if opset > TRACED:
        from onnxscript import version_converter

        try:
            version_converter.convert_version(model, target_version=opset)
        except Exception as error:
            raise ExportError(f"the graph cannot be converted from opset {TRACED} to {opset}: {error}") from error
    else:
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain == "":
                _lower(node)
    model.opset_imports[""] = opset
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.version = opset if node.domain == "" else node.version
    return True


def _lower(node: ir.Node) -> None:
    """Convert one node from opset 18 to 17; an op that is the same in both is not changed."""
    try:
        since = onnx.defs.get_schema(node.op_type, TRACED, "").since_version
    except onnx.defs.SchemaError as error:
        raise ExportError(f"{node.name}: {node.op_type} is no op of opset {TRACED}") from error
    if since < TRACED:
        return
    lower = _LOWER.get(node.op_type)
    if lower is None:
        raise ExportError(
            f"{node.name}: {node.op_type} has no form in opset {OPSETS[0]} that lfx can write; use --opset {TRACED}"
        )
    lower(node)


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    skip_if_empty = node.attributes.pop("noop_with_empty_axes", None)
    if axes is not None:
        constant = ir.convenience.get_const_tensor(axes)
        if constant is None:
            raise ExportError(f"{node.name}: {node.op_type} with computed axes needs opset {TRACED}; use --opset 18")
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in constant.numpy().reshape(-1)])
        node.resize_inputs(1)
    elif skip_if_empty is not None and skip_if_empty.as_int():
        raise ExportError(f"{node.name}: {node.op_type} without axes needs opset {TRACED}; use --opset 18")


def _remove_num_outputs(node: ir.Node) -> None:
    count = node.attributes.pop("num_outputs", None)
    if count is None or (len(node.inputs) > 1 and node.inputs[1] is not None):
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    size = shape[axis] if shape is not None else None
    if not isinstance(size, int) or size % count.as_int():
        raise ExportError(f"{node.name}: Split of {size} into {count.as_int()} needs opset {TRACED}; use --opset 18")


def _check_no_axes(node: ir.Node) -> None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise ExportError(f"{node.name}: Pad with axes needs opset {TRACED}; use --opset 18")


def _check_no_min_max(node: ir.Node) -> None:
    reduction = node.attributes["reduction"].as_string() if "reduction" in node.attributes else "none"
    if reduction in ("max", "min"):
        raise ExportError(
            f"{node.name}: {node.op_type} with reduction {reduction} needs opset {TRACED}; use --opset {TRACED}"
        )


# Not ReduceLogSumExp, whose axes OpenVINO ignores in the form of opset 17.
_REDUCTIONS = ("L1", "L2", "LogSum", "Max", "Mean", "Min", "Prod", "SumSquare")
_LOWER: dict[str, Callable[[ir.Node], None]] = {
    **{f"Reduce{reduction}": _axes_to_attribute for reduction in _REDUCTIONS},
    "Split": _remove_num_outputs,
    "Pad": _check_no_axes,
    "ScatterElements": _check_no_min_max,
    "ScatterND": _check_no_min_max,
}
