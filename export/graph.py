"""`finalize_graph`: run the graph passes that turn the traced graph into the exported one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common

from lfx.checks import json_text
from lfx.errors import ExportError
from lfx.export import functions
from lfx.export.passes.constants import share_constants
from lfx.export.passes.gelu import reorder_gelu
from lfx.export.passes.names import name_after_modules, rename_dimensions
from lfx.export.passes.opset import TRACED, set_opset
from lfx.export.passes.tensor_constants import make_constants_tensors
from lfx.export.passes.weights import transpose_weights
from lfx.export.pooling import IN_FLOAT32_MODULES
from lfx.signature import GLOBAL_ROWS, GLOBAL_SLOTS, IN_FLOAT32, SENTENCE_EMBEDDING

# Largest constant, in elements, that constant folding reads or writes; weights are never folded.
_FOLD_LIMIT = 256


def finalize_graph(
    model: ir.Model,
    *,
    opset: int,
    parameter_names: Mapping[int, str],
    prefix: str,
    dimensions: set[str],
    inline_functions: bool,
    metadata: Mapping[str, Any],
) -> ir.Model:
    """Turn the graph that torch.onnx traced from `rewrite.ExportWrapper` into the exported graph, in place.

    Args:
        model: opset 18, with nodes of domain lfx and no function bodies.
        opset: 17 to 23.
        parameter_names: data pointer of a weight -> its first name in the caller's model.
        prefix: the attribute path from the traced wrapper to the caller's model, such as `model.`.
        dimensions: names of the dynamic axes of the graph's inputs.
        inline_functions: replace the lfx functions by standard ops.
        metadata: the signature as JSON types, stored in the model's metadata under the key `lfx`.
    Raises:
        ExportError: an output is constant, or an op does not exist in the opset.
    """
    _name_weights(model, parameter_names, prefix)
    for helper in functions.HELPERS:
        body = functions.function(helper, TRACED)
        model.functions[body.identifier()] = body
    helpers = {helper.name for helper in functions.HELPERS}
    common.InlinePass(criteria=lambda function: function.name in helpers)(model)
    transpose_weights(model)
    weights = set(model.graph.initializers)
    _simplify(model, weights)
    for value in model.graph.outputs:
        if value.is_initializer():
            raise ExportError(f"output {value.name!r} does not depend on the inputs; leave it out")
    share_constants(model, weights)
    common.CommonSubexpressionEliminationPass()(model)
    reorder_gelu(model)
    set_opset(model, opset)
    name_after_modules(model, prefix)
    _mark_global_nodes(model)
    if metadata["task"] == SENTENCE_EMBEDDING:
        _mark_pooling(model)
    if any(node.domain == functions.DOMAIN for node in ir.traversal.RecursiveGraphIterator(model.graph)):
        model.opset_imports[functions.DOMAIN] = functions.VERSION
        for definition in functions.OPS:
            body = functions.function(definition, opset)
            model.functions[body.identifier()] = body
    else:
        model.opset_imports.pop(functions.DOMAIN, None)  # that of the helpers
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    if inline_functions:
        common.InlinePass()(model)
        make_constants_tensors(model.graph)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
    rename_dimensions(model, dimensions, unknown="global_slots")
    common.TopologicalSortPass()(model)
    model.producer_name, model.producer_version = "lfx", str(metadata["lfx_version"])
    model.graph.name = str(metadata["architecture"])
    model.metadata_props["lfx"] = json_text(dict(metadata))
    return model


def _mark_global_nodes(model: ir.Model) -> None:
    """Mark by name the TopK that lists the global tokens, and each If that chooses the form of the global context.

    `build-engine` makes the number of global slots constant at these nodes; the mark distinguishes them from nodes of
    the user's own code.
    """
    for node in model.graph:
        if node.op_type == "If" and any(inner.domain == functions.DOMAIN for inner in _branch_nodes(node)):
            node.name = f"{node.name}{GLOBAL_ROWS}"
        if node.domain == functions.DOMAIN and node.op_type == "BandedAttention":
            index = node.inputs[4]
            while index is not None and (producer := index.producer()) is not None:
                if producer.op_type == "TopK":
                    if not str(producer.name).endswith(GLOBAL_SLOTS):
                        producer.name = f"{producer.name}{GLOBAL_SLOTS}"
                    break
                index = producer.inputs[1] if producer.op_type == "Where" else producer.inputs[0]


def _mark_pooling(model: ir.Model) -> None:
    """Mark the nodes of `export.pooling` that compute in float32, which `build-engine` does not convert."""
    for node in model.graph:
        if str(node.name).startswith(IN_FLOAT32_MODULES):
            node.name = f"{node.name}{IN_FLOAT32}"


def _branch_nodes(node: ir.Node) -> list[ir.Node]:
    branches = (node.attributes["then_branch"], node.attributes["else_branch"])
    return [inner for branch in branches for inner in branch.as_graph()]


def _simplify(model: ir.Model, weights: set[str]) -> None:
    def reads_weight(node: ir.Node) -> bool:
        return any(value is not None and value.is_initializer() and value.name in weights for value in node.inputs)

    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
        # Folding small weights only would make their layout depend on their size.
        should_fold=lambda node: False if reads_weight(node) else None,
    )
    for clean in (
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    ):
        clean(model)


def _name_weights(model: ir.Model, names: Mapping[int, str], prefix: str) -> None:
    for value in list(model.graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        own_name = str(value.name).removeprefix(prefix)
        shared = names.get(raw.data_ptr(), own_name) if isinstance(raw, torch.Tensor) else own_name
        # Two weights may start at one address: one may be a slice of the other.
        value.name = own_name if shared in model.graph.initializers else shared
