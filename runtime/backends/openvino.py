"""OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lfx.errors import ArtifactError, DependencyError, LfxError, require, with_cure
from lfx.files import link_or_copy, temporary_folder
from lfx.onnx_file import read_header
from lfx.runtime import forks
from lfx.runtime.backends.interface import AnyShape, Arrays

OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}


class OpenVino(AnyShape):
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
