"""Comparing an exported model with the PyTorch model that it was exported from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from lfx.errors import InputError
from lfx.export.expose_layers import LAYER_END, layer_name
from lfx.export.led import GenerationEncoder
from lfx.export.pooling import LongformerForSentenceEmbedding
from lfx.export.probe import forward_inputs, granularity, is_unchanged, longest_trial
from lfx.export.rewrite import attention_layers
from lfx.export.teacher_forcing import compare_generation, load_decoder
from lfx.export.torch_runners import int8_runner, reference_runner, torch_runner
from lfx.parity import UNIT_ROUNDOFF, Case, Report, compare, quick_cases
from lfx.runtime import Engine, backends
from lfx.runtime.runner import engine_runner, model_inputs
from lfx.signature import ATTENTIONS, GLOBAL_ATTENTIONS, QUANTIZED, Signature, is_multi_label


def validate(path: Path, module: nn.Module, signature: Signature, progress: Callable[[str], None]) -> dict[str, Any]:
    """Compare an ONNX file with PyTorch over `parity.quick_cases`; in half precision, changed models on a long one too.

    Returns:
        The entry `validation` of `lfx.json`; it has the errors of the quick cases.
    Raises:
        ParityError: an output is out of tolerance; the message names the output, the case and the error.
    """
    progress("comparing: opening the bundle")
    with Engine(path, validation_backend(signature)) as engine:
        report = compare_engine(engine, module, quick_cases, progress)
        report.require()
        if signature.precision != "fp32" and not is_unchanged(module):
            _compare_long(engine, module, progress).require()
        return {"backend": engine.backend, "witness": f"torch {version('torch')}", **report.to_dict()}


def validate_generation(
    path: Path, module: nn.Module, signature: Signature, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compare the ONNX files of a bundle with PyTorch over `parity.quick_cases`.

    Args:
        path: the encoder's ONNX file; the decoder's is beside it.
        module: the LEDForConditionalGeneration, in float32.
    Returns:
        The entry `validation` of `lfx.json`.
    Raises:
        ParityError: an output is out of tolerance; the message names the output, the case and the error.
    """
    assert signature.decoder is not None
    progress("comparing: opening the bundle")
    files, backend = (path, path.with_name(signature.decoder.model_file)), validation_backend(signature)
    encoder, decoder = (backends.load(file, backend, "cpu", None, None, signature.precision) for file in files)
    cases = quick_cases(max(signature.attention_windows), signature.max_seqlen)
    precision = signature.precision
    report = compare_generation(encoder.infer, decoder.infer, module, signature, cases, progress, precision)
    report.require()
    return {"backend": encoder.name, "witness": f"torch {version('torch')}", **report.to_dict()}


def _compare_long(engine: Engine, module: nn.Module, progress: Callable[[str], None]) -> Report:
    """Compare an Engine with float32 PyTorch on the longest sequence, of at most 4,096 tokens.

    On a long sequence, positions that a module computes in half precision are rounded, in the graph and in PyTorch.
    Attention probabilities are not compared, since those of a long sequence take gigabytes.
    """
    signature, inputs = engine.signature, forward_inputs(module)
    run, attentions = engine_runner(engine), signature.attention_outputs
    return compare(
        [Case(1, max(longest_trial(module, signature), 1), "first")],
        lambda case: model_inputs(case, signature),
        reference=torch_runner(module, "fp32", inputs),
        witness=torch_runner(module, signature.precision, inputs),
        candidate=lambda feeds: {name: out for name, out in run(feeds).items() if name not in attentions},
        precision=signature.precision,
        layers=attention_layers(module),
        names=("PyTorch in float32", "PyTorch"),
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def compare_engine(
    engine: Engine,
    module: nn.Module,
    cases: Callable[[int, int | None, int], list[Case]],
    progress: Callable[[str], None],
    *,
    quantization: Mapping[str, Any] | None = None,
    by_layer: bool = False,
) -> Report:
    """Compare an Engine with its PyTorch model over a list of cases.

    A model that writes texts is compared with given texts, see `lfx.export.teacher_forcing`; by layer, its encoder is.

    Args:
        module: the float32 model that the engine was exported from.
        cases: a function of window, max_seqlen and the multiple that lengths must be, such as `parity.full_cases`.
            Cases outside the profile of a plan are left out.
        quantization: the manifest's entry, for an int8 model.
        by_layer: compare each attention layer too, and in int8 the last layer's output; the engine's file was written
            by `expose_layers`.
    Raises:
        InputError: all cases are outside the profile of the plan.
    """
    progress("comparing: loading the references")
    signature = engine.signature
    whole, module = module, GenerationEncoder(module) if signature.decoder is not None else module
    if isinstance(module, LongformerForSentenceEmbedding):
        module.gives_hidden_states = any(spec.name == "last_hidden_state" for spec in signature.outputs)
    inputs = forward_inputs(module)
    layers, attentions = len(signature.attention_windows), signature.attention_outputs
    all_cases = cases(max(signature.attention_windows), signature.max_seqlen, granularity(module))
    supported = [case for case in all_cases if engine.supports_shape(case.batch, case.seqlen)]
    if not supported:
        raise InputError("the plan was built for none of the lengths and batches that are compared; give --cases full")
    # The tolerance follows the coarser of the bundle's and the engine's precision; an int8 model's stays int8.
    precision = max(signature.precision, engine.precision, key=UNIT_ROUNDOFF.__getitem__)
    floats = "fp32" if engine.precision == QUANTIZED else engine.precision
    if signature.decoder is not None and not by_layer:
        run, decoder = engine_runner(engine), load_decoder(engine)
        precision = QUANTIZED if quantization else precision
        return compare_generation(
            run, decoder.infer, whole, signature, supported, progress, precision, quantization, float_precision=floats
        )
    modules = [spec.name for spec in signature.outputs if by_layer and LAYER_END.search(spec.name)]
    if quantization:
        precision = QUANTIZED
        part = GenerationEncoder if signature.decoder is not None else lambda model: model
        witness = int8_runner(whole, quantization, inputs, by_layer=by_layer, part=part, modules=modules)
    else:
        witness = torch_runner(module, precision, inputs, by_layer=by_layer, attentions=attentions)
    return compare(
        supported,
        lambda case: model_inputs(case, signature),
        reference=reference_runner(module, inputs, by_layer=by_layer, attentions=attentions, modules=modules),
        witness=witness,
        candidate=engine_runner(engine),
        precision=precision,
        layers=attention_layers(module),
        depth={
            "encoder_last_hidden_state": layers,
            **{
                name: i + 1
                for i in range(layers)
                for name in (layer_name(i), f"{ATTENTIONS}.{i}", f"{GLOBAL_ATTENTIONS}.{i}")
            },
        },
        probabilities=attentions,
        float_precision=floats,
        multi_label=is_multi_label(signature, getattr(getattr(module, "config", None), "problem_type", None)),
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def validation_backend(signature: Signature) -> str:
    """Return the backend that validates: ONNX Runtime; for bf16 OpenVINO, or "reference" if it is not installed.

    ONNX Runtime has few CPU kernels for bf16.
    """
    if signature.precision != "bf16":
        return "onnxruntime"
    return "openvino" if find_spec("openvino") is not None else "reference"
