"""Which nodes are quantized, and the graph after ONNX Runtime's quantizer: rounding for the products alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import onnx

from lfx.errors import ExportError
from lfx.signature import Signature

# Rows of these are few: the global tokens' own queries.
_FEW_ROWS = "*query_global"


def linear_layers(model: onnx.ModelProto, keep_float: Sequence[str]) -> dict[str, str]:
    """Node name -> module name, of every torch.nn.Linear that is called once and is not to stay float32.

    The exporter names the node MODULE/MatMul and the weight MODULE.weight.T; a weight that is tied to an embedding has
    the embedding's name, and stays. A module that is called several times has inputs of several ranges.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        name = node.name.rpartition("/")[0]
        kept = any(fnmatch(name, pattern) for pattern in (_FEW_ROWS, *keep_float))
        if node.op_type == "MatMul" and node.input[1] == f"{name}.weight.T" and node.input[1] in constants and not kept:
            found.append((node.name, name))
    calls = Counter(name for _, name in found)
    return {node: name for node, name in found if calls[name] == 1}


def finalize(path: Path, signature: Signature, layers: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Write the signature into the file; returns scale and zero point of each layer's input."""
    model = onnx.load(str(path), load_external_data=False)
    _round_for_products_only(model, layers)
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
                raise ExportError(f"ONNX Runtime's quantizer left {layers[node.name]} as it was; please report this")
            scale, zero = (onnx.numpy_helper.to_array(values[name]) for name in source.input[1:3])
            scales[layers[node.name]] = {"scale": float(scale), "zero_point": int(zero)}
    return scales


def _round_for_products_only(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    """Give residuals, global rows and outputs the tensor in front of its rounding.

    The quantizer puts QuantizeLinear and DequantizeLinear on a tensor for everything that reads it.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    rounded: dict[str, str] = {}
    for node in model.graph.node:
        source = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            rounded[node.output[0]] = source.input[0]
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or node.name in layers:
            continue
        _rename_inputs_of(node, rounded)
    for name in outputs & rounded.keys():  # the quantizer gave the output's name to the rounded tensor
        exact, inner = rounded[name], f"{name}/rounded"
        renamed = {name: inner, exact: name}
        for node in model.graph.node:
            for i, found in enumerate(node.output):
                node.output[i] = renamed.get(found, found)
        _rename_inputs(model.graph, renamed)


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        _rename_inputs_of(node, names)


def _rename_inputs_of(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Of the branches of an If too, which read the tensors around them."""
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _rename_inputs(attribute.g, names)
