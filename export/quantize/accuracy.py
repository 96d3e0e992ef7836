"""Measuring the accuracy of an int8 model against the float32 bundle, on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfx.export.quantize.calibration import Feeds
from lfx.parity import Case, Report, compare
from lfx.runtime import Engine
from lfx.runtime.backends import OnnxRuntime
from lfx.runtime.postprocess import settings
from lfx.runtime.runner import engine_runner
from lfx.signature import Signature, is_multi_label

Progress = Callable[[str], None]


def summary(report: Report) -> dict[str, Any]:
    """Return the manifest's entry `accuracy` for a comparison."""
    outputs = {}
    for name, result in report.outputs.items():
        agreement = {"label_agreement": result.label_agreement()} if result.labels else {}
        outputs[name] = {
            "max_abs_error": result.error,
            "unfused_max_abs_error": result.witness_error,
            "tolerance": report.tolerance(name),
            "max_abs_value": result.magnitude,
            "cosine": result.cosine(),
            **agreement,
        }
    return {"reference": "the float32 bundle, on text held out of the calibration", "outputs": outputs}


def measure_accuracy(
    bundle: Path, model: Path, held_out: list[Feeds], signature: Signature, progress: Progress
) -> Report:
    """Compare an int8 model with its float32 bundle.

    The witness is the int8 graph, run without fusion to integer kernels: its MatMuls compute in float32.

    Args:
        held_out: windows that were not used for calibration.
    """
    cases = iter(held_out)
    unfused = OnnxRuntime(model, "cpu", None, fused=False)
    with Engine(bundle, "onnxruntime") as original, Engine(model, "onnxruntime") as quantized:
        return compare(
            [Case(1, feeds["input_ids"].shape[1], "the task's") for feeds in held_out],
            lambda case: next(cases),
            reference=engine_runner(original),
            witness=unfused.infer,
            candidate=engine_runner(quantized),
            precision="int8",
            layers=len(signature.attention_windows),
            names=("the float32 bundle", "the same graph with its integers in float32"),
            multi_label=is_multi_label(signature, settings(bundle / "config.json").get("problem_type")),
            on_case=lambda case: progress(f"measuring accuracy: {case}"),
        )
