"""`export`: write a Longformer as an ONNX bundle, and validate the bundle against PyTorch."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.models.longformer import modeling_longformer as hf

import lfx
from lfx.checks import file_path, flag, whole_number
from lfx.errors import ExportError, one_line
from lfx.export.attentions import check_layout, free_axes, without_attentions
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.checkpoint import Fetch, fetcher
from lfx.export.companions import check_tokenizer, write_config, write_tokenizer
from lfx.export.decompose import decomposing_in_place
from lfx.export.graph import finalize_graph
from lfx.export.load import check_weights, load, load_tokenizer, quiet, weights_sha256
from lfx.export.loop_attention import LoopSelfAttention, asks_for_loop_attention
from lfx.export.options import at_least_1, check_choices, check_pooling, model_name
from lfx.export.passes.opset import TRACED
from lfx.export.pooling import LongformerForSentenceEmbedding
from lfx.export.probe import (
    adds_globals,
    check_long,
    check_repeatable,
    check_rows,
    default_global_of,
    forward_inputs,
    granularity,
    ignores_padding,
    is_hugging_face,
)
from lfx.export.rewrite import (
    Attentions,
    ExportWrapper,
    GlobalTokens,
    attention_windows,
    chunked_attention,
    is_causal,
    rewrite,
)
from lfx.export.sentence_folder import check_modules, copy_settings
from lfx.export.sentence_model import EncoderSettings, read_encoder_settings
from lfx.export.settings import check_window_memory
from lfx.export.sizes import check_sizes
from lfx.export.torch_runners import TORCH_DTYPES
from lfx.export.validate import validate
from lfx.export.vocabulary import vocabulary
from lfx.export.windows import both_sides
from lfx.machine import package_versions
from lfx.manifest import MODEL, WEIGHTS, Manifest
from lfx.signature import GRAPH_INPUTS, OPSETS, SENTENCE_EMBEDDING, TASKS, Signature, TensorSpec

Progress = Callable[[str], None]
_TRACING = threading.Lock()  # torch.export patches torch while it traces
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
    progress: Progress = lambda step: None,
) -> Path:
    """Export a Longformer to an ONNX bundle and validate it against PyTorch.

    Args:
        model: a checkpoint folder, a hub id, or an nn.Module that contains Hugging Face Longformer self-attention.
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
            pooling of its own. They are not normalized, as those of sentence-transformers for such a model.
        max_global: constant number of global slots, 1 to max_seqlen; None = the largest number of global tokens in
            a row of the batch.
        max_seqlen: longest sequence in tokens, 1 or more; default: the largest that Hugging Face's position embeddings
            allow, or no limit if the model has none. For sentence embeddings of a folder of sentence-transformers: the
            length from which on that truncates, if it is shorter.
        inline_functions: write standard ops only, without the domain lfx.
        output_attentions: add the attention probabilities of each layer to the outputs, as Hugging Face's
            output_attentions does; docs/ops.md has their layout. Such a bundle is meant for analysis: it is slower, and
            needs memory in proportion to layers · heads · tokens · window.
        tokenizer: a transformers tokenizer or processor, saved into the bundle; default: the checkpoint's, if any.
        progress: called with the name of each step.
    Returns:
        The bundle's folder.
    Raises:
        ExportError: the model, an option or `output` cannot be used; no file is left.
        ParityError: an output of the exported graph is out of tolerance; no file is left.
    """
    check_choices(task, precision, global_attention, inline_functions, progress)
    check_pooling(pooling, task)
    check_tokenizer(tokenizer)
    opset = whole_number(opset, "opset", *OPSETS, ExportError)
    max_global, max_seqlen = at_least_1(max_global, "max_global"), at_least_1(max_seqlen, "max_seqlen")
    if max_global is not None and global_attention != "mask":
        raise ExportError(f"max_global {max_global} needs global_attention 'mask'; leave one of the two out")
    model = model if isinstance(model, nn.Module) else model_name(model)
    source, source_type = _source(model)
    target = _target(model, output)
    check_target(target)
    if isinstance(model, nn.Module):
        module = model if pooling is None else _with_pooling(model, pooling)
        task = _task_of_module(module, task)
    else:
        progress("loading the checkpoint")
        fetch = fetcher(source)
        module, task = load(source, task, pooling, fetch)
        settings = _encoder_settings(fetch, task, pooling)
        tokenizer, max_seqlen = _load_texts(source, module, tokenizer, max_seqlen, settings)
    _check_module(module, source)
    if flag(output_attentions, "output_attentions", ExportError):
        check_layout(module)
    _check_global_option(module, global_attention, max_global)
    check_weights(module)
    weights = [*module.parameters(), *module.buffers()]
    weight_bytes = sum(t.numel() for t in weights) * TORCH_DTYPES[precision].itemsize
    check_space(target, int(weight_bytes * 1.05) + 2_000_000)  # a margin for the graph and the tokenizer

    progress("tracing")
    tokens = GlobalTokens(mode=global_attention, max_slots=max_global)
    program, inputs = _trace(module, task, precision, tokens, output_attentions=output_attentions)
    signature = _signature(module, task, precision, tokens, program.model, inputs, max_seqlen)
    signature = _check_model(module, program, signature, output_attentions=output_attentions)
    if max_global is not None and max_global > (signature.max_seqlen or max_global):
        raise ExportError(f"max_global {max_global} is above the longest sequence, {signature.max_seqlen} tokens")
    progress("building the graph")
    model_ir = finalize_graph(
        program.model,
        opset=opset,
        parameter_names=_first_names(module),
        prefix="model.",
        dimensions={str(axis) for spec in signature.inputs for axis in spec.shape},
        inline_functions=inline_functions,
        metadata=signature.to_dict(),
    )
    with atomic_folder(target) as folder, quiet():
        progress("writing")
        ir.save(model_ir, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=1024)
        del program, model_ir
        _check_file(folder / MODEL, opset)
        write_config(getattr(module, "config", None), folder)
        write_tokenizer(tokenizer, folder)
        if source_type != "module":
            copy_settings(fetch, folder)
        Manifest(
            signature=signature,
            opset=opset,
            inlined=inline_functions,
            source={"model": source, "kind": source_type, "sha256": weights_sha256(module), **_recorded(pooling)},
            versions={"lfx": lfx.__version__, **package_versions(_PACKAGES)},
            validation=validate(folder / MODEL, module, signature, progress),
        ).write(folder)
    return target


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
    module: nn.Module, program: torch.onnx.ONNXProgram, signature: Signature, *, output_attentions: bool
) -> Signature:
    """Run the module to check that its traced graph is valid for all inputs, and complete the signature.

    Raises:
        ExportError: the graph is not valid for some input.
    """
    outputs = signature.outputs
    if output_attentions:  # the module itself does not return them
        signature = without_attentions(signature)
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
    source: str, module: nn.Module, tokenizer: Any, max_seqlen: int | None, settings: EncoderSettings | None
) -> tuple[Any, int | None]:
    """Return the tokenizer and the longest sequence: the caller's, or those of the checkpoint.

    Args:
        settings: of sentence-transformers, which are followed; None = there are none.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(source, lower_case=settings is not None and settings.lower_case)
    if max_seqlen is None and settings is not None:
        max_seqlen = _longest_text(settings, module, tokenizer)
    return tokenizer, max_seqlen


