"""Prepares a bundle's graph for TensorRT: constant number of global slots, precision, plugin attributes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lfx.errors import ArtifactError, BuildError, one_line
from lfx.manifest import Manifest
from lfx.runtime.build.from_integers import nodes_from_integers
from lfx.runtime.plugin import HEAD_SIZE_MULTIPLE, NAMESPACE, VERSION
from lfx.signature import GLOBAL_ROWS, GLOBAL_SLOTS, IN_FLOAT32, Signature

DOMAIN = "lfx"
DTYPES: dict[str, tuple[ir.DataType, Any]] = {
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}
MIN_FILL = 3.4e38  # absolute value from which a float32 constant is a mask fill value
MAX_FINITE = {"fp16": 65504.0, "bf16": 2.0**127 * (2 - 2.0**-7)}


def prepare_graph(
    source: Path, target: Path, manifest: Manifest, signature: Signature, slots: int, plugin: bool
) -> int:
    """Write the graph that TensorRT builds from.

    Args:
        source: the bundle's ONNX file. target: path of the prepared graph; its weights are written beside it.
        manifest: the bundle's manifest. signature: the plan's signature.
        slots: number of global slots.
        plugin: whether attention nodes become plugin layers; otherwise their function bodies are inlined.
    Returns:
        The number of attention nodes.
    Raises:
        ArtifactError: the bundle's ONNX file cannot be read.
        BuildError: the plugin, the precision or TensorRT does not support the model.
    """
    try:
        model = ir.load(source)
    except Exception as error:
        raise ArtifactError(f"{source} cannot be read: {one_line(error)}; export the model again") from error
    freeze_slots(model, slots)
    nodes = len(attention_nodes(model))
    if plugin and nodes == 0:
        raise BuildError("the bundle's functions are inlined, so it has no attention nodes; build with --no-plugin")
    if plugin:
        _check_heads(attention_nodes(model))
    if signature.precision != manifest.signature.precision:
        convert(model, signature.precision)
    _cast_outputs(model, signature)
    if plugin:
        name_plugins(model)
    else:
        inline_functions(model)
    model.metadata_props["lfx"] = json.dumps(signature.to_dict())
    ir.save(model, target, external_data=target.name + ".data", size_threshold_bytes=1024)
    return nodes


def _check_heads(nodes: Sequence[Any]) -> None:
    """Raise BuildError for a head size that the plugin does not support."""
    for node in nodes:
        width = node.inputs[0].shape[2] if node.inputs[0].shape is not None else None
        if isinstance(width, int):
            head_size = width // node.attributes["num_heads"].as_int()
            largest = 128 if node.op_type == "BandedAttention" else 1024
            if head_size % HEAD_SIZE_MULTIPLE or head_size > largest:
                raise BuildError(
                    f"{node.name} has head size {head_size}; the plugin takes multiples of "
                    f"{HEAD_SIZE_MULTIPLE} up to {largest}: build with --no-plugin"
                )


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of domain lfx, in the order of the graph."""
    return [node for node in _all_nodes(model) if node.domain == DOMAIN]


def freeze_slots(model: ir.Model, slots: int) -> None:
    """Make the number of global slots constant, and inline the cheaper branch of each If on that number.

    TensorRT needs tensor sizes that do not depend on data, so K of the TopK that lists the global tokens must not be
    computed from the mask. The TopK of a graph that was exported with a constant K is not changed.
    """
    topk_nodes = [node for node in model.graph if str(node.name).endswith(GLOBAL_SLOTS)]
    for node in [node for node in topk_nodes if _constant(node.inputs[1]) is None]:
        flags = node.inputs[0]
        assert flags is not None and flags.dtype is not None
        # TopK takes no K above the length of its input, and a sequence may have fewer tokens than there are slots.
        pads = _add_constant(model, f"{node.name}/pads", np.array([0, 0, 0, slots], np.int64))
        padded = ir.Node("", "Pad", [flags, pads], name=f"{node.name}/Pad", num_outputs=1)
        padded.outputs[0].name = f"{node.name}/Pad_output"
        padded.outputs[0].dtype = flags.dtype
        model.graph.insert_before(node, padded)
        node.replace_input_with(0, padded.outputs[0])
        node.replace_input_with(1, _add_constant(model, f"{node.name}/slots", np.array([slots], np.int64)))
    for node in [node for node in model.graph if str(node.name).endswith(GLOBAL_ROWS)]:
        _inline_branch(model, node, slots)
    common.RemoveUnusedNodesPass()(model)
    for value in _values(model):
        if value.shape is not None and any(map(_is_slots, value.shape)):
            sizes = [slots if _is_slots(axis) else axis for axis in value.shape]
            value.shape = ir.Shape(sizes)


def _is_slots(axis: Any) -> bool:
    """Whether an axis is named `global_slots`, or `global_slots_1` and so on."""
    return str(axis).split("_")[:2] == ["global", "slots"]


