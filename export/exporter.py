"""`export`: write a Longformer as an ONNX bundle, and validate the bundle against PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn
from transformers.models.longformer import modeling_longformer as hf

import lfx
from lfx.checks import file_path, flag, one_of, whole_number
from lfx.errors import ExportError, one_line
from lfx.export.attentions import check_layout, without_attentions
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.checkpoint import Fetch, Fetcher, fetcher
from lfx.export.companions import (
    check_generation_config,
    check_tokenizer,
    write_config,
    write_generation_config,
    write_tokenizer,
)
from lfx.export.describe import describe, longest_sequence
from lfx.export.generation import build_graphs, is_generation
from lfx.export.graph import finalize_graph
from lfx.export.layout import LAYOUTS, check_options, write_layout
from lfx.export.layout_models import ENDINGS, refuse_dynamic
from lfx.export.led import LED_CLASSES
from lfx.export.load import check_weights, load, load_tokenizer, quiet, weights_sha256
from lfx.export.loop_attention import LoopSelfAttention, asks_for_loop_attention
from lfx.export.options import GraphOptions, at_least_1, check_choices, check_pooling, model_name
from lfx.export.pooling import LongformerForSentenceEmbedding
from lfx.export.probe import (
    check_autocast,
    check_long,
    check_repeatable,
    check_rows,
    forward_inputs,
    granularity,
    ignores_padding,
    is_hugging_face,
    task_globals,
)
from lfx.export.rewrite import (
    GlobalTokens,
    attention_windows,
    chunked_attention,
)
from lfx.export.sentence_folder import check_modules, copy_settings
from lfx.export.sentence_model import EncoderSettings, read_encoder_settings
from lfx.export.settings import check_window_memory
from lfx.export.shared_weights import save_models
from lfx.export.sizes import check_sizes
from lfx.export.torch_runners import TORCH_DTYPES
from lfx.export.trace import first_names, trace
from lfx.export.validate import validate, validate_generation
from lfx.export.windows import both_sides
from lfx.files import is_same
from lfx.machine import package_versions
from lfx.manifest import MODEL, WEIGHTS, Manifest
from lfx.signature import OPSETS, SENTENCE_EMBEDDING, TASKS, TEXT_GENERATION, Signature

Progress = Callable[[str], None]
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def export(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    task: str = "auto",
    opset: int = 17,
    precision: str = "fp32",
    global_attention: str = "mask",
    pooling: str | None = None,
    max_global: int | None = None,
    max_seqlen: int | None = None,
    inline_functions: bool = False,
    output_attentions: bool = False,
    tokenizer: Any = None,
    layout: str = "lfx",
    model_type: str | None = None,
    progress: Progress = lambda step: None,
) -> Path:
    """Export a Longformer or an LED to an ONNX bundle and validate it against PyTorch.

    The bundle of an LEDForConditionalGeneration has two graphs, encoder_model.onnx and decoder_model.onnx.

    Args:
        model: a checkpoint folder, a hub id, or an nn.Module that contains Hugging Face's self-attention of Longformer
            or of LED's encoder.
            A module's forward takes input_ids, and optionally attention_mask and global_attention_mask, all
            (batch, seqlen) int64, or (batch, choices, seqlen) for multiple choice. The module is not changed.
        output: the bundle's folder; default: the model's name in the current folder. An older bundle of that name is
            replaced; a folder with other files is refused.
        task: one of `lfx.signature.TASKS`; "auto" reads it from the config, or from the module's class, and is
            sentence-embedding for a folder of sentence-transformers with a pooling.
        opset: ONNX opset, 17 to 23.
        precision: fp32, fp16 or bf16, of weights and arithmetic. Softmax and layer norm accumulate in float32, and the
            outputs are float32 in all three.
        global_attention: "mask" makes global_attention_mask a graph input; "first" fixes the first token of every
            row; "none" leaves global attention out.
        pooling: one of `lfx.signature.POOLINGS`: sentence embeddings of a LongformerModel, or of a checkpoint without a
            pooling of its own. They are not normalized, like those of sentence-transformers for such a model.
        max_global: constant number of global slots, 1 to max_seqlen; None = the largest number of global tokens in
            a row of the batch.
        max_seqlen: longest sequence in tokens, 1 or more; default: the largest that Hugging Face's position embeddings
            allow, or no limit if the model has none. For sentence embeddings of a folder of sentence-transformers: the
            length to which that truncates, if it is shorter.
        inline_functions: write standard ops only, without the domain lfx.
        output_attentions: add the attention probabilities of each layer to the outputs, as Hugging Face's
            output_attentions does; docs/ops.md has their layout. Such a bundle is meant for analysis: it is slower, and
            needs memory in proportion to layers · heads · tokens · window.
        tokenizer: a transformers tokenizer or processor, saved into the bundle; default: the checkpoint's, if any.
        layout: "lfx", or "hf": the layout that other clients of the hub read, see `lfx.export.relayout`; the default
            output is then the model's name with -hf.
        model_type: for the layout "hf"; see `lfx.export.relayout`.
        progress: called with the name of each step.
    Returns:
        The bundle's folder.
    Raises:
        ExportError: the model, an option or `output` cannot be used; no file is left.
        ParityError: an output of the exported graph is out of tolerance; no file is left.
    """
    check_choices(task, precision, global_attention, inline_functions, progress)
    check_pooling(pooling, task)
    _check_layout(layout, model_type, precision, output_attentions=output_attentions)
    check_tokenizer(tokenizer)
    opset = whole_number(opset, "opset", *OPSETS, ExportError)
    max_global, max_seqlen = at_least_1(max_global, "max_global"), at_least_1(max_seqlen, "max_seqlen")
    if max_global is not None and global_attention != "mask":
        raise ExportError(f"max_global {max_global} needs global_attention 'mask'; leave one of the two out")
    model = model if isinstance(model, nn.Module) else model_name(model)
    source, source_type = _source(model)
    target = _target(model, output, layout)
    check_target(target)
    fetch: Fetcher | None = None
    if isinstance(model, nn.Module):
        module = model if pooling is None else _with_pooling(model, pooling)
        task = _task_of_module(module, task)
    else:
        progress("loading the checkpoint")
        fetch = fetcher(source)
        module, task = load(source, task, pooling, fetch)
        settings = _encoder_settings(fetch, task, pooling)
        tokenizer, max_seqlen = _load_texts(source, fetch, module, tokenizer, max_seqlen, settings)
    _check_module(module, source)
    _check_generation(module, task, output_attentions=output_attentions)
    if layout == "hf" and global_attention == "mask" and max_global is None:
        global_attention = _static_globals(module, task)
    if flag(output_attentions, "output_attentions", ExportError):
        check_layout(module)
    _check_global_option(module, global_attention, max_global)
    check_weights(module)
    _check_space(target, module, precision, layout)

    progress("tracing")
    tokens = GlobalTokens(mode=global_attention, max_slots=max_global)
    options = GraphOptions(tokens, opset, precision, max_seqlen, inline_functions)
    if is_generation(module):
        graphs, signature = build_graphs(module, options, _check_model, progress)
        check_autocast(module, signature)  # _check_model has run its parts
    else:
        graphs, signature = _build_graph(module, task, options, progress, output_attentions=output_attentions)
    manifest = Manifest(
        signature=signature,
        opset=opset,
        inlined=inline_functions,
        model_file=next(iter(graphs)),
        source={"model": source, "kind": source_type, "sha256": weights_sha256(module), **_recorded(pooling)},
        versions={"lfx": lfx.__version__, **package_versions(_PACKAGES)},
    )
    with (
        atomic_folder(target) as folder,
        fetch.unchanged() if fetch is not None else contextlib.nullcontext(),
        quiet(),
    ):
        progress("writing")
        bundle = folder / "bundle" if layout == "hf" else folder
        bundle.mkdir(exist_ok=True)
        save_models(graphs, bundle, WEIGHTS)
        del graphs
        _complete_bundle(bundle, manifest, module, tokenizer, fetch, progress)
        if layout == "hf":
            write_layout([bundle], folder, model_type=model_type, in_own_file=None, fetch=fetch, progress=progress)
    return target


def _build_graph(
    module: nn.Module, task: str, options: GraphOptions, progress: Progress, *, output_attentions: bool
) -> tuple[dict[str, ir.Model], Signature]:
    """Trace a module, check it and turn its trace into the exported graph.

    Returns:
        Name of the file -> graph, and its signature.
    Raises:
        ExportError: the module cannot be traced, or an option does not fit it.
    """
    tokens, precision = options.tokens, options.precision
    program, inputs = trace(module, task, precision, tokens, output_attentions=output_attentions)
    signature = describe(module, task, precision, tokens, program.model, inputs, options.max_seqlen)
    signature = _check_model(module, program, signature, output_attentions=output_attentions)
    progress("building the graph")
    graph = finalize_graph(
        program.model,
        opset=options.opset,
        parameter_names=first_names(module),
        prefix="model.",
        dimensions={str(axis) for spec in signature.inputs for axis in spec.shape},
        inline_functions=options.inline_functions,
        metadata=signature.to_dict(),
    )
    return {MODEL: graph}, signature


def _complete_bundle(
    folder: Path, manifest: Manifest, module: nn.Module, tokenizer: Any, fetch: Fetch | None, progress: Progress
) -> None:
    """Check the written model, write the files beside it, compare it with PyTorch, and write the manifest.

    Args:
        fetch: of the checkpoint; None for a module in memory.
    Raises:
        ExportError: the model's file is not valid, or a file of the checkpoint is broken.
        ParityError: an output is out of tolerance.
    """
    signature, decoder = manifest.signature, manifest.signature.decoder
    for name in (manifest.model_file, *([decoder.model_file] if decoder is not None else [])):
        _check_file(folder / name, manifest.opset)
    write_config(getattr(module, "config", None), folder)
    write_tokenizer(tokenizer, folder)
    if fetch is not None:
        copy_settings(fetch, folder)
    if decoder is not None:
        write_generation_config(module, folder)
    compare = validate if decoder is None else validate_generation
    validation = compare(folder / manifest.model_file, module, signature, progress)
    dataclasses.replace(manifest, validation=validation).write(folder)


def _check_space(target: Path, module: nn.Module, precision: str, layout: str) -> None:
    weights = [*module.parameters(), *module.buffers()]
    weight_bytes = sum(t.numel() for t in weights) * TORCH_DTYPES[precision].itemsize
    copies = 2 if layout == "hf" else 1
    check_space(target, copies * (int(weight_bytes * 1.05) + 2_000_000))  # a margin for the graph and the tokenizer


def _check_layout(layout: Any, model_type: Any, precision: str, *, output_attentions: Any) -> None:
    """Check the layout, and the options that it excludes.

    Raises:
        ExportError: the layout or its model_type is not known, or another option cannot be used with it.
    """
    one_of(layout, "layout", LAYOUTS, ExportError)
    check_options(model_type)
    if layout == "lfx" and model_type is not None:
        raise ExportError(f"model_type {model_type!r} is for the layout hf; leave it out")
    if layout == "hf" and (precision not in ENDINGS or output_attentions):
        option = f"precision {precision}" if precision not in ENDINGS else "output_attentions"
        raise ExportError(f"{option} is not for the layout hf, whose clients cannot use it; leave one of them out")


def _check_generation(module: nn.Module, task: str, *, output_attentions: Any) -> None:
    """Check that the task writes texts if the module does, and refuse the options that such a model does not have.

    Raises:
        ExportError: the task is another module's, an option is given, or options of generation are in the config.
    """
    if is_generation(module) != (task == TEXT_GENERATION):
        raise ExportError(f"task {task} is not the task of a {type(module).__name__}; leave it out")
    if is_generation(module) and output_attentions:
        raise ExportError(
            f"output_attentions is for models of one graph, and a {type(module).__name__} has two; leave it out"
        )
    if is_generation(module):
        check_generation_config(module)


def _static_globals(module: nn.Module, task: str) -> str:
    """Return the rule for the global tokens of the layout hf; "mask" for a module that has a rule of its own.

    Raises:
        ExportError: the task's rule depends on the input.
    """
    if "global_attention_mask" not in forward_inputs(module) or not is_hugging_face(module):
        return "mask"
    rule = task_globals(module, task)
    refuse_dynamic(task, rule)
    return rule


def _source(model: str | nn.Module) -> tuple[str, str]:
    """Return where the weights come from, and its type: "module", "folder" (an absolute path) or "hub".

    `lfx parity` loads the weights from there, from any current folder.
    """
    if isinstance(model, nn.Module):
        return f"{type(model).__module__}.{type(model).__qualname__}", "module"
    return (str(Path(model).resolve()), "folder") if Path(model).is_dir() else (model, "hub")


def _check_module(module: nn.Module, source: str) -> None:
    """Refuse modules without Longformer self-attention, and configs that Hugging Face itself cannot run."""
    if not attention_windows(module):
        raise ExportError(f"{source} contains no Longformer self-attention; lfx exports Longformer models only")
    for attention in chunked_attention(module):
        window = both_sides(int(attention.one_sided_attn_window_size))
        if window < 4:
            raise ExportError(
                f"{source} has an attention_window of 2, which Hugging Face itself cannot run; give 4 or more"
            )
        check_window_memory(window, attention.num_heads, f"{source}: attention_window")
        if not isinstance(attention, LoopSelfAttention) and asks_for_loop_attention(attention.config):
            raise ExportError(
                f"the config of {source} has a dilation or autoregressive, which its LongformerSelfAttention ignores; "
                "call lfx.export.use_loop_attention(model), or remove both from the config"
            )
    if any(m.padding_idx is None for m in module.modules() if isinstance(m, hf.LongformerEmbeddings)):
        raise ExportError(
            f"{source} has no pad_token_id, without which Hugging Face itself cannot count positions; set it in the "
            "config"
        )


def _check_model(
    module: nn.Module, program: torch.onnx.ONNXProgram, signature: Signature, *, output_attentions: bool = False
) -> Signature:
    """Run the module to check that its traced graph is valid for all inputs, and complete the signature.

    Raises:
        ExportError: the graph is not valid for some input, or has more global slots than tokens.
    """
    slots, longest = signature.max_global, signature.max_seqlen
    if slots is not None and longest is not None and slots > longest:
        raise ExportError(f"max_global {slots} is above the longest sequence, {longest} tokens")
    outputs = signature.outputs
    if output_attentions:  # the module itself does not return them
        signature = without_attentions(signature)
    check_autocast(module, signature)
    check_sizes(program, signature, granularity(module))
    check_long(module, signature)
    check_repeatable(module, signature)
    signature = dataclasses.replace(signature, ignores_padding=ignores_padding(module, signature))
    check_rows(module, signature)
    return dataclasses.replace(signature, outputs=outputs, output_attentions=output_attentions)


def _check_global_option(module: nn.Module, global_attention: str, max_global: int | None) -> None:
    """Refuse options about global tokens for a model whose forward takes no global_attention_mask."""
    if "global_attention_mask" not in forward_inputs(module) and (global_attention != "mask" or max_global is not None):
        option = f"max_global {max_global}" if max_global is not None else f"global_attention {global_attention!r}"
        raise ExportError(
            f"{option} cannot be used: {type(module).__name__}.forward takes no global_attention_mask, so it decides "
            "itself which tokens are global; leave the option out"
        )


def _recorded(pooling: str | None) -> dict[str, str]:
    """The entry of the manifest's `source` by which `lfx parity` loads the model again."""
    return {} if pooling is None else {"pooling": pooling}


