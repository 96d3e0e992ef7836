"""Run an exported model against the PyTorch model that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from lfx.errors import InputError
from lfx.export.expose_layers import layer_name
from lfx.export.probe import forward_inputs, granularity
from lfx.export.torch_runners import int8_runner, reference_runner, torch_runner
from lfx.parity import UNIT_ROUNDOFF, Case, Report, compare, quick_cases
from lfx.runtime import Engine
from lfx.runtime.runner import engine_runner, model_inputs
from lfx.signature import QUANTIZED, Signature, is_multi_label


def validate(path: Path, module: nn.Module, signature: Signature, progress: Callable[[str], None]) -> dict[str, Any]:
    """Compare the file with PyTorch over `parity.quick_cases`.

    Returns:
        What `lfx.json` records under `validation`.
    Raises:
        ParityError: an output is out of tolerance; names output, case and distance.
    """
    with Engine(path, _backend(signature)) as engine:
        report = compare_engine(engine, module, quick_cases, progress)
        report.require()
        return {"backend": engine.backend, "witness": f"torch {version('torch')}", **report.to_dict()}


def compare_engine(
    engine: Engine,
    module: nn.Module,
    cases: Callable[[int, int | None, int], list[Case]],
    progress: Callable[[str], None],
    *,
    quantization: Mapping[str, Any] | None = None,
    by_layer: bool = False,
) -> Report:
    """Run an Engine beside its PyTorch model over a list of cases.

    Args:
        module: the float32 model that the engine was exported from.
        cases: from window, max_seqlen and the multiple that lengths must be, such as `parity.full_cases`. Those that
            a plan was not built for are left out.
        quantization: of the manifest, for an int8 model.
        by_layer: the engine is of a file that `expose_layers` made; compare every attention layer too.
    Raises:
        InputError: a plan that was built for none of the cases.
    """
    progress("comparing: loading the references")
    signature, inputs = engine.signature, forward_inputs(module)
    layers = len(signature.attention_windows)
    wanted = cases(max(signature.attention_windows), signature.max_seqlen, granularity(module))
    fitting = [case for case in wanted if engine.supports_shape(case.batch, case.seqlen)]
    if not fitting:
        raise InputError("the plan was built for none of the lengths and batches that are compared; give --cases full")
    # Of the bundle's precision and the arithmetic's, the coarser one; integers stay what they are.
    precision = max(signature.precision, engine.precision, key=UNIT_ROUNDOFF.__getitem__)
    if quantization:
        precision = QUANTIZED
        witness = int8_runner(module, quantization, inputs, by_layer=by_layer)
    else:
        witness = torch_runner(module, precision, inputs, by_layer=by_layer)
    return compare(
        fitting,
        lambda case: model_inputs(case, signature),
        reference=reference_runner(module, inputs, by_layer=by_layer),
        witness=witness,
        candidate=engine_runner(engine),
        precision=precision,
        layers=layers,
        depth={layer_name(i): i + 1 for i in range(layers)},
        multi_label=is_multi_label(signature, getattr(getattr(module, "config", None), "problem_type", None)),
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def _backend(signature: Signature) -> str:
    """ONNX Runtime; for bf16, which it has few CPU kernels for, OpenVINO where installed, or onnx's own evaluator."""
    if signature.precision != "bf16":
        return "onnxruntime"
    return "openvino" if find_spec("openvino") is not None else "reference"
