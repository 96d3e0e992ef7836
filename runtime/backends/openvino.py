"""The OpenVINO backend."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ArtifactError, DependencyError, LfxError, require, with_cure
from lfx.files import link_or_copy, temporary_folder
from lfx.onnx_file import read_header
from lfx.runtime import forks
from lfx.runtime.backends.interface import AnyShape, Arrays, HostTensors

OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}


# OpenVINO keeps kernels for each shape of input that it has met, 5,000 of them by default, which takes gigabytes where
# the lengths vary.
_CACHED_KERNELS = 100


class OpenVino(AnyShape, HostTensors):
    """OpenVINO on the CPU, which needs the lfx functions inlined. Without AMX it computes bf16 models in float32."""

    # `forks.generation` of the process that first loaded a model. All of OpenVINO's models share one thread pool: in a
    # forked child of that process, loading another model may hang, waiting for the parent's threads.
    _generation: int | None = None

    def __init__(self, model: Path, threads: int | None, precision: str | None, stored: str) -> None:
        """Load an ONNX file.

        Args:
            threads: number of threads of a run; None = OpenVINO's default.
            precision: compute precision, "fp32" or "bf16"; None = the file's.
            stored: precision of the file.
        """
        if precision is not None and precision not in OPENVINO_TYPES:
            raise DependencyError(
                f"OpenVINO takes no precision {precision!r}; choose one of: {', '.join(OPENVINO_TYPES)}"
            )
        openvino = _import_openvino()
        onnx = require("onnx", "openvino")
        inliner = require("onnx.inliner", "openvino")
        if OpenVino._generation not in (None, forks.generation()):
            raise DependencyError(
                "OpenVINO was used before this process was forked, and may hang here; open the first Engine after the "
                "fork, start processes with spawn, or use backend='onnxruntime'"
            )
        OpenVino._generation = forks.generation()
        try:
            graph = onnx.load(str(model), load_external_data=False)
            with temporary_folder("openvino") as folder:
                inlined = folder / model.name
                onnx.save(inliner.inline_local_functions(graph), str(inlined))
                for name in read_header(model).weights:
                    link_or_copy(model.parent / name, folder / name)
                core = openvino.Core()
                config = _config(core, threads, precision, stored)
                self._compiled = core.compile_model(core.read_model(str(inlined)), "CPU", config)
        except LfxError:
            raise
        except Exception as error:
            raise ArtifactError(f"{model} cannot be loaded by OpenVINO: {with_cure(error)}") from error
        self._make_tensor = openvino.Tensor
        # The compiled model keeps the addresses of the last request's inputs, and uses them when the next begins. If
        # their memory is freed, `infer` after `infer_tensors` gives wrong numbers or aborts (OpenVINO 2026.4).
        self._inputs: dict[object, Mapping[str, Any]] = {}  # those of the last request
        self._lock = threading.RLock()  # of one request at a time, and those of a signal handler that interrupts it
        self.name = f"openvino {openvino.__version__.split('-')[0]} CPU"
        # An OpenVINO port may have several names, so outputs are identified by their order in the graph.
        self.input_names = [item.name for item in graph.graph.input]
        self.output_names = [item.name for item in graph.graph.output]

    def infer(self, feeds: Arrays, outputs: Sequence[str] | None = None, *, on_device: bool = False) -> Arrays:
        """Run one batch, in a new infer request; only the requested outputs are copied."""
        try:
            results = self._compiled.create_infer_request().infer(feeds)
        except Exception as error:
            raise LfxError(f"OpenVINO failed: {with_cure(error)}") from error
        names = self.output_names if outputs is None else outputs
        return {name: np.array(results[self.output_names.index(name)]) for name in names}

    def tensor(self, array: NDArray[Any]) -> Any:
        """A Tensor with the array's own memory."""
        return self._make_tensor(np.ascontiguousarray(array), shared_memory=array.size > 0)

    def array(self, tensor: Any) -> NDArray[Any]:
        """The memory of a Tensor."""
        array: NDArray[Any] = tensor.data
        return array

    def infer_tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Run one batch of Tensors, in a new infer request, which the outputs keep."""
        try:
            request = self._compiled.create_infer_request()
            for name, tensor in tensors.items():
                request.set_tensor(name, tensor)
            with self._lock:
                earlier, key = list(self._inputs), object()
                self._inputs[key] = inputs = dict(tensors)  # before it runs: an interrupt may come as soon as it ends
                request.infer()
                self._inputs[key] = inputs  # again: a request of a signal handler drops those before it
                for other in earlier:
                    self._inputs.pop(other, None)
            return {name: request.get_output_tensor(i) for i, name in enumerate(self.output_names)}
        except Exception as error:
            raise LfxError(f"OpenVINO failed: {with_cure(error)}") from error


def _import_openvino() -> ModuleType:
    """Import openvino without openvino_telemetry, unless that is imported already.

    With it, the import of openvino writes to ~/intel and sends a usage event from a fork of the process, which is
    blocked for seconds where a firewall drops it.

    Raises:
        DependencyError: openvino is not installed, or its import fails.
    """
    name = "openvino_telemetry"
    modules: dict[str, Any] = sys.modules
    modules.setdefault(name, None)  # its import raises ModuleNotFoundError, for which openvino has a substitute
    try:
        return require("openvino", "openvino")
    finally:
        if modules.get(name, name) is None:
            modules.pop(name, None)


def _config(core: Any, threads: int | None, precision: str | None, stored: str) -> dict[str, Any]:
    """OpenVINO's properties for these options.

    Raises:
        DependencyError: bf16 was requested and the CPU has no bf16 arithmetic.
    """
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise DependencyError(
            "this CPU has no bfloat16 arithmetic (AMX, or AVX-512 with bf16), so OpenVINO would compute in float32; "
            "leave precision out"
        )
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "CPU_RUNTIME_CACHE_CAPACITY": _CACHED_KERNELS,
        # By default OpenVINO rounds the activations of layers whose weights are stored in int8, without a warning.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = OPENVINO_TYPES[precision]
    elif stored != "bf16":
        # By default OpenVINO computes float32 models in bfloat16 on a CPU with AMX, without a warning.
        config["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    return config
