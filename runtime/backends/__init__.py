"""The backends that run an ONNX file: one shape, `infer(feeds) -> outputs`, over each library.

A backend that was asked for by name is that one or an error: none falls back to another device or library. A new one is
a module here that has what `interface.Backend` says, and a line in `load`.
"""

from __future__ import annotations

from pathlib import Path

from lfx.errors import DependencyError
from lfx.runtime.backends.interface import Backend
from lfx.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntime
from lfx.runtime.backends.openvino import OpenVino
from lfx.runtime.backends.reference import Reference

__all__ = ["BACKENDS", "PROVIDERS", "Backend", "OnnxRuntime", "OpenVino", "Reference", "load"]

BACKENDS = ("onnxruntime", "openvino", "reference")


def load(
    model: Path, backend: str, provider: str, threads: int | None, precision: str | None, stored_precision: str
) -> Backend:
    """Open an ONNX file whose weights are plain files beside it.

    Args:
        precision: of the arithmetic; None for that of the file, which is `stored_precision`.
    Raises:
        DependencyError: the backend is not known, not installed, or cannot run this model.
        ArtifactError: the file is no model that it can read.
    """
    if backend == "tensorrt":
        raise DependencyError(f"{model} is no plan, and TensorRT runs plans; build one with: lfx build-engine")
    if precision is not None and backend != "openvino":
        raise DependencyError(
            f"precision {precision!r} is OpenVINO's; give backend='openvino', or export or build the model in it"
        )
    if backend == "onnxruntime":
        return OnnxRuntime(model, provider, threads)
    if provider != "cpu":
        raise DependencyError(f"provider {provider!r} is ONNX Runtime's; backend {backend!r} runs on the CPU")
    if backend == "openvino":
        return OpenVino(model, threads, precision, stored_precision)
    if backend == "reference" and threads is not None:
        raise DependencyError(f"threads {threads} cannot be had: the reference evaluator has one; leave threads out")
    if backend == "reference":
        return Reference(model)
    raise DependencyError(f"backend {backend!r} is not known; choose one of: auto, {', '.join(BACKENDS)}")