def _with_pooling(module: nn.Module, pooling: str) -> nn.Module:
    if not isinstance(module, hf.LongformerModel):
        raise ExportError(
            f"pooling {pooling!r} needs a LongformerModel, and this is a {type(module).__name__}; return the pooled "
            "vector from its forward, and leave pooling out"
        )
    return LongformerForSentenceEmbedding(module, (pooling,)).train(module.training)


def _encoder_settings(fetch: Fetch, task: str, pooling: str | None) -> EncoderSettings | None:
    """Check the modules of sentence-transformers; returns the encoder's settings if the embeddings are made by them."""
    check_modules(fetch)
    return read_encoder_settings(fetch) if task == SENTENCE_EMBEDDING and pooling is None else None


def _load_texts(
    source: str,
    fetch: Fetch,
    module: nn.Module,
    tokenizer: Any,
    max_seqlen: int | None,
    settings: EncoderSettings | None,
) -> tuple[Any, int | None]:
    """Return the tokenizer and the longest sequence: the caller's, or those of the checkpoint.

    Args:
        settings: those of a sentence-transformers folder; None for any other checkpoint.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(source, fetch, lower_case=settings is not None and settings.lower_case)
    if max_seqlen is None and settings is not None:
        max_seqlen = _longest_text(settings, module, tokenizer)
    return tokenizer, max_seqlen


def _longest_text(settings: EncoderSettings, module: nn.Module, tokenizer: Any) -> int | None:
    """Return the number of tokens to which sentence-transformers truncates a text, at most the model's maximum."""
    longest = settings.max_seqlen or getattr(tokenizer, "model_max_length", None)
    limit = longest_sequence(module, None)
    if type(longest) is not int or longest < 1:
        return limit
    return longest if limit is None else min(longest, limit)


