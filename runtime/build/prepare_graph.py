"""From a bundle's graph to one that TensorRT takes: constant global slots, another precision, plugin attributes."""

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
from lfx.runtime.plugin import HEAD_SIZE_MULTIPLE, NAMESPACE, VERSION
from lfx.signature import GLOBAL_ROWS, GLOBAL_SLOTS, Signature

DOMAIN = "lfx"
DTYPES: dict[str, tuple[ir.DataType, Any]] = {
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}
HIDES = 3.4e38
LARGEST = {"fp16": 65504.0, "bf16": 2.0**127 * (2 - 2.0**-7)}


def prepare_graph(
    source: Path, target: Path, manifest: Manifest, signature: Signature, slots: int, plugin: bool
) -> int:
    """Write the graph that TensorRT gets; returns the number of its attention nodes."""
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
    if plugin:
        name_plugins(model)
    else:
        inline_functions(model)
    model.metadata_props["lfx"] = json.dumps(signature.to_dict())
    ir.save(model, target, external_data=target.name + ".data", size_threshold_bytes=1024)
    return nodes


def _check_heads(nodes: Sequence[Any]) -> None:
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
    """The nodes of domain lfx, in order."""
    return [node for node in _all_nodes(model) if node.domain == DOMAIN]


def freeze_slots(model: ir.Model, slots: int) -> None:
    """Give the graph a constant number of global slots, and the global rows in the form that is cheaper for it.

    TensorRT sizes tensors before it sees data, so K of the TopK that lists the global tokens cannot come from the mask.
    A graph that was exported with a constant number is left as it is.
    """
    listing = [node for node in model.graph if str(node.name).endswith(GLOBAL_SLOTS)]
    counted = [node for node in listing if _constant(node.inputs[1]) is None]
    for node in counted:
        flags = node.inputs[0]
        assert flags is not None and flags.dtype is not None
        # A sequence may have fewer tokens than there are slots, and TopK takes no K above the length of its input.
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
        if value.shape is not None and any(str(axis) == "global_slots" for axis in value.shape):
            sizes = [slots if str(axis) == "global_slots" else axis for axis in value.shape]
            value.shape = ir.Shape(sizes)


def _inline_branch(model: ir.Model, node: ir.Node, slots: int) -> None:
    """The exporter's own `If` asks whether there are fewer slots than a head has columns."""
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
    """Turn a float32 graph into a strongly typed float16 or bfloat16 one, in place.

    Weights, constants and all arithmetic change type. LayerNormalization sums in float32 by its stash_type, and the
    attention ops keep their softmax in float32 whatever the type. Outputs stay float32.

    Raises:
        BuildError: a weight that the type cannot hold.
    """
    dtype, numpy_dtype = DTYPES[precision]
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            array = value.const_value.numpy()
            size = np.abs(array)
            # The lowest float32 hides a score, and may be the lowest number of the type; no other may change so much.
            too_large = size[(size > LARGEST[precision]) & (size < HIDES)]
            if too_large.size:
                raise BuildError(f"the weight {value.name} holds {too_large.max():.3g}, which {precision} cannot")
            small = np.clip(array, -LARGEST[precision], LARGEST[precision]).astype(numpy_dtype)
            value.const_value = ir.tensor(small, dtype=dtype, name=value.name)
    outputs = set(model.graph.outputs)
    for node in _all_nodes(model):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(dtype))
        if node.op_type in ("Constant", "ConstantOfShape"):
            tensor = _value_of(node)
            if tensor is not None and tensor.dtype == np.float32:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.astype(numpy_dtype), dtype=dtype))
    for value in _values(model):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = dtype
    for i, output in enumerate(list(model.graph.outputs)):
        if output in outputs and output.dtype == dtype:
            model.graph.outputs[i] = _cast_to_float(model, output)


def _value_of(node: ir.Node) -> np.ndarray | None:
    """The value of a Constant or ConstantOfShape, whose default is one float32 zero."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_float", "value_floats"):
            return np.array(attribute.value, np.float32)
    return np.zeros(1, np.float32) if node.op_type == "ConstantOfShape" else None


def _cast_to_float(model: ir.Model, output: ir.Value) -> ir.Value:
    name = output.name
    output.name = f"{name}/{output.dtype}"
    cast = ir.Node("", "Cast", [output], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{name}/Cast")
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, ir.DataType.FLOAT, output.shape
    model.graph.append(cast)
    return result


def inline_functions(model: ir.Model) -> None:
    """Put the function bodies in the places of the attention nodes, every node under a name of its own."""
    common.InlinePass()(model)
    for i, node in enumerate(_all_nodes(model)):
        node.name = f"{node.name or node.op_type}#{i}"


def name_plugins(model: ir.Model) -> None:
    """Say on each attention node which plugin it is: TensorRT's parser then takes that, and not the function."""
    for node in attention_nodes(model):
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", VERSION)
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", NAMESPACE)
    for function in model.functions.values():
        for name in ("plugin_version", "plugin_namespace"):
            function.attributes[name] = ir.Attr(name, ir.AttributeType.STRING, None)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _add_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.initializers.values()
    for node in _all_nodes(model):
        yield from node.outputs