def _longest_text(settings: EncoderSettings, module: nn.Module, tokenizer: Any) -> int | None:
    """Return the length in tokens from which on sentence-transformers truncates a text, at most the model's own."""
    longest = settings.max_seqlen or getattr(tokenizer, "model_max_length", None)
    limit = _max_seqlen([m for m in module.modules() if isinstance(m, hf.LongformerEmbeddings)], None)
    if type(longest) is not int or longest < 1:
        return limit
    return longest if limit is None else min(longest, limit)


def _target(model: str | nn.Module, output: str | Path | None) -> Path:
    if output is not None:
        return file_path(output, "output", ExportError)
    if isinstance(model, nn.Module):
        raise ExportError("a module has no name for the output folder; give export(..., output=FOLDER)")
    name = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").rpartition("/")[2]
    target = Path(name)
    is_checkpoint = Path(model).is_dir() and target.resolve() == Path(model).resolve()
    return Path(f"{name}-onnx") if is_checkpoint else target


def _task_of_module(module: nn.Module, task: str) -> str:
    if task != "auto":
        if is_hugging_face(module) and TASKS[task].architecture != type(module).__name__:
            raise ExportError(f"task {task} is not the task of a {type(module).__name__}; leave it out")
        return task
    bases = {cls.__name__ for cls in type(module).__mro__}
    return next((name for name, known in TASKS.items() if known.architecture in bases), "feature-extraction")


