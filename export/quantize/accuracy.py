"""Measuring the accuracy of an int8 model against the float32 bundle, on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfx.errors import ExportError, ParityError
from lfx.export.quantize.calibration import Feeds
from lfx.parity import LABEL_OUTPUTS, Case, Report, compare
from lfx.runtime import Engine
from lfx.runtime.backends import OnnxRuntime
from lfx.runtime.postprocess import settings
from lfx.runtime.runner import engine_runner
from lfx.signature import Signature, is_multi_label

Progress = Callable[[str], None]
_NO_LABELS = "min_agreement is for models with labels or texts, and this one has neither; leave it out"


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


def check_min_agreement(least: float | None, signature: Signature) -> None:
    """Raise ExportError if an agreement is asked for, and the model has neither labels nor texts."""
    names = {spec.name for spec in signature.outputs}
    if least is not None and signature.decoder is None and names.isdisjoint(LABEL_OUTPUTS):
        raise ExportError(_NO_LABELS)


def require_agreement(accuracy: dict[str, Any], least: float) -> None:
    """Check the share of tokens of texts, or of the labels of each output, that agree with the float32 model.

    Args:
        accuracy: the manifest's entry.
        least: 0 to 1.
    Raises:
        ExportError: the model has no labels, since its outputs have a single entry.
        ParityError: a share is smaller than `least`.
    """
    shares = {
        f"labels of {name}": result["label_agreement"]
        for name, result in accuracy["outputs"].items()
        if "label_agreement" in result
    }
    if "texts" in accuracy:
        shares = {"tokens of greedy search": accuracy["texts"]["token_agreement"]}
    if not shares:
        raise ExportError(_NO_LABELS)
    for name, share in shares.items():
        if share < least:
            raise ParityError(
                f"{share:.1%} of the {name} agree with the float32 model, below the {least:.1%} of min_agreement; keep "
                "layers in float32 with keep_float, or calibrate on more text"
            )


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
