"""Graph pass: replace the input global_attention_mask by a fixed rule: the first token of each row, or no token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lfx.export.functions import DOMAIN
from lfx.runtime.build.prepare_graph import freeze_slots
from lfx.signature import GLOBAL_ROWS

_MASK = "global_attention_mask"
_INDEX, _CONTEXT = 4, 5  # inputs of BandedAttention


def fix_globals(model: ir.Model, mode: str, *, adds_globals: bool = False) -> bool:
    """Compute the global tokens from input_ids, and remove the input.

    Args:
        model: a graph of the exporter, opset 17 or later.
        mode: "first" or "none".
        adds_globals: whether the model marks further tokens; otherwise a row has at most one global slot, and without
            global tokens the global attention is removed.
    Returns:
        Whether the model was changed; False if it has no such input.
    """
    graph = model.graph
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    if mask is None:
        return False
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    builder = _Builder(model)
    zeros = builder.add("ConstantOfShape", [builder.add("Shape", [ids])], value=ir.tensor(np.zeros(1, np.int64)))
    fixed = zeros if mode == "none" else _with_first(builder, zeros)
    fixed.shape = mask.shape
    fixed.dtype = ir.DataType.INT64
    ir.convenience.replace_all_uses_with(mask, fixed)
    graph.inputs.remove(mask)
    if not adds_globals:
        branches = [branch for node in graph if str(node.name).endswith(GLOBAL_ROWS) for branch in _branches(node)]
        freeze_slots(model, 1)
        for node in (node for branch in branches for node in branch):  # of the branch that is not taken
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)  # else its weights count as used
        if mode == "none":
            _remove_global_attention(model)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return True


def _with_first(builder: _Builder, zeros: ir.Value) -> ir.Value:
    """Return a mask of ones in the first column of `zeros`, whose last axis is the sequence."""
    start, one, end, last = (builder.constant([number]) for number in (0, 1, np.iinfo(np.int64).max, -1))
    first = builder.add("Slice", [zeros, start, one, last])
    rest = builder.add("Slice", [zeros, one, end, last])
    return builder.add("Concat", [builder.add("Add", [first, one]), rest], axis=-1)


def _branches(node: ir.Node) -> tuple[ir.Graph, ir.Graph]:
    return node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


def _remove_global_attention(model: ir.Model) -> None:
    """Give each BandedAttention one unused slot, so that the nodes and weights of the global attention are unused.

    An inlined graph has no such nodes, and keeps its global attention, over one unused slot.
    """
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain != DOMAIN or node.op_type != "BandedAttention":
            continue
        query, graph = node.inputs[0], node.graph
        if query is None or query.dtype is None or graph is not model.graph:
            continue
        builder = _Builder(model, before=node)
        batch, width = (builder.add("Shape", [query], start=axis, end=axis + 1) for axis in (0, 2))
        one = builder.constant([1])
        slots = builder.add("Concat", [batch, one], axis=0)
        index = builder.add("ConstantOfShape", [slots], value=ir.tensor(np.array([-1], np.int32)))
        shape = builder.add("Concat", [batch, one, width], axis=0)
        zero = ir.tensor(np.zeros(1, query.dtype.numpy()), dtype=query.dtype)
        node.replace_input_with(_INDEX, index)
        node.replace_input_with(_CONTEXT, builder.add("ConstantOfShape", [shape], value=zero))


class _Builder:
    """Adds nodes to the main graph, at its start or before a node, with names that no other value has."""

    def __init__(self, model: ir.Model, before: ir.Node | None = None) -> None:
        self._graph, self._before = model.graph, before
        self._prefix = _MASK if before is None else str(before.name)
        self._count = 0

    def add(self, op_type: str, inputs: list[ir.Value], **attributes: int | ir.TensorProtocol) -> ir.Value:
        """Add a node with one output, and return it."""
        node = ir.node(op_type, inputs, attributes=attributes, name=self._name(op_type))
        node.outputs[0].name = f"{node.name}_output"
        if self._before is not None:
            self._graph.insert_before(self._before, node)
        else:
            self._graph.append(node)  # sorted at the end of the pass
        return node.outputs[0]

    def constant(self, numbers: list[int]) -> ir.Value:
        """Add an initializer of int64 numbers."""
        name = self._name("constant")
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _name(self, label: str) -> str:
        self._count += 1
        return f"{self._prefix}/fixed/{label}_{self._count}"
