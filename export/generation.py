"""`build_graphs`: the encoder's and the decoder's graph of LEDForConditionalGeneration, and their signature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import nn
from transformers.models.led import modeling_led as led

from lfx.checks import shown, whole_number
from lfx.errors import ExportError
from lfx.export.describe import describe
from lfx.export.graph import finalize_graph
from lfx.export.led import GenerationDecoder, GenerationEncoder
from lfx.export.options import GraphOptions
from lfx.export.rewrite import clone
from lfx.export.torch_runners import TORCH_DTYPES
from lfx.export.trace import first_names, run_onnx, trace
from lfx.signature import PAST, PRESENT, TEXT_GENERATION, Decoder, Signature, TensorSpec

ENCODER_MODEL, DECODER_MODEL = "encoder_model.onnx", "decoder_model.onnx"
# Sizes of the example that the decoder is traced with; they differ, so that torch.export merges no two axes.
_SIZES = {"batch": 3, "tokens": 5, "past": 7, "sequence": 11}


def is_generation(module: nn.Module) -> bool:
    """Return whether a module is exported as an encoder and a decoder."""
    return isinstance(module, led.LEDForConditionalGeneration)


def build_graphs(
    module: nn.Module,
    options: GraphOptions,
    check: Callable[[nn.Module, torch.onnx.ONNXProgram, Signature], Signature],
    progress: Callable[[str], None],
) -> tuple[dict[str, ir.Model], Signature]:
    """Trace the encoder and the decoder, and turn both into the exported graphs, which share the tensors of weights.

    Args:
        module: an LEDForConditionalGeneration in float32; not changed.
        check: checks that the encoder's traced graph is valid for all inputs, and completes its signature.
    Returns:
        Name of the file -> graph, the encoder's first, and the signature of both.
    Raises:
        ExportError: a part cannot be traced, or the config lacks the id that a text starts with.
    """
    precision, tokens = options.precision, options.tokens
    converted = clone(module, TORCH_DTYPES[precision])
    assert isinstance(converted, led.LEDForConditionalGeneration)
    # numpy has no bfloat16; a float16 cache holds the very numbers that the graph computes with.
    cache_dtype = torch.float16 if precision == "fp16" else torch.float32
    encoder, inputs = trace(
        GenerationEncoder(converted, cache_dtype), TEXT_GENERATION, precision, tokens, output_attentions=False
    )
    whole = GenerationEncoder(module)
    signature = describe(whole, TEXT_GENERATION, precision, tokens, encoder.model, inputs, options.max_seqlen)
    signature = dataclasses.replace(signature, architecture=type(module).__name__)
    signature = dataclasses.replace(check(whole, encoder, signature), decoder=_decoder_signature(module, cache_dtype))
    assert signature.decoder is not None
    decoder = _trace_decoder(GenerationDecoder(converted, cache_dtype).eval(), signature.decoder)
    progress("building the graphs")
    graphs = {}
    for name, program, specs in (
        (ENCODER_MODEL, encoder, signature.inputs),
        (DECODER_MODEL, decoder, signature.decoder.inputs),
    ):
        graphs[name] = finalize_graph(
            program.model,
            opset=options.opset,
            parameter_names=first_names(converted),
            prefix="model.",
            dimensions={axis for spec in specs for axis in spec.shape if isinstance(axis, str)},
            inline_functions=options.inline_functions,
            metadata=signature.to_dict(),
        )
    return graphs, signature


def _decoder_signature(module: led.LEDForConditionalGeneration, cache_dtype: torch.dtype) -> Decoder:
    decoder, config = module.led.decoder, module.config
    vocab_size = module.lm_head.out_features
    start = config.decoder_start_token_id
    attention = decoder.layers[0].self_attn
    cached = str(cache_dtype).removeprefix("torch.")
    heads, head_size = attention.num_heads, attention.head_dim

    def caches(prefix: str, parts: dict[str, str]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{prefix}.{i}.{part}.{name}", cached, ("batch", heads, axis, head_size))
            for part, axis in parts.items()
            for i in range(len(decoder.layers))
            for name in ("key", "value")
        )

    return Decoder(
        model_file=DECODER_MODEL,
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "tokens")),
            TensorSpec("encoder_attention_mask", "int64", ("batch", "sequence")),
            *caches(PAST, {"decoder": "past", "encoder": "sequence"}),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "tokens", vocab_size)),
            *caches(PRESENT, {"decoder": "past + tokens"}),
        ),
        max_tokens=decoder.embed_positions.num_embeddings,
        decoder_start_token_id=whole_number(start, "decoder_start_token_id", 0, vocab_size - 1, ExportError),
    )


def _trace_decoder(module: GenerationDecoder, signature: Decoder) -> torch.onnx.ONNXProgram:
    axes = {name: torch.export.Dim(name) for name in _SIZES}
    examples, shapes = [], []
    for spec in signature.inputs:
        size = [_SIZES[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        examples.append(torch.ones(size, dtype=getattr(torch, spec.dtype)))
        shapes.append({i: axes[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str)})
    program = run_onnx(module, tuple(examples), [spec.name for spec in signature.inputs], shapes)
    _read_batch_from_ids(program.model)
    return program


def _read_batch_from_ids(model: ir.Model) -> None:
    """Take every batch size from input_ids.

    The tracer takes it from any input. The rows of one text may share the encoder's tensors, whose batch is then 1.

    Raises:
        ExportError: a node reads it together with other sizes.
    """
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    others = {value for value in model.graph.inputs if value.shape is not None and value.shape[0] == ids.shape[0]}
    for node in model.graph.all_nodes():
        axes = _axes(node) if node.op_type == "Shape" else range(0)
        if len(axes) > 1 and 0 in axes:
            raise ExportError(
                f"a module of the decoder reads the batch together with other sizes ({shown(node.name)}), so that rows "
                "of one text cannot share the encoder's states; read each size on its own, such as x.shape[0]"
            )
        if 0 in axes and node.inputs[0] in others:
            node.replace_input_with(0, ids)


def _axes(node: ir.Node) -> range:
    """The axes of which a Shape node gives the sizes; of a tensor of unknown axes, as if it had two."""
    start, end = node.attributes.get("start"), node.attributes.get("end")
    value = node.inputs[0]
    rank = 2 if value is None or value.shape is None else len(value.shape)
    return range(rank)[(start.as_int() if start else 0) : (end.as_int() if end else None)]
