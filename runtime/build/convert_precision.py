"""Converts a float32 graph to a strongly typed float16 or bfloat16 graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lfx.errors import BuildError
from lfx.runtime.build.from_integers import nodes_from_integers
from lfx.signature import IN_FLOAT32

DTYPES: dict[str, tuple[ir.DataType, Any]] = {
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}
# Absolute value from which a float32 constant is a mask fill value. LED's decoder has half the lowest float32.
MIN_FILL = 1.7e38
MAX_FINITE = {"fp16": 65504.0, "bf16": 2.0**127 * (2 - 2.0**-7)}


def convert(
    model: ir.Model,
    precision: str,
    halves: frozenset[str] = frozenset(),
    exact: frozenset[ir.Node] = frozenset(),
) -> None:
    """Convert a float32 graph in place to a strongly typed float16 or bfloat16 graph.

    Weights, constants and activations change their dtype. Inputs and outputs stay float32. Values computed from
    integers and constants alone, such as sines of positions, stay float32 until a node combines them with a converted
    value, and so does the pooling of sentence embeddings. LayerNormalization still reduces in float32, by its
    stash_type, and so does the softmax of the attention ops.

    Args:
        halves: names of float32 inputs and outputs that become float16, such as cached keys and values.
        exact: nodes that stay float32 with their constants as they are; see `masked_softmax`.
    Raises:
        BuildError: a weight is above the largest finite value of the dtype.
    """
    dtype, numpy_dtype = DTYPES[precision]
    pooling = {node for node in model.graph if str(node.name).endswith(IN_FLOAT32)}
    in_float32 = nodes_from_integers(model) | pooling
    kept = _keep_constants(model, in_float32 - exact, precision) | _keep_constants(model, set(exact), None)
    in_float32 |= exact
    kept |= {output for node in in_float32 for output in node.outputs}
    _convert_weights(model, kept, precision)
    outputs = set(model.graph.outputs)
    for node in all_nodes(model):
        if node not in in_float32:
            _convert_attributes(node, dtype, numpy_dtype)
    for value in values_of(model):
        if value.dtype == ir.DataType.FLOAT and value not in kept:
            value.dtype = dtype
    for node in in_float32:
        _cast_results(model, node, in_float32, dtype)
    _cast_inputs(model, pooling | exact, dtype)
    _convert_inputs(model, dtype, halves)
    for i, output in enumerate(list(model.graph.outputs)):
        if output in outputs and output.dtype == dtype and output.name not in halves:
            model.graph.outputs[i] = _cast_output(model, output, ir.DataType.FLOAT)


def _convert_attributes(node: ir.Node, dtype: ir.DataType, numpy_dtype: Any) -> None:
    """Convert the constant of a node, or the dtype of a Cast."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    if node.op_type in ("Constant", "ConstantOfShape"):
        tensor = _value_of(node)
        if tensor is not None and tensor.dtype == np.float32:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.astype(numpy_dtype), dtype=dtype))


def _convert_inputs(model: ir.Model, dtype: ir.DataType, halves: frozenset[str]) -> None:
    """Make float32 inputs float16 if they are in `halves`, and cast the others for the nodes that read them."""
    for value in [value for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT]:
        if value.name in halves:
            value.dtype = ir.DataType.FLOAT16
            continue
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{value.name}/Cast")
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = f"{value.name}/{dtype}", dtype, value.shape
        readers = [use for use in value.uses() if use.node is not cast and use.node.op_type != "Shape"]
        model.graph.insert_before(model.graph[0], cast)
        for reader, index in readers:
            reader.replace_input_with(index, cast.outputs[0])


def masked_softmax(model: ir.Model) -> frozenset[ir.Node]:
    """The nodes that add a mask to scores, with those that make the mask, and the softmax of the sum.

    LED's decoder computes them in float32 in any precision: a float16 fill value is too small to hide the scores.
    """
    nodes: set[ir.Node] = set()
    for softmax in (node for node in model.graph if node.op_type == "Softmax"):
        add = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
        masks = [value.producer() for value in add.inputs if value is not None] if add is not None else []
        masks = [mask for mask in masks if mask is not None and mask.op_type == "Where"]
        if add is not None and add.op_type == "Add" and masks:
            nodes |= {softmax, add}
            waiting = [mask for mask in masks if mask is not None]
            while waiting:
                node = waiting.pop()
                nodes.add(node)
                floats = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
                waiting += [producer for value in floats if (producer := value.producer()) is not None]
    return frozenset(nodes)


