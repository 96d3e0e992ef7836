"""Finds the nodes of a graph that compute with integers as floats, such as positions, which float16 would round."""

from __future__ import annotations

import onnx_ir as ir

# These depend on sizes only, or fill a tensor with a constant.
_CONSTANT_OPS = ("Shape", "Size", "ConstantOfShape")


def nodes_from_integers(model: ir.Model) -> set[ir.Node]:
    """Return the nodes whose floats are computed from integers and constants alone, and the nodes of those constants.

    An integer becomes a float in a Cast. The nodes of domain lfx and those with subgraphs are never among them.
    """
    constants: set[ir.Value] = set(model.graph.initializers.values())
    from_integers: set[ir.Value] = set()
    chosen: set[ir.Node] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        inputs = [value for value in node.inputs if value is not None]
        floats = [value for value in inputs if value.dtype == ir.DataType.FLOAT]
        if node.domain != "" or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            continue
        if _casts_integer(node) or (
            not from_integers.isdisjoint(floats) and all(v in from_integers or v in constants for v in floats)
        ):
            from_integers.update(node.outputs)
            chosen.add(node)
        elif node.op_type in _CONSTANT_OPS or all(value in constants for value in inputs):
            constants.update(node.outputs)
    waiting = list(chosen)
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
            if producer is not None and producer not in chosen:
                chosen.add(producer)
                waiting.append(producer)
    return chosen


def _casts_integer(node: ir.Node) -> bool:
    if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.FLOAT:
        return False
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    return dtype is not None and not dtype.is_floating_point()
