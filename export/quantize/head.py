"""The head of a decoder that is tied to its embeddings: finding it, and giving it a weight that can be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import helper, numpy_helper

HEAD = "lm_head"  # name of the module, whose weight has the name of the embeddings


def tied_head(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, str] | None:
    """Return the Gemm node that reads the weight of an embedding, as the exporter writes a tied head.

    Returns:
        The node, and the name of the module of the embedding; None if there is no tied head.
    """
    weights = {tensor.name for tensor in graph.initializer}
    modules = {node.input[0]: node.name.rpartition("/")[0] for node in graph.node if node.op_type == "Gather"}
    for node in graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights & modules.keys():
            return node, modules[node.input[1]]
    return None


def separate_head(path: Path, layers: Mapping[str, str]) -> None:
    """Give a tied head that is quantized a weight of its own, in a MatMul of three axes as other linear layers have.

    The embeddings stay float32: the quantizer would give both readers of one weight its int8 values. ONNX Runtime has
    no int8 kernel for Gemm with a float32 output, which it also makes of a MatMul of two axes and an Add.

    Args:
        path: an ONNX file with its weights beside it. A file with the weight of the head is added there.
        layers: node name -> module name. The MatMul gets the name of the Gemm.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    tied = tied_head(graph)
    if tied is None or tied[0].name not in layers:
        return
    head = tied[0]
    flat = next(node for node in graph.node if node.output[0] == head.input[0])  # (batch · tokens, hidden)
    logits = next(node for node in graph.node if node.input[:1] == head.output[:1])  # (batch, tokens, vocabulary)
    weight = _add_transposed(graph, head.input[1], path)
    product = f"{HEAD}/MatMul_output"
    matmul = helper.make_node("MatMul", [flat.input[0], weight], [product], head.name)
    add = helper.make_node("Add", [product, head.input[2]], [logits.output[0]], f"{HEAD}/Add")
    kept = [node for node in graph.node if node not in (flat, head, logits)]
    del graph.node[:]
    graph.node.extend([*kept, matmul, add])
    _remove_unused(graph)
    onnx.save(model, str(path))


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that nothing reads. The graph has no subgraphs."""
    read = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):  # readers come after what they read
        if read.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            read.update(node.input)
    for tensor in list(graph.initializer):
        if tensor.name not in read:
            graph.initializer.remove(tensor)


def _add_transposed(graph: onnx.GraphProto, name: str, path: Path) -> str:
    """Add the transpose of a weight, in a file of its own; returns its name."""
    weight = onnx.TensorProto()
    weight.CopyFrom(next(tensor for tensor in graph.initializer if tensor.name == name))
    values = numpy_helper.to_array(weight, str(path.parent)).T
    file = path.with_name(f"{HEAD}.data")
    file.write_bytes(values.tobytes())
    own = graph.initializer.add(name=f"{HEAD}.weight.T", data_type=weight.data_type, dims=values.shape)
    own.data_location = onnx.TensorProto.EXTERNAL
    own.external_data.add(key="location", value=file.name)
    return str(own.name)