def _convert_weights(model: ir.Model, kept: set[ir.Value], precision: str) -> None:
    dtype, numpy_dtype = DTYPES[precision]
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value not in kept:
            array = value.const_value.numpy()
            size = np.abs(array)
            # A mask fill value is scaled to the range of the dtype; a weight never is.
            too_large = size[(size > MAX_FINITE[precision]) & (size < MIN_FILL)]
            if too_large.size:
                raise BuildError(
                    f"the weight {value.name} holds {too_large.max():.3g}, which {precision} cannot represent"
                )
            value.const_value = ir.tensor(_fit_fill(array, precision).astype(numpy_dtype), dtype=dtype, name=value.name)


def _fit_fill(array: np.ndarray, precision: str) -> np.ndarray:
    """Scale mask fill values, the lowest float32 or half of it, to the lowest value of the precision, or half of it."""
    is_fill = (np.abs(array) >= MIN_FILL) & np.isfinite(array)
    scale = MAX_FINITE[precision] / float(np.finfo(np.float32).max)
    return np.where(is_fill, array.astype(np.float64) * scale, array).astype(np.float32)


def _keep_constants(model: ir.Model, in_float32: set[ir.Node], precision: str | None) -> set[ir.Value]:
    """Give nodes that stay in float32 float32 constants of their own, and return these constants.

    Args:
        precision: that mask fill values are scaled to; None = they are not.
    """
    kept = set()
    for value in list(model.graph.initializers.values()):
        readers = [use for use in value.uses() if use.node in in_float32]
        if not readers or value.dtype != ir.DataType.FLOAT or value.const_value is None:
            continue
        array = value.const_value.numpy()
        if precision is None:
            constant = add_constant(model, f"{value.name}/exact", array)
        else:
            constant = add_constant(model, f"{value.name}/float32", _fit_fill(array, precision))
        for reader, index in readers:
            reader.replace_input_with(index, constant)
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[str(value.name)]
        kept.add(constant)
    return kept


def _cast_results(model: ir.Model, node: ir.Node, in_float32: set[ir.Node], dtype: ir.DataType) -> None:
    """Cast the results of a node that stays in float32 for the nodes of `dtype`, and for the end of a subgraph."""
    for value in node.outputs:
        graph = node.graph
        readers = [use for use in value.uses() if use.node not in in_float32]
        ends = value.is_graph_output() and graph is not model.graph
        if value.dtype != ir.DataType.FLOAT or graph is None or not (readers or ends):
            continue
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{node.name}/{value.name}/Cast")
        cast.outputs[0].name, cast.outputs[0].dtype = f"{value.name}/{dtype}", dtype
        cast.outputs[0].shape = value.shape
        graph.insert_after(node, cast)
        for reader, index in readers:
            reader.replace_input_with(index, cast.outputs[0])
        if ends:
            graph.outputs[:] = [cast.outputs[0] if output is value else output for output in graph.outputs]


def _cast_inputs(model: ir.Model, nodes: set[ir.Node], dtype: ir.DataType) -> None:
    """Cast the values of `dtype` that nodes in float32 read, each once, where it is computed."""
    values = {value for node in nodes for value in node.inputs if value is not None and value.dtype == dtype}
    for value in values:
        producer = value.producer()
        assert producer is not None  # a constant is in float32 already
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{value.name}/Cast")
        cast.outputs[0].name, cast.outputs[0].dtype = f"{value.name}/{ir.DataType.FLOAT}", ir.DataType.FLOAT
        cast.outputs[0].shape = value.shape
        model.graph.insert_after(producer, cast)
        for reader, index in list(value.uses()):
            if reader in nodes:
                reader.replace_input_with(index, cast.outputs[0])


def _value_of(node: ir.Node) -> np.ndarray | None:
    """The float value of a Constant, or of a ConstantOfShape, whose default is a float32 zero."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_float", "value_floats"):
            return np.array(attribute.value, np.float32)
    return np.zeros(1, np.float32) if node.op_type == "ConstantOfShape" else None


def cast_outputs(model: ir.Model, halves: frozenset[str]) -> None:
    """Cast the float32 outputs that are to be float16."""
    for i, output in enumerate(list(model.graph.outputs)):
        if output.name in halves and output.dtype == ir.DataType.FLOAT:
            model.graph.outputs[i] = _cast_output(model, output, ir.DataType.FLOAT16)


def _cast_output(model: ir.Model, output: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Append a Cast to a graph output; the result has the output's name."""
    name = output.name
    output.name = f"{name}/{output.dtype}"
    cast = ir.Node("", "Cast", [output], [ir.AttrInt64("to", int(dtype))], name=f"{output.name}/Cast")
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, output.shape
    model.graph.append(cast)
    return result


def add_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the graph and of its subgraphs."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers and all outputs of nodes."""
    yield from model.graph.initializers.values()
    for node in all_nodes(model):
        yield from node.outputs
