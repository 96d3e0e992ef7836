"""The backends that run an ONNX file, all with the interface `interface.Backend`.

A backend that is named explicitly is used or is an error; none falls back to another device or library. To add a
backend: a module here with a class like `reference.Reference`, its name in `BACKENDS` and a branch in `load`; its name
in the docstring of `Engine` and in the help of `--backend` (`lfx.cli.engine`); if it has CPU threads, its name in
`serve.supervisor.supervise`, which divides the cores; its package in `lfx.cli.bench`, whose records have the version;
an extra in pyproject.toml; rows in docs/backends.md, and name and extra in docs/commands.md.
"""

from __future__ import annotations

import os
from pathlib import Path

from lfx.errors import DependencyError
from lfx.machine import usable_cores
from lfx.runtime.backends.interface import Backend, TensorBackend
from lfx.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntime
from lfx.runtime.backends.openvino import OpenVino
from lfx.runtime.backends.reference import Reference

__all__ = ["BACKENDS", "PROVIDERS", "Backend", "OnnxRuntime", "OpenVino", "Reference", "TensorBackend", "load"]

BACKENDS = ("onnxruntime", "openvino", "reference")


def load(
    model: Path,
    backend: str,
    provider: str,
    threads: int | None,
    precision: str | None,
    stored_precision: str,
    kernels: str = "function",
) -> TensorBackend:
    """Load an ONNX file into a backend.

    Args:
        model: the ONNX file, with its weights beside it; no symbolic links.
        backend: one of `BACKENDS`.
        provider: ONNX Runtime's execution provider, a key of `PROVIDERS`; "cpu" for the other backends.
        threads: number of CPU threads of a run; None = the backend's default, or the cores that this process may use if
            the machine has more.
        precision: OpenVINO compute precision; None = the file's.
        stored_precision: precision of the file.
        kernels: those of ONNX Runtime; see `OnnxRuntime`.
    Raises:
        DependencyError: the backend is not known, not installed, or cannot run this model.
        ArtifactError: the backend cannot load the file.
    """
    if backend == "tensorrt":
        raise DependencyError(f"{model} is no plan, and TensorRT runs plans; build one with: lfx build-engine")
    if precision is not None and backend != "openvino":
        raise DependencyError(
            f"precision {precision!r} is an option of OpenVINO; give backend='openvino', or export or build the "
            "model in that precision"
        )
    if threads is None and backend != "reference" and (cores := usable_cores()) < (os.cpu_count() or 1):
        threads = cores
    if backend == "onnxruntime":
        return OnnxRuntime(model, provider, threads, kernels=kernels)
    if provider != "cpu":
        raise DependencyError(
            f"provider {provider!r} is an option of ONNX Runtime; backend {backend!r} runs on the CPU"
        )
    if backend == "openvino":
        return OpenVino(model, threads, precision, stored_precision)
    if backend == "reference" and threads is not None:
        raise DependencyError(f"threads is {threads}, and the reference evaluator has one thread; leave threads out")
    if backend == "reference":
        return Reference(model)
    raise DependencyError(f"backend {backend!r} is not known; choose one of: auto, {', '.join(BACKENDS)}")
