"""Adding the context of each attention layer as a graph output, to find the first layer with a wrong result.

The few logits of an int8 classifier cannot show a wrong layer, so an int8 graph gets the output of its last layer too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from lfx.errors import ArtifactError
from lfx.export.functions import DOMAIN
from lfx.files import link_or_copy
from lfx.manifest import MODEL
from lfx.onnx_file import read_header
from lfx.signature import QUANTIZED, Signature, TensorSpec

# Names of the norms at the end of Hugging Face's encoder layers.
LAYER_END = re.compile(r"(?:^|\.)layers?\.\d+\.(?:output\.LayerNorm|final_layer_norm)$")


def layer_name(index: int) -> str:
    """Return the output name of the attention layer `index`, counted from 0."""
    return f"attention_{index}"


def expose_layers(bundle: Path, signature: Signature, folder: Path, model_file: str = MODEL) -> Path:
    """Write the bundle's graph into `folder` with the context of each attention layer as an output.

    Args:
        model_file: path of the ONNX file in the bundle; of a model that writes texts, the encoder's.
    Returns:
        The ONNX file; its weights are links. Layer outputs come first, float32 (rows, sequence, hidden): the contexts,
        and in int8 the output of the last layer, with the name of its module, unless the graph has that output already.
    Raises:
        ArtifactError: the graph has no attention nodes, because its functions are inlined.
    """
    model = onnx.load(str(bundle / model_file), load_external_data=False)
    nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, "BandedAttention")]
    if not nodes:
        raise ArtifactError(
            f"{bundle} has its functions inlined, so it has no attention nodes to compare; export it without "
            "--inline-functions to compare it by layer"
        )
    values = {layer_name(i): context for i, context in enumerate(_contexts(model.graph, nodes))}
    if signature.precision == QUANTIZED:
        values |= _last_layer(model.graph, nodes[-1])
    shape = ("rows", "sequence", "hidden")
    specs = [TensorSpec(name, "float32", shape) for name in values]
    infos = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, shape) for spec in specs]
    for name, value in values.items():
        cast = helper.make_node("Cast", [value], [name], name, to=TensorProto.FLOAT)
        model.graph.node.append(cast)
    outputs = [*infos, *model.graph.output]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    exposed = dataclasses.replace(signature, outputs=(*specs, *signature.outputs))
    graphs = {MODEL: model}
    if signature.decoder is not None:  # which has the signature too
        name = signature.decoder.model_file
        graphs[name] = onnx.load(str((bundle / model_file).with_name(name)), load_external_data=False)
    for name, graph in graphs.items():
        del graph.metadata_props[:]
        helper.set_model_props(graph, {"lfx": json.dumps(exposed.to_dict())})
        onnx.save(graph, str(folder / name))
    for name in read_header(bundle / model_file).weights:
        link_or_copy(bundle / name, folder / name)
    return folder / MODEL


def _contexts(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[str]:
    """Return the name of the context of each attention layer, in order.

    It is the output of the layer's node, or of the Concat that joins the nodes of a layer whose heads have different
    dilations.
    """
    producers = {name: node for node in graph.node for name in node.output}
    attention = {node.output[0]: node for node in nodes}
    joined: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Concat":
            sources = {_unsliced(name, producers) for name in node.input}
            scopes = {_scope(attention[name]) if name in attention else None for name in sources}
            if len(sources) > 1 and scopes == {_scope(node)}:
                joined.update(dict.fromkeys(sources, node.output[0]))
    return list(dict.fromkeys(joined.get(name, name) for name in attention))


def _last_layer(graph: onnx.GraphProto, attention: onnx.NodeProto) -> dict[str, str]:
    """Return the module of the norm at the end of an attention node's layer -> the norm's output.

    It is empty if there is no such norm, or several, or if the output is one of the graph's.
    """
    layer = re.match(r"(?:.+\.)?layers?\.\d+\.", attention.name)
    scopes = [(_scope(node), node.output[0]) for node in graph.node if node.op_type == "LayerNormalization"]
    norms = [norm for norm in scopes if layer and norm[0].startswith(layer[0]) and LAYER_END.search(norm[0])]
    if len(norms) != 1 or norms[0][1] in {output.name for output in graph.output}:
        return {}
    return dict(norms)


def _unsliced(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """Return the name of the value that a value is a slice of."""
    while name in producers and producers[name].op_type == "Slice":
        name = producers[name].input[0]
    return name


def _scope(node: onnx.NodeProto) -> str:
    """Return the path of the torch module that a node was traced from."""
    return str(node.name).rpartition("/")[0]
