"""Graph pass: give Constant nodes the attribute `value` (a tensor), which all tools read with the same dtype."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

# onnxslim, `polygraphy surgeon sanitize` and ONNX Runtime's float16 converter read the last two as float64.
_DTYPES = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}


def make_constants_tensors(graph: ir.Graph | ir.Function) -> bool:
    """Convert the attribute of each Constant to a tensor, unless it refers to an attribute of its function.

    Returns:
        Whether the graph was changed.
    """
    changed = False
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        (attribute,) = node.attributes.values()
        dtype = _DTYPES.get(attribute.name)
        if dtype is None or attribute.is_ref():
            continue
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array(attribute.value, dtype)))
        changed = True
    return changed
