"""Choosing the MatMul nodes to quantize, changing the quantized graph so that only they read int8, and its weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lfx.errors import ExportError
from lfx.export.quantize.head import HEAD, tied_head
from lfx.export.shared_weights import LEAST_BYTES, save_models
from lfx.manifest import WEIGHTS
from lfx.signature import Signature

# Not quantized: it projects the global tokens only, a few rows, so int8 saves no time.
_GLOBAL_QUERY = "*query_global"


def linear_layers(model: onnx.ModelProto, keep_float: Sequence[str]) -> dict[str, str]:
    """List the MatMul nodes of the torch.nn.Linear modules that are quantized.

    The exporter names the node MODULE/MatMul and the weight MODULE.weight.T. A weight that is tied to an embedding has
    the embedding's name and is not quantized, except in the head of a decoder, a Gemm, which gets a copy. A module that
    is called several times is not quantized: its inputs have several ranges, but it would get one scale.

    Args:
        keep_float: patterns of module names that stay float32. A tied head has the name of its embedding too.
    Returns:
        Node name -> module name.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    candidates = []
    for node in model.graph.node:
        name = node.name.rpartition("/")[0]
        weight = f"{name}.weight.T"
        is_linear = node.op_type == "MatMul" and node.input[1] == weight and weight in initializers
        if is_linear and not any(fnmatch(name, pattern) for pattern in (_GLOBAL_QUERY, *keep_float)):
            candidates.append((node.name, name))
    if (tied := tied_head(model.graph)) is not None:
        head, embedding = tied
        if not any(fnmatch(name, pattern) for name in (HEAD, embedding) for pattern in keep_float):
            candidates.append((head.name, HEAD))
    calls = Counter(name for _, name in candidates)
    return {node: name for node, name in candidates if calls[name] == 1}


def finalize_quantized(path: Path, signature: Signature, layers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Rewrite the quantizer's file: only the layers read int8 values, and the metadata holds the signature.

    Args:
        layers: node name -> module name.
    Returns:
        Module name -> {"scale", "zero_point"} of the layer's input.
    Raises:
        ExportError: the quantizer did not quantize a layer.
    """
    model = onnx.load(str(path), load_external_data=False)
    _quantize_layers_only(model, layers)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"lfx": json.dumps(signature.to_dict())})
    onnx.save(model, str(path))
    values = {t.name: t for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    scales = {}
    for node in model.graph.node:
        if node.name in layers:
            source, weight = producers.get(node.input[0]), producers.get(node.input[1])
            if source is None or weight is None or {source.op_type, weight.op_type} != {"DequantizeLinear"}:
                raise ExportError(f"ONNX Runtime's quantizer did not quantize {layers[node.name]}; please report this")
            scale, zero_point = (onnx.numpy_helper.to_array(values[name]) for name in source.input[1:3])
            scales[layers[node.name]] = {"scale": float(scale), "zero_point": int(zero_point)}
    return scales


def join_weights(files: Mapping[str, Path], folder: Path) -> None:
    """Write ONNX files into a folder, with one file of weights that holds weights of equal content once.

    Args:
        files: name of the new file -> the ONNX file, with its weights beside it.
    """
    models = {name: ir.load(path) for name, path in files.items()}
    stored: dict[tuple[Any, ...], ir.TensorProtocol] = {}
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.nbytes < LEAST_BYTES:
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
            else:
                content = hashlib.sha256(tensor.tobytes()).digest()
                key = (tensor.dtype, tuple(tensor.shape), content)
                value.const_value = stored.setdefault(key, tensor)
    save_models(models, folder, WEIGHTS)


def _quantize_layers_only(model: onnx.ModelProto, layers: Mapping[str, str]) -> None:
    """Connect all readers of a quantized tensor, except the layers, to the float32 tensor before QuantizeLinear.

    The quantizer inserts QuantizeLinear and DequantizeLinear for all readers of a tensor: residuals, global rows and
    graph outputs too.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    originals: dict[str, str] = {}  # output of DequantizeLinear -> input of QuantizeLinear
    for node in model.graph.node:
        source = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            originals[node.output[0]] = source.input[0]
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or node.name in layers:
            continue
        _rename_node_inputs(node, originals)
    for name in outputs & originals.keys():  # the quantizer gave the graph output's name to the dequantized tensor
        renamed = {name: f"{name}/dequantized", originals[name]: name}
        for node in model.graph.node:
            for i, output in enumerate(node.output):
                node.output[i] = renamed.get(output, output)
        _rename_graph_inputs(model.graph, renamed)


def _rename_graph_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        _rename_node_inputs(node, names)


def _rename_node_inputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Rename the inputs of a node, and inside its subgraphs, which may read tensors of the outer graph."""
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _rename_graph_inputs(attribute.g, names)
