"""The ONNX Runtime backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lfx.errors import ArtifactError, DependencyError, LfxError, one_line, require, with_cure
from lfx.runtime.backends.interface import AnyShape, Arrays

# On the CPU the fused SkipLayerNormalization is slower than Add and LayerNormalization: 2 % of longformer-base's time.
SLOWER_ON_CPU = ["SkipLayerNormFusion"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class OnnxRuntime(AnyShape):
    """ONNX Runtime on one execution provider."""

    def __init__(self, model: Path, provider: str, threads: int | None, *, fused: bool = True) -> None:
        """Load an ONNX file.

        Args:
            provider: a key of `PROVIDERS`.
            threads: intra-op threads; None = ONNX Runtime's default.
            fused: whether graph optimizations run. Without them a quantized layer is computed in float32 between its
                QuantizeLinear and DequantizeLinear nodes.
        """
        if provider not in PROVIDERS:
            raise DependencyError(f"provider {provider!r} is not known; choose one of: {', '.join(PROVIDERS)}")
        ort = require("onnxruntime", "cpu" if provider == "cpu" else "gpu")
        provider_name = PROVIDERS[provider]
        if provider_name not in ort.get_available_providers():
            raise DependencyError(
                f"this onnxruntime {ort.__version__} has no {provider_name}; install it with: "
                "pip install 'longformer-lfx[gpu]', or use provider='cpu'"
            )
        self._make_tensor = ort.OrtValue.ortvalue_from_numpy
        # Cached keys and values stay in the memory of the device.
        self._device = "cpu" if provider == "cpu" else "cuda"
        options = _session_options(ort, threads, fused)
        disabled = SLOWER_ON_CPU if provider == "cpu" else []
        try:
            self._session = ort.InferenceSession(
                str(model), options, providers=[provider_name], disabled_optimizers=disabled
            )
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error):
                raise DependencyError(
                    f"ONNX Runtime has no {provider} kernel for this model ({one_line(error, 160)}); run it with "
                    "backend='openvino' (pip install 'longformer-lfx[openvino]'), or export it with --precision fp32"
                ) from error
            raise ArtifactError(f"{model} cannot be loaded by ONNX Runtime: {with_cure(error)}") from error
        if self._session.get_providers()[0] != provider_name:
            raise DependencyError(
                f"ONNX Runtime could not start {provider_name} and offers {self._session.get_providers()[0]} instead; "
                "check the driver and the CUDA libraries, or use provider='cpu'"
            )
        self.name = f"onnxruntime {ort.__version__} {provider_name}"
        self.input_names = [item.name for item in self._session.get_inputs()]
        self.output_names = [item.name for item in self._session.get_outputs()]

    def infer(self, feeds: Arrays) -> Arrays:
        """Run one batch."""
        try:
            outputs = self._session.run(self.output_names, feeds)
        except Exception as error:
            raise LfxError(f"ONNX Runtime failed: {with_cure(error)}") from error
        return dict(zip(self.output_names, outputs, strict=True))

    def tensor(self, array: NDArray[Any]) -> Any:
        """An OrtValue with the array's own memory."""
        return self._make_tensor(array)

    def array(self, tensor: Any) -> NDArray[Any]:
        """A copy of an OrtValue."""
        array: NDArray[Any] = tensor.numpy()
        return array

    def infer_tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Run one batch of OrtValues."""
        try:
            binding = self._session.io_binding()
            for name, value in tensors.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.output_names:
                binding.bind_output(name, self._device)
            self._session.run_with_iobinding(binding)
            outputs = binding.get_outputs()
        except Exception as error:
            raise LfxError(f"ONNX Runtime failed: {with_cure(error)}") from error
        return dict(zip(self.output_names, outputs, strict=True))


def _session_options(ort: Any, threads: int | None, fused: bool) -> Any:
    """ONNX Runtime's SessionOptions for these options."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # With memory patterns ONNX Runtime allocates a block for each new shape besides the arena. At 4,096 tokens of
    # longformer-base the peak memory is 2.0 GB with patterns and 1.4 GB without, at the same speed.
    options.enable_mem_pattern = False
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
