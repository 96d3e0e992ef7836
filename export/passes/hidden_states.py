"""Graph pass: make the hidden states that a sentence embedding is pooled from an output, as other clients pool them."""

from __future__ import annotations

import onnx_ir as ir

from lfx.export.pooling import IN_FLOAT32_MODULES

_POOLING = IN_FLOAT32_MODULES[0]
_OUTPUT = "last_hidden_state"


def add_hidden_states(model: ir.Model) -> int | None:
    """Add the encoder's result as the first output, last_hidden_state (batch, sequence, hidden) float32.

    Returns:
        The hidden size; None if the graph was not changed, since it has no pooling or such an output already.
    """
    graph = model.graph
    if any(value.name == _OUTPUT for value in graph.outputs):
        return None
    values = {
        value
        for node in graph
        if str(node.name).startswith(_POOLING)
        for value in node.inputs
        if value is not None and _is_encoders(value.producer())
    }
    if len(values) != 1:
        return None
    (hidden,) = values
    width = hidden.shape[-1] if hidden.shape is not None else None
    if not isinstance(width, int):
        return None
    cast = ir.node("Cast", [hidden], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{_OUTPUT}/Cast")
    output = cast.outputs[0]
    output.name, output.dtype = _OUTPUT, ir.DataType.FLOAT
    output.shape = ir.Shape(["batch", "sequence", width])
    graph.append(cast)
    graph.outputs.insert(0, output)
    return width


def _is_encoders(node: ir.Node | None) -> bool:
    """Return whether a node is the last of the encoder, a layer norm."""
    return node is not None and node.op_type == "LayerNormalization" and not str(node.name).startswith(_POOLING)
