"""Prepares a bundle's graph for TensorRT: constant number of global slots, precision, plugin attributes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lfx.errors import ArtifactError, BuildError, one_line
from lfx.manifest import Manifest
from lfx.runtime.build.convert_precision import (
    add_constant,
    all_nodes,
    cast_outputs,
    convert,
    masked_softmax,
    values_of,
)
from lfx.runtime.plugin import HEAD_SIZE_MULTIPLE, NAMESPACE, VERSION
from lfx.signature import GLOBAL_ROWS, GLOBAL_SLOTS, Signature, TensorSpec

DOMAIN = "lfx"


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
    model = _load(source)
    freeze_slots(model, slots)
    nodes = len(attention_nodes(model))
    if plugin and nodes == 0:
        raise BuildError("the bundle's functions are inlined, so it has no attention nodes; build with --no-plugin")
    if plugin:
        _check_heads(attention_nodes(model))
    _set_precision(model, manifest, signature, signature.inputs, signature.outputs)
    if plugin:
        name_plugins(model)
    else:
        inline_functions(model)
    _save(model, target, signature)
    return nodes


def prepare_decoder(source: Path, target: Path, manifest: Manifest, signature: Signature) -> None:
    """Write the decoder's graph that TensorRT builds from; it has no attention nodes.

    Args:
        source: the decoder's ONNX file. target, manifest, signature: see `prepare_graph`.
    Raises:
        ArtifactError: the ONNX file cannot be read.
        BuildError: the precision does not support the model.
    """
    decoder = signature.decoder
    assert decoder is not None
    model = _load(source)
    _set_precision(model, manifest, signature, decoder.inputs, decoder.outputs, masked_softmax(model))
    inline_functions(model)
    _save(model, target, signature)


def _load(source: Path) -> ir.Model:
    try:
        return ir.load(source)
    except Exception as error:
        raise ArtifactError(f"{source} cannot be read: {one_line(error)}; export the model again") from error


def _set_precision(
    model: ir.Model,
    manifest: Manifest,
    signature: Signature,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    exact: frozenset[ir.Node] = frozenset(),
) -> None:
    """Convert a graph to the plan's precision, and its outputs to the dtypes of their specs."""
    if signature.precision != manifest.signature.precision:
        convert(model, signature.precision, _halves(inputs) | _halves(outputs), exact)
    cast_outputs(model, _halves(outputs))


def _halves(specs: Sequence[TensorSpec]) -> frozenset[str]:
    return frozenset(spec.name for spec in specs if spec.dtype == "float16")


def _save(model: ir.Model, target: Path, signature: Signature) -> None:
    model.metadata_props["lfx"] = json.dumps(signature.to_dict())
    ir.save(model, target, external_data=target.name + ".data", size_threshold_bytes=1024)


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
    return [node for node in all_nodes(model) if node.domain == DOMAIN]


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
        pads = add_constant(model, f"{node.name}/pads", np.array([0, 0, 0, slots], np.int64))
        padded = ir.Node("", "Pad", [flags, pads], name=f"{node.name}/Pad", num_outputs=1)
        padded.outputs[0].name = f"{node.name}/Pad_output"
        padded.outputs[0].dtype = flags.dtype
        model.graph.insert_before(node, padded)
        node.replace_input_with(0, padded.outputs[0])
        node.replace_input_with(1, add_constant(model, f"{node.name}/slots", np.array([slots], np.int64)))
    for node in [node for node in model.graph if str(node.name).endswith(GLOBAL_ROWS)]:
        _inline_branch(model, node, slots)
    common.RemoveUnusedNodesPass()(model)
    for value in values_of(model):
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


def inline_functions(model: ir.Model) -> None:
    """Inline the function bodies of the attention nodes, and give all nodes unique names."""
    common.InlinePass()(model)
    for i, node in enumerate(all_nodes(model)):
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
