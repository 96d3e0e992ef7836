"""`describe`: the signature of a traced module, with its inputs, outputs, windows and limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
from torch import nn
from transformers.models.led import modeling_led as led
from transformers.models.longformer import modeling_longformer as hf

import lfx
from lfx.checks import whole_number
from lfx.errors import ExportError
from lfx.export.led import GenerationEncoder
from lfx.export.probe import adds_globals, default_global_of, is_hugging_face, is_led, task_globals
from lfx.export.rewrite import GlobalTokens, attention_windows, is_causal
from lfx.export.vocabulary import vocabulary
from lfx.export.windows import both_sides
from lfx.signature import TASKS, Signature, TensorSpec


def describe(
    module: nn.Module,
    task: str,
    precision: str,
    tokens: GlobalTokens,
    graph: ir.Model,
    inputs: list[str],
    max_seqlen: int | None,
) -> Signature:
    """Describe a module and its traced graph; `check` of the exporter completes the signature.

    Args:
        task: a key of `TASKS`.
        graph: the traced graph.
        inputs: names of its inputs.
        max_seqlen: the caller's longest sequence in tokens; None = as long as the position embeddings allow.
    Raises:
        ExportError: an id or `max_seqlen` is out of range, or `tokens` cannot be used for the module.
    """
    config = getattr(module, "config", None)
    all_embeddings = [m for m in module.modules() if isinstance(m, hf.LongformerEmbeddings)]
    embeddings = all_embeddings[0] if all_embeddings else None
    vocab_size = vocabulary(graph)
    if vocab_size is None and embeddings is not None:
        vocab_size = getattr(embeddings.word_embeddings, "num_embeddings", None)
    pad = embeddings.padding_idx if embeddings is not None else _token_id(config, "pad_token_id", vocab_size)
    sep = _token_id(config, "sep_token_id", vocab_size)
    if sep is None and is_led(module) and isinstance(getattr(config, "eos_token_id", None), int):
        sep = _token_id(config, "eos_token_id", vocab_size)  # LED's tokenizer separates texts by it
    axes: tuple[str, ...] = ("batch", "choices", "sequence") if TASKS[task].has_choices else ("batch", "sequence")
    signature = Signature(
        architecture=type(module).__name__,
        task=task,
        precision=precision,
        inputs=tuple(TensorSpec(name, "int64", axes) for name in inputs),
        outputs=tuple(_output_spec(value) for value in graph.graph.outputs),
        attention_windows=tuple(attention_windows(module)),
        causal=is_causal(module),
        default_global=tokens.mode if tokens.mode != "mask" else task_globals(module, task),
        global_attention=tokens.mode,
        max_seqlen=longest_sequence(module, max_seqlen),
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


def longest_sequence(module: nn.Module, requested: int | None) -> int | None:
    """Return the longest sequence in tokens: the requested one, or the limit of the position embeddings.

    Raises:
        ExportError: the requested length is above the limit, or the limit is 0.
    """
    # The texts that a GenerationEncoder's model writes have a limit of their own.
    parts = module.led.encoder.modules() if isinstance(module, GenerationEncoder) else module.modules()
    limit = min((limit for part in parts if (limit := _positions(part)) is not None), default=None)
    if limit is not None and limit < 1:
        raise ExportError("the position embeddings have no row for a token; give a larger max_position_embeddings")
    if requested is not None:
        if limit is not None and requested > limit:
            raise ExportError(f"max_seqlen {requested} is out of range; the position embeddings allow 1 to {limit}")
        return requested
    return limit


def _positions(part: nn.Module) -> int | None:
    """Return the number of tokens that the position table of a module has rows for; None if it has no table.

    In Longformer's table no token uses the rows up to the padding index. Hugging Face's LED encoder pads to a multiple
    of the window and needs rows for the padding too, so the number is rounded down to a multiple.
    """
    if isinstance(part, hf.LongformerEmbeddings) and isinstance(part.position_embeddings, nn.Embedding):
        return int(part.position_embeddings.num_embeddings - part.padding_idx - 1)
    if isinstance(part, led.LEDEncoder):
        window = both_sides(max(attention_windows(part)))
        return int(part.embed_positions.num_embeddings) // window * window
    if isinstance(part, led.LEDDecoder):
        return int(part.embed_positions.num_embeddings)
    return None
