"""`merge_cross_attention`: the decoder's graph in the form that optimum and transformers.js read.

Their decoder gets `encoder_hidden_states`, and makes the keys and values of the cross-attention itself when their cache
is empty, at the first step; lfx's encoder makes them. The nodes that make them are moved from the encoder's graph. They
compute the tokens of the encoder that are not cached: all at the first step, none later, and no If is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lfx.errors import ExportError
from lfx.signature import CACHED, HIDDEN_STATES, PAST, PRESENT, Decoder, TensorSpec

DECODER_MERGED = "decoder_model_merged"
_MASK = "encoder_attention_mask"
_NEW = f"sequence - {CACHED}"  # axis of the encoder's tokens that one call adds


def merge_cross_attention(encoder: ir.Model, decoder: ir.Model, spec: Decoder, hidden: TensorSpec) -> Decoder:
    """Give the decoder's graph the nodes that make the keys and values of the cross-attention.

    Args:
        encoder: the encoder's graph, which has them as outputs; its outputs are reduced to the hidden states.
        decoder: the decoder's graph, which is changed.
        spec: of the decoder. hidden: of the encoder's output.
    Returns:
        The signature of the changed graph.
    Raises:
        ExportError: the encoder's graph has an unknown form.
    """
    graph = decoder.graph
    cross = [value for value in graph.inputs if ".encoder." in str(value.name)]
    states = _add_input(graph, hidden)
    cached = _node(graph, "Shape", [cross[0]], "cached", start=2, end=3)
    new_states = _node(graph, "Slice", [states, cached, *_constants(graph, [np.iinfo(np.int64).max], [1])], "new")
    outputs = {str(value.name): value for value in encoder.graph.outputs}
    source = _hidden_source(outputs[hidden.name])
    if source.dtype is not None and source.dtype != ir.DataType.FLOAT:
        new_states = _node(graph, "Cast", [new_states], "converted", to=int(source.dtype))
    copier = _Copier(graph, encoder.graph.inputs, source, new_states)
    made = []
    for value in cross:
        name = str(value.name).replace(PAST, PRESENT, 1)
        new = copier.copy(outputs[name])
        readers = [use for use in value.uses() if use.node is not cached.producer()]
        both = _node(graph, "Concat", [value, new], f"{value.name}/all", axis=2)
        for reader, index in readers:
            reader.replace_input_with(index, both)
        new.name = name
        made.append(new)
    merged = _signature(spec, hidden)
    _reorder(graph, merged, made)
    encoder.graph.outputs[:] = [outputs[hidden.name]]
    return merged


def _hidden_source(output: ir.Value) -> ir.Value:
    """The hidden states that the encoder computes with, which are cast to float32 for its output in half precision."""
    producer = output.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0]
    return output


class _Copier:
    """Copies the nodes that make values from hidden states to another graph.

    Args:
        graph: gets the copies.
        inputs: of the encoder's graph, whose axes batch and sequence are those of the hidden states.
        source: the hidden states in the encoder's graph. states: those in `graph`.
    """

    def __init__(self, graph: ir.Graph, inputs: Sequence[ir.Value], source: ir.Value, states: ir.Value) -> None:
        self._graph, self._inputs, self._states = graph, list(inputs), states
        self._copies = {source: states}

    def copy(self, value: ir.Value) -> ir.Value:
        """Return the copy of a value, whose nodes are copied too.

        Raises:
            ExportError: it does not depend on the hidden states alone.
        """
        if value not in self._copies:
            node = value.producer()
            if value.const_value is not None and node is None:
                self._copies[value] = self._add_initializer(value)
            elif node is None or node.domain != "" or any(map(_is_graph, node.attributes.values())):
                raise ExportError(f"the encoder makes its keys and values from {value.name}; please report this")
            else:
                self._copy_node(node)
        return self._copies[value]

    def _copy_node(self, node: ir.Node) -> None:
        inputs: list[ir.Value | None] = [self._states]
        if not self._is_size_of_input(node):
            inputs = [item if item is None else self.copy(item) for item in node.inputs]
        attributes, count = list(node.attributes.values()), len(node.outputs)
        copied = ir.Node("", node.op_type, inputs, attributes, name=f"cross/{node.name}", num_outputs=count)
        self._graph.append(copied)
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name, new.type = f"cross/{old.name}", old.type
            self._copies[old] = new

    def _is_size_of_input(self, node: ir.Node) -> bool:
        """Whether a node gives the size of the axis batch or sequence of an input."""
        end = node.attributes.get("end")
        return node.op_type == "Shape" and node.inputs[0] in self._inputs and end is not None and end.as_int() <= 2

    def _add_initializer(self, value: ir.Value) -> ir.Value:
        name = f"cross/{value.name}" if str(value.name) in self._graph.initializers else str(value.name)
        added = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        self._graph.register_initializer(added)
        return added


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.GRAPH


def _signature(spec: Decoder, hidden: TensorSpec) -> Decoder:
    """The signature of the merged decoder; keys and values are in the order of optimum: layer by layer."""
    layers = len(spec.inputs) // 4
    own = {item.name: item for item in (*spec.inputs, *spec.outputs)}

    def caches(prefix: str, axis: str) -> list[TensorSpec]:
        specs = []
        for i in range(layers):
            for part in ("decoder", "encoder"):
                for name in ("key", "value"):
                    item = own.get(f"{prefix}.{i}.{part}.{name}", own[f"{PAST}.{i}.{part}.{name}"])
                    shape = item.shape
                    if part == "encoder":
                        shape = (*shape[:2], axis, shape[3])
                    specs.append(TensorSpec(f"{prefix}.{i}.{part}.{name}", item.dtype, shape))
        return specs

    states = TensorSpec(HIDDEN_STATES, hidden.dtype, hidden.shape)
    return dataclasses.replace(
        spec,
        inputs=(own["input_ids"], own[_MASK], states, *caches(PAST, CACHED)),
        outputs=(own["logits"], *caches(PRESENT, _NEW)),
    )


def _reorder(graph: ir.Graph, spec: Decoder, made: list[ir.Value]) -> None:
    """Set inputs and outputs in the order of a signature, with its axes.

    transformers.js makes the empty caches of the first call, for which it knows one axis by its name, batch_size.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in (*graph.outputs, *made)}
    graph.inputs[:] = [inputs[item.name] for item in spec.inputs]
    graph.outputs[:] = [outputs[item.name] for item in spec.outputs]
    for item in (*spec.inputs, *spec.outputs):
        value = inputs[item.name] if item.name in inputs else outputs[item.name]
        value.shape = ir.Shape(["batch_size" if axis == "batch" else axis for axis in item.shape])


def _add_input(graph: ir.Graph, hidden: TensorSpec) -> ir.Value:
    value = ir.Value(name=HIDDEN_STATES, shape=ir.Shape(hidden.shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _node(graph: ir.Graph, op_type: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes, name=f"cross/{name}")
    output, dtypes = node.outputs[0], {"Shape": ir.DataType.INT64, "Cast": ir.DataType(attributes.get("to", 1))}
    output.name, output.type = f"cross/{name}_output", inputs[0].type
    if op_type in dtypes:
        output.type = ir.TensorType(dtypes[op_type])
    graph.append(node)
    return output


def _constants(graph: ir.Graph, *numbers: list[int]) -> list[ir.Value]:
    values = []
    for i, items in enumerate(numbers):
        tensor = ir.tensor(np.array(items, np.int64), name=f"cross/constant_{i}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape([len(items)]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        values.append(value)
    return values
