"""The backends that run an ONNX file: one shape, `infer(feeds) -> outputs`, over each library.

A backend that was asked for by name is that one or an error: none falls back to another device or library.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ArtifactError, DependencyError, LfxError, one_line, require, with_cure
from lfx.files import link_or_copy, temporary_folder
from lfx.machine import cpu_fields
from lfx.onnx_file import read_header
from lfx.runtime import forks

Arrays = dict[str, NDArray[Any]]

OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}
# The fused SkipLayerNormalization is slower on the CPU than Add and LayerNormalization apart: 2 % of the base shape.
SLOWER_ON_CPU = ["SkipLayerNormFusion"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Backend(Protocol):
    """A loaded model.

    Attributes:
        name: library, version and device, for people.
        input_names, output_names: of the graph, in its order.
    """

    name: str
    input_names: list[str]
    output_names: list[str]

    def infer(self, feeds: Arrays) -> Arrays:
        """Run one batch; safe to call from several threads."""
        ...

    def takes(self, batch: int, seqlen: int) -> bool:
        """Whether it takes a batch of this shape."""
        ...


class _AnyShape:
    """What every backend of ONNX files takes."""

    def takes(self, batch: int, seqlen: int) -> bool:
        """Any shape."""
        return True


def int8_overflows() -> bool:
    """Whether this CPU adds pairs of int8 products in 16 bits, which weights of 8 bits overflow: x86 without VNNI.

    ONNX Runtime and OpenVINO are both wrong there, in silence. False where the system does not say what its CPU has.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    flags = cpu_fields().get("flags", "").split()
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)


class OnnxRuntime(_AnyShape):
    """ONNX Runtime on one execution provider."""

    def __init__(self, model: Path, provider: str, threads: int | None, *, fused: bool = True) -> None:
        """`fused` False runs the nodes as they stand in the file: quantized layers in float32 between their scales."""
        if provider not in PROVIDERS:
            raise DependencyError(f"provider {provider!r} is not known; choose one of: {', '.join(PROVIDERS)}")
        ort = require("onnxruntime", "cpu" if provider == "cpu" else "gpu")
        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            raise DependencyError(
                f"this onnxruntime {ort.__version__} has no {wanted}; install it with: "
                "pip install 'longformer-lfx[gpu]', or use provider='cpu'"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # The memory pattern of each new shape is kept beside the arena's own blocks: at 4,096 tokens of the base
        # shape it raises the peak from 1.4 to 2.0 GB, and makes nothing faster.
        options.enable_mem_pattern = False
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        slower = SLOWER_ON_CPU if provider == "cpu" else []
        try:
            self._session = ort.InferenceSession(str(model), options, providers=[wanted], disabled_optimizers=slower)
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error):
                raise DependencyError(
                    f"ONNX Runtime has no {provider} kernel for this model ({one_line(error, 160)}); run it with "
                    "backend='openvino' (pip install 'longformer-lfx[openvino]'), or export it with --precision fp32"
                ) from error
            raise ArtifactError(f"{model} cannot be loaded by ONNX Runtime: {with_cure(error)}") from error
        if self._session.get_providers()[0] != wanted:
            raise DependencyError(
                f"ONNX Runtime could not start {wanted} and offers {self._session.get_providers()[0]} instead; "
                "check the driver and the CUDA libraries, or use provider='cpu'"
            )
        self.name = f"onnxruntime {ort.__version__} {wanted}"
        self.input_names = [item.name for item in self._session.get_inputs()]
        self.output_names = [item.name for item in self._session.get_outputs()]

    def infer(self, feeds: Arrays) -> Arrays:
        """One batch."""
        try:
            found = self._session.run(self.output_names, feeds)
        except Exception as error:
            raise LfxError(f"ONNX Runtime failed: {with_cure(error)}") from error
        return dict(zip(self.output_names, found, strict=True))


class OpenVino(_AnyShape):
    """OpenVINO on the CPU, with the lfx functions inlined for it; it computes bf16 models, in float32 without AMX."""

    # Where OpenVINO first loaded a model. Its models share threads: in a child of that process, loading another one may
    # wait for the parent's threads, for ever.
    _generation: int | None = None

    def __init__(self, model: Path, threads: int | None, precision: str | None, stored: str) -> None:
        """`precision` of the arithmetic, None for that of the file, which is `stored`."""
        if precision is not None and precision not in OPENVINO_TYPES:
            raise DependencyError(
                f"precision {precision!r} is not known to OpenVINO here; choose one of: {', '.join(OPENVINO_TYPES)}"
            )
        openvino = require("openvino", "openvino")
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
                config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
                if precision is not None:
                    config["INFERENCE_PRECISION_HINT"] = OPENVINO_TYPES[precision]
                elif stored != "bf16":
                    # On a CPU with AMX the default computes float32 models in bfloat16, in silence.
                    config["INFERENCE_PRECISION_HINT"] = "f32"
                if threads is not None:
                    config["INFERENCE_NUM_THREADS"] = threads
                if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                    raise DependencyError(
                        "this CPU has no bfloat16 arithmetic (AMX, or AVX-512 with bf16), so OpenVINO would compute in "
                        "float32; leave precision out"
                    )
                self._compiled = core.compile_model(core.read_model(str(inlined)), "CPU", config)
        except LfxError:
            raise
        except Exception as error:
            raise ArtifactError(f"{model} cannot be loaded by OpenVINO: {with_cure(error)}") from error
        self.name = f"openvino {openvino.__version__.split('-')[0]} CPU"
        # A port may have several names; the graph's own order tells which output is which.
        self.input_names = [item.name for item in graph.graph.input]
        self.output_names = [item.name for item in graph.graph.output]

    def infer(self, feeds: Arrays) -> Arrays:
        """One batch, in a request of its own."""
        try:
            found = self._compiled.create_infer_request().infer(feeds)
        except Exception as error:
            raise LfxError(f"OpenVINO failed: {with_cure(error)}") from error
        return {name: np.array(found[i]) for i, name in enumerate(self.output_names)}


class Reference(_AnyShape):
    """The reference evaluator of the onnx package: every precision, plain numpy, slow."""

    def __init__(self, model: Path) -> None:
        onnx = require("onnx", "export")
        evaluator = require("onnx.reference", "export")
        try:
            self._evaluator = evaluator.ReferenceEvaluator(str(model))
        except Exception as error:
            raise ArtifactError(f"{model} cannot be loaded by onnx: {with_cure(error)}") from error
        self.name = f"onnx {onnx.__version__} reference evaluator"
        self.input_names = list(self._evaluator.input_names)
        self.output_names = list(self._evaluator.output_names)

    def infer(self, feeds: Arrays) -> Arrays:
        """One batch."""
        try:
            found = self._evaluator.run(self.output_names, feeds)
        except Exception as error:
            raise LfxError(f"the reference evaluator failed: {with_cure(error)}") from error
        return dict(zip(self.output_names, (np.asarray(value) for value in found), strict=True))


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