def _inline_branch(model: ir.Model, node: ir.Node, slots: int) -> None:
    """Replace an If of the exporter, whose condition is `number of slots < head size`, by the branch that is taken."""
    condition = node.inputs[0].producer() if node.inputs[0] is not None else None
    limit = _constant(condition.inputs[1]) if condition is not None and condition.op_type == "Less" else None
    if limit is None:
        raise BuildError(f"{node.name} depends on the data, and TensorRT needs a graph that does not; export again")
    branch = node.attributes["then_branch" if slots < int(limit) else "else_branch"].as_graph()
    results = list(branch.outputs)
    branch.outputs.clear()
    nodes = list(branch)
    branch.remove(nodes)
    model.graph.insert_before(node, nodes)
    for output, result in zip(node.outputs, results, strict=True):
        ir.convenience.replace_all_uses_with(output, result)
    model.graph.remove(node, safe=True)


def convert(model: ir.Model, precision: str) -> None:
    """Convert a float32 graph in place to a strongly typed float16 or bfloat16 graph.

    Weights, constants and activations change their dtype. Outputs stay float32. Values computed from integers and
    constants alone, such as sines of positions, stay float32 until a node combines them with a converted value, and so
    does the pooling of sentence embeddings. LayerNormalization still reduces in float32, by its stash_type, and so does
    the softmax of the attention ops.

    Raises:
        BuildError: a weight is above the largest finite value of the dtype.
    """
    dtype, numpy_dtype = DTYPES[precision]
    pooling = {node for node in model.graph if str(node.name).endswith(IN_FLOAT32)}
    in_float32 = nodes_from_integers(model) | pooling
    kept = _keep_constants(model, in_float32, precision)
    kept |= {output for node in in_float32 for output in node.outputs}
    _convert_weights(model, kept, precision)
    outputs = set(model.graph.outputs)
    for node in _all_nodes(model):
        if node in in_float32:
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        if node.op_type in ("Constant", "ConstantOfShape"):
            tensor = _value_of(node)
            if tensor is not None and tensor.dtype == np.float32:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.astype(numpy_dtype), dtype=dtype))
    for value in _values(model):
        if value.dtype == ir.DataType.FLOAT and value not in kept:
            value.dtype = dtype
    for node in in_float32:
        _cast_results(model, node, in_float32, dtype)
    _cast_inputs(model, pooling, dtype)
    for i, output in enumerate(list(model.graph.outputs)):
        if output in outputs and output.dtype == dtype:
            model.graph.outputs[i] = _cast_output(model, output, ir.DataType.FLOAT)


def _convert_weights(model: ir.Model, kept: set[ir.Value], precision: str) -> None:
    dtype, numpy_dtype = DTYPES[precision]
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value not in kept:
            array = value.const_value.numpy()
            size = np.abs(array)
            # A mask fill value, the lowest float32, is clamped to the lowest value of the dtype; a weight never is.
            too_large = size[(size > MAX_FINITE[precision]) & (size < MIN_FILL)]
            if too_large.size:
                raise BuildError(
                    f"the weight {value.name} holds {too_large.max():.3g}, which {precision} cannot represent"
                )
            clamped = np.clip(array, -MAX_FINITE[precision], MAX_FINITE[precision])
            clamped = np.where(np.isinf(array), array, clamped).astype(numpy_dtype)
            value.const_value = ir.tensor(clamped, dtype=dtype, name=value.name)


def _keep_constants(model: ir.Model, in_float32: set[ir.Node], precision: str) -> set[ir.Value]:
    """Give the nodes that stay in float32 constants in float32, with clamped mask fill values; returns these."""
    kept = set()
    for value in list(model.graph.initializers.values()):
        readers = [use for use in value.uses() if use.node in in_float32]
        if not readers or value.dtype != ir.DataType.FLOAT or value.const_value is None:
            continue
        array = value.const_value.numpy()
        limit = MAX_FINITE[precision]
        is_fill = (np.abs(array) >= MIN_FILL) & np.isfinite(array)
        array = np.where(is_fill, np.clip(array, -limit, limit), array).astype(np.float32)
        constant = _add_constant(model, f"{value.name}/float32", array)
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


def _cast_outputs(model: ir.Model, signature: Signature) -> None:
    """Cast the float32 outputs that are float16 in the signature."""
    halves = {spec.name for spec in signature.outputs if spec.dtype == "float16"}
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


def inline_functions(model: ir.Model) -> None:
    """Inline the function bodies of the attention nodes, and give all nodes unique names."""
    common.InlinePass()(model)
    for i, node in enumerate(_all_nodes(model)):
        node.name = f"{node.name or node.op_type}#{i}"


def name_plugins(model: ir.Model) -> None:
    """Set the plugin's version and namespace on each attention node, so that TensorRT uses the plugin."""
    for node in attention_nodes(model):
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", VERSION)
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", NAMESPACE)
    for function in model.functions.values():
        for name in ("plugin_version", "plugin_namespace"):
            function.attributes[name] = ir.Attr(name, ir.AttributeType.STRING, None)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant value; None if the value depends on data."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _add_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the graph and of its subgraphs."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers and all outputs of nodes."""
    yield from model.graph.initializers.values()
    for node in _all_nodes(model):
        yield from node.outputs
