"""ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from lfx.errors import ArtifactError, DependencyError, LfxError, one_line, require, with_cure
from lfx.runtime.backends.interface import AnyShape, Arrays

# The fused SkipLayerNormalization is slower on the CPU than Add and LayerNormalization apart: 2 % of the base shape.
SLOWER_ON_CPU = ["SkipLayerNormFusion"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class OnnxRuntime(AnyShape):
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