def _trace(
    module: nn.Module, task: str, precision: str, tokens: GlobalTokens, *, output_attentions: bool
) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """Trace the rewritten module with torch.onnx.

    Returns:
        The program, and the names of its inputs.
    Raises:
        ExportError: the module takes no input_ids, cannot be traced, or has an output that cannot be named.
    """
    accepted = forward_inputs(module)
    if "input_ids" not in accepted:
        raise ExportError(f"{type(module).__name__}.forward takes no input_ids; lfx feeds it {', '.join(GRAPH_INPUTS)}")
    inputs = [name for name in accepted if tokens.mode == "mask" or name != "global_attention_mask"]
    attentions: Attentions | None = [] if output_attentions else None
    wrapper = ExportWrapper(
        rewrite(module, tokens, TORCH_DTYPES[precision], attentions),
        inputs,
        tokens,
        "global_attention_mask" in accepted,
        attentions,
    ).eval()
    batch, choices, sequence = (torch.export.Dim(name) for name in ("batch", "choices", "sequence"))
    axes = {0: batch, 1: choices, 2: sequence} if TASKS[task].has_choices else {0: batch, 1: sequence}
    try:
        with _TRACING, quiet(), torch.autocast("cpu", enabled=False), decomposing_in_place():
            program = torch.onnx.export(
                wrapper,
                _example(module, task, inputs),
                dynamo=True,
                opset_version=TRACED,
                input_names=inputs,
                dynamic_shapes={"tensors": tuple(axes for _ in inputs)},
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, ExportError):
            raise cause from None
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        raise ExportError(f"{type(module).__name__} cannot be traced: {reason}") from error
    assert program is not None
    assert program.exported_program is not None
    outputs = pytree.tree_unflatten(list(program.model.graph.outputs), program.exported_program.call_spec.out_spec)
    _name_outputs(outputs, {*inputs, *(name for name, _ in module.named_parameters())})
    if output_attentions:
        free_axes(outputs, has_choices=TASKS[task].has_choices)
    return program, inputs


def _example(module: nn.Module, task: str, inputs: list[str]) -> tuple[torch.Tensor, ...]:
    """Make inputs to trace with; the axes differ in size, so that torch.export merges no two of them."""
    length = 4 * max(attention_windows(module)) if granularity(module) > 1 else 29
    shape = (2, 3, length) if TASKS[task].has_choices else (3, length)
    ids = torch.arange(length).expand(shape) % 5 + 3
    return tuple(ids if name == "input_ids" else torch.ones(shape, dtype=torch.int64) for name in inputs)


def _name_outputs(outputs: dict[str, ir.Value], taken: set[str]) -> None:
    """Give every graph output its name.

    Args:
        taken: names of the inputs and of the parameters.
    Raises:
        ExportError: a name is invalid or taken, or one tensor is returned twice.
    """
    seen: dict[int, str] = {}
    for name, value in outputs.items():
        if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
            raise ExportError(
                f"output {name[:100]!r} has a name that cannot be a file name; rename it: at most 100 letters, digits, "
                "'_', '.' and '-'"
            )
        if value.is_graph_input() or name in taken:
            raise ExportError(
                f"output {name!r} is an input, or has the name of an input or a parameter; leave it out or rename it"
            )
        if id(value) in seen:
            raise ExportError(f"outputs {seen[id(value)]!r} and {name!r} are one tensor; return it once")
        seen[id(value)] = name
        value.name = name


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_names(module: nn.Module) -> dict[int, str]:
    """Map the data pointer of each weight to its first name in the module; tied weights have one pointer."""
    names: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        names.setdefault(tensor.data_ptr(), name)
    return names


