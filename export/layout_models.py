"""Writes the ONNX files of the layout hf: standard ops alone, and global tokens fixed by the task's rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.external_data import load_to_model
from onnx_ir.passes import common

from lfx.checks import json_text
from lfx.errors import ExportError, one_line
from lfx.export.merged_decoder import DECODER_MERGED, merge_cross_attention
from lfx.export.passes.hidden_states import add_hidden_states
from lfx.export.passes.static_globals import fix_globals
from lfx.export.passes.tensor_constants import make_constants_tensors
from lfx.export.shared_weights import remove_declarations
from lfx.manifest import ENCODER_MODEL, MODEL
from lfx.runtime.artifact import Artifact
from lfx.signature import HIDDEN_STATES, QUANTIZED, SENTENCE_EMBEDDING, Signature, TensorSpec

# Endings of the names that transformers.js has for the precisions; none for bf16.
ENDINGS = {"fp32": "", "fp16": "_fp16", QUANTIZED: "_quantized"}
MAX_FILE_BYTES = 2_000_000_000  # an ONNX file, a protobuf message, has fewer than 2^31 bytes
_GLOBAL_MASK = "global_attention_mask"


def static_mode(signature: Signature) -> str:
    """Return how the global tokens of a model are fixed: "first" or "none", or "mask" if it has no input for them.

    Raises:
        ExportError: the task's rule depends on the input.
    """
    if signature.global_attention != "mask" or all(spec.name != _GLOBAL_MASK for spec in signature.inputs):
        return signature.global_attention
    refuse_dynamic(signature.task, signature.default_global)
    return signature.default_global


def refuse_dynamic(task: str, rule: str) -> None:
    """Refuse a rule for the global tokens that a fixed graph cannot follow.

    Raises:
        ExportError: the rule depends on the input.
    """
    if rule not in ("first", "none"):
        where = {"question": "the question", "after_question": "the answer"}.get(rule, "by a rule of the model's own")
        raise ExportError(
            f"{task} has its global tokens on {where}, which differ in every input, and the clients of the layout hf "
            "give no global_attention_mask; use the layout lfx, or fix the tokens with --global-attention first or "
            "none, which changes the answers"
        )


def file_name(signature: Signature, stem: str | None = None) -> str:
    """Name of the ONNX file of a model, or of its encoder."""
    if stem is None:
        stem = MODEL if signature.decoder is None else ENCODER_MODEL
    return f"{stem.removesuffix('.onnx')}{ENDINGS[signature.precision]}.onnx"


def write_models(artifact: Artifact, path: Path, in_own_file: bool | None) -> Signature:
    """Write the ONNX file of a bundle with standard ops alone, or both of its files, and return the signature."""
    signature, mode = artifact.signature, static_mode(artifact.signature)
    with artifact.plain_files(unshared=True) as source:
        models = {path: ir.load(source)}
        if signature.decoder is not None:
            decoder = ir.load(source.with_name(signature.decoder.model_file))
            merged = signature.decoder
            if all(spec.name != HIDDEN_STATES for spec in merged.inputs):  # else it has the layout hf already
                merged = merge_cross_attention(models[path], decoder, merged, signature.outputs[0])
            merged = dataclasses.replace(merged, model_file=file_name(signature, DECODER_MERGED))
            signature = dataclasses.replace(signature, outputs=signature.outputs[:1], decoder=merged)
            models[path.with_name(merged.model_file)] = decoder
        model, inputs, outputs = models[path], signature.inputs, signature.outputs
        if fix_globals(model, mode, adds_globals=signature.adds_globals):
            inputs = tuple(spec for spec in inputs if spec.name != _GLOBAL_MASK)
            rule = mode if not signature.adds_globals else signature.default_global
            signature = dataclasses.replace(
                signature, global_attention=mode, default_global=rule, max_global=None, inputs=inputs
            )
        if signature.task == SENTENCE_EMBEDDING and (width := add_hidden_states(model)) is not None:
            hidden = TensorSpec("last_hidden_state", "float32", ("batch", "sequence", width))
            signature = dataclasses.replace(signature, outputs=(hidden, *outputs))
        for file, graph in models.items():
            _save(graph, file, signature, in_own_file)
    return signature


def _save(model: ir.Model, path: Path, signature: Signature, in_own_file: bool | None) -> None:
    """Inline the functions of a model, and write it with its signature."""
    common.InlinePass()(model)
    make_constants_tensors(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.TopologicalSortPass()(model)
    model.metadata_props["lfx"] = json_text(signature.to_dict())
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if in_own_file is False and size >= MAX_FILE_BYTES:
        raise ExportError(f"the weights take {size / 1e9:.1f} GB, above the 2 GB of one file; leave external_data out")
    remove_declarations(model)
    if in_own_file or size >= MAX_FILE_BYTES:
        ir.save(model, path, external_data=f"{path.name}_data", size_threshold_bytes=1024)
    else:
        ir.save(load_to_model(model), path)
    _check_ops(path)


def _check_ops(path: Path) -> None:
    """Check the written file with onnx.checker, and that it uses the domain of ONNX alone."""
    try:
        onnx.checker.check_model(path)
    except Exception as error:
        raise ExportError(f"{path.name} does not pass onnx.checker: {one_line(error)}; please report this") from error
    header = onnx.load(path, load_external_data=False)
    domains = {entry.domain for entry in header.opset_import} - {"", "ai.onnx"}
    if domains or header.functions:
        raise ExportError(f"{path.name} still uses the domains {sorted(domains)}; please report this")