def _target(model: str | nn.Module, output: str | Path | None, layout: str) -> Path:
    if output is not None:
        return file_path(output, "output", ExportError)
    if isinstance(model, nn.Module):
        raise ExportError("a module has no name for the output folder; give export(..., output=FOLDER)")
    name = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").rpartition("/")[2]
    if layout == "hf":
        name = f"{name}-hf"
    target = Path(name)
    is_checkpoint = Path(model).is_dir() and is_same(target, Path(model))
    return Path(f"{name}-onnx") if is_checkpoint else target


def _task_of_module(module: nn.Module, task: str) -> str:
    if task != "auto":
        if is_hugging_face(module) and type(module).__name__ not in (TASKS[task].architecture, LED_CLASSES.get(task)):
            raise ExportError(f"task {task} is not the task of a {type(module).__name__}; leave it out")
        return task
    bases = {cls.__name__ for cls in type(module).__mro__}
    classes = {task: {known.architecture, LED_CLASSES.get(task)} for task, known in TASKS.items()}
    return next((name for name, names in classes.items() if names & bases), "feature-extraction")


def _check_file(path: Path, opset: int) -> None:
    """Check that the written file imports `opset` and passes onnx.checker with shape inference.

    Raises:
        ExportError: it does not.
    """
    header = onnx.load(path, load_external_data=False)
    imports = {entry.domain: entry.version for entry in header.opset_import}
    if imports.get("") != opset:
        raise ExportError(f"the file imports opset {imports.get('')} instead of {opset}; please report this")
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported file does not pass onnx.checker: {one_line(error)}") from error
