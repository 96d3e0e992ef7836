"""Run an exported model against the PyTorch model that it came from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.longformer import modeling_longformer as hf

from lfx.config import GRAPH_INPUTS, Signature
from lfx.export.rewrite import attention_windows
from lfx.export.runners import reference_runner, torch_runner
from lfx.parity import Case, Report, compare, quick_cases
from lfx.runtime import Engine
from lfx.runtime.conversion import engine_runner, model_inputs


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
) -> Report:
    """Run an Engine beside its PyTorch model over a list of cases.

    Args:
        module: the float32 model that the engine was exported from.
        cases: from window, max_seqlen and the multiple that lengths must be, such as `parity.full_cases`.
    """
    progress("comparing: loading the references")
    signature, inputs = engine.signature, forward_inputs(module)
    return compare(
        cases(max(signature.attention_windows), signature.max_seqlen, granularity(module)),
        lambda case: model_inputs(case, signature),
        reference=reference_runner(module, inputs),
        witness=torch_runner(module, signature.precision, inputs),
        candidate=engine_runner(engine),
        precision=signature.precision,
        layers=len(signature.attention_windows),
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def granularity(module: nn.Module) -> int:
    """What a sequence length must be a multiple of in PyTorch: 1 where a LongformerModel does the padding."""
    if any(isinstance(m, hf.LongformerModel) for m in module.modules()):
        return 1
    return 2 * max(attention_windows(module))


def forward_inputs(module: nn.Module) -> tuple[str, ...]:
    """The graph inputs that `module.forward` takes."""
    takes = inspect.signature(module.forward).parameters
    return tuple(name for name in GRAPH_INPUTS if name in takes)


def _backend(signature: Signature) -> str:
    """ONNX Runtime; for bf16, which it has few CPU kernels for, OpenVINO where installed, or onnx's own evaluator."""
    if signature.precision != "bf16":
        return "onnxruntime"
    return "openvino" if find_spec("openvino") is not None else "reference"