def _signature(
    module: nn.Module,
    task: str,
    precision: str,
    tokens: GlobalTokens,
    graph: ir.Model,
    inputs: list[str],
    max_seqlen: int | None,
) -> Signature:
    config = getattr(module, "config", None)
    all_embeddings = [m for m in module.modules() if isinstance(m, hf.LongformerEmbeddings)]
    embeddings = all_embeddings[0] if all_embeddings else None
    vocab_size = vocabulary(graph)
    if vocab_size is None and embeddings is not None:
        vocab_size = getattr(embeddings.word_embeddings, "num_embeddings", None)
    pad = embeddings.padding_idx if embeddings is not None else _token_id(config, "pad_token_id", vocab_size)
    sep = _token_id(config, "sep_token_id", vocab_size)
    axes: tuple[str, ...] = ("batch", "choices", "sequence") if TASKS[task].has_choices else ("batch", "sequence")
    signature = Signature(
        architecture=type(module).__name__,
        task=task,
        precision=precision,
        inputs=tuple(TensorSpec(name, "int64", axes) for name in inputs),
        outputs=tuple(_output_spec(value) for value in graph.graph.outputs),
        attention_windows=tuple(attention_windows(module)),
        causal=is_causal(module),
        default_global=tokens.mode if tokens.mode != "mask" else TASKS[task].default_global,
        global_attention=tokens.mode,
        max_seqlen=_max_seqlen(all_embeddings, max_seqlen),
        vocab_size=vocab_size,
        max_global=tokens.max_slots,
        pad_token_id=pad if pad is not None else min(1, (vocab_size or 2) - 1),
        sep_token_id=sep,
        lfx_version=lfx.__version__,
    )
    if tokens.mode == "mask" and "global_attention_mask" in inputs and not is_hugging_face(module):
        signature = dataclasses.replace(signature, default_global=default_global_of(module, signature))
    if adds_globals(module, signature):
        if tokens.mode != "mask" or tokens.max_slots is not None:
            option = f"max_global {tokens.max_slots}" if tokens.mode == "mask" else f"global_attention {tokens.mode!r}"
            raise ExportError(
                f"{type(module).__name__} gives global attention to tokens that its global_attention_mask does not "
                f"mark, which {option} would ignore; leave the option out"
            )
        signature = dataclasses.replace(signature, adds_globals=True)
    return signature


def _token_id(config: Any, name: str, vocab_size: int | None) -> int | None:
    value = getattr(config, name, None)
    return None if value is None else whole_number(value, name, 0, (vocab_size or 2**31) - 1, ExportError)


def _output_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    axes = tuple(size if isinstance(size, int) else str(size.value or "?") for size in value.shape)
    return TensorSpec(value.name, str(value.dtype.numpy()), axes)


def _max_seqlen(embeddings: list[Any], requested: int | None) -> int | None:
    """Return the longest sequence in tokens: the requested one, or the limit of the position embeddings.

    The limit is the number of rows of the smallest position table, less the rows up to the padding index, which no
    token uses.

    Raises:
        ExportError: the requested length is above the limit, or the limit is 0.
    """
    limit = min(
        (
            e.position_embeddings.num_embeddings - e.padding_idx - 1
            for e in embeddings
            if isinstance(e.position_embeddings, nn.Embedding)
        ),
        default=None,
    )
    if limit is not None and limit < 1:
        raise ExportError("the position embeddings have no row for a token; give a larger max_position_embeddings")
    if requested is not None:
        if limit is not None and requested > limit:
            raise ExportError(f"max_seqlen {requested} is out of range; the position embeddings allow 1 to {limit}")
        return requested
    return limit


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
