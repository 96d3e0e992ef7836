"""Finds the size of a model's vocabulary in its graph."""

from __future__ import annotations

import onnx_ir as ir

# These pass ids on unchanged.
_SAME_IDS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def vocabulary(graph: ir.Model) -> int | None:
    """Return the number of rows of the smallest table that input_ids index; None if there is no such table."""
    ids = [value for value in graph.graph.inputs if value.name == "input_ids"]
    sizes: list[int] = []
    while ids:
        for node, index in ids.pop().uses():
            if node.op_type in _SAME_IDS and index == 0:
                ids.append(node.outputs[0])
            table = node.inputs[0]
            if node.op_type == "Gather" and index == 1 and table is not None and table.shape is not None:
                axis = node.attributes.get_int("axis", 0)
                rows = table.shape[axis]
                sizes += [rows] if isinstance(rows, int) else []
    return min(sizes, default=None)
