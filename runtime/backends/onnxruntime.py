"""The ONNX Runtime backend."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ArtifactError, DependencyError, LfxError, one_line, require, with_cure
from lfx.runtime import custom_ops
from lfx.runtime.backends.interface import AnyShape, Arrays, HostTensors
from lfx.runtime.dlpack import CPU, CUDA, DeviceArray

# On the CPU the fused SkipLayerNormalization is slower than Add and LayerNormalization: 2 % of longformer-base's time.
# The fused BiasGelu allocates one tensor more of the size of its input than Add and Gelu: 201 MB at 16,384 tokens.
DISABLED_ON_CPU = ["SkipLayerNormFusion", "BiasGeluFusion"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# The CUDA provider's default rounds the factors of float32 products to TF32 (10 bits of mantissa); PyTorch's does not.
PROVIDER_OPTIONS = {"cuda": {"use_tf32": "0"}}

_log = logging.getLogger("lfx")
# Time in which the system frees threads that have ended; until then it counts them.
_RELEASE_SECONDS = 1.0


class OnnxRuntime(AnyShape, HostTensors):
    """ONNX Runtime on one execution provider."""

    def __init__(
        self, model: Path, provider: str, threads: int | None, *, fused: bool = True, kernels: str = "function"
    ) -> None:
        """Load an ONNX file.

        Args:
            provider: a key of `PROVIDERS`.
            threads: intra-op threads; None = ONNX Runtime's default.
            fused: whether graph optimizations run. Without them a quantized layer is computed in float32 between its
                QuantizeLinear and DequantizeLinear nodes.
            kernels: "fused": lfx's kernels run attention; "function": the bodies of its nodes do; "auto": the kernels,
                if the library is installed and has a kernel for every attention node.
        Raises:
            DependencyError: the provider is not known, not installed, or cannot run this model; `kernels` is "fused",
                and there is no library or no kernel for an attention node; or the system does not start the threads.
            ArtifactError: ONNX Runtime cannot load the file.
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
        check_threads(threads)
        self._make_tensor = ort.OrtValue.ortvalue_from_numpy
        # Cached keys and values stay in the memory of the device.
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._session, self.kernels = _open_session(ort, model, provider, kernels, (threads, fused))
        if self._session.get_providers()[0] != provider_name:
            raise DependencyError(
                f"ONNX Runtime could not start {provider_name} and offers {self._session.get_providers()[0]} instead; "
                "check the driver and the CUDA libraries, or use provider='cpu'"
            )
        self.name = f"onnxruntime {ort.__version__} {provider_name}"
        self.input_names = [item.name for item in self._session.get_inputs()]
        self.output_names = [item.name for item in self._session.get_outputs()]
        self._is_gpu = provider != "cpu"

    def infer(self, feeds: Arrays, outputs: Sequence[str] | None = None, *, on_device: bool = False) -> Arrays:
        """Run one batch. ONNX Runtime computes the other outputs too, but does not copy them."""
        names = self.output_names if outputs is None else list(outputs)
        try:
            if on_device and self._is_gpu:
                values = run_on_device(self._session, feeds, names, "cuda")
            else:
                values = self._session.run(names, feeds)
        except Exception as error:
            raise LfxError(f"ONNX Runtime failed: {custom_ops.refusal(error) or with_cure(error)}") from error
        return dict(zip(names, values, strict=True))

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
            raise LfxError(f"ONNX Runtime failed: {custom_ops.refusal(error) or with_cure(error)}") from error
        return dict(zip(self.output_names, outputs, strict=True))


def run_on_device(session: Any, feeds: Arrays, names: Sequence[str], device: str) -> list[DeviceArray]:
    """Run a session whose outputs stay on a device, and wait for it.

    Args:
        device: ONNX Runtime's name of the device, "cuda" or "cpu".
    """
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for name in names:
        binding.bind_output(name, device)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    dlpack_device = (CUDA if device == "cuda" else CPU, 0)
    return [
        DeviceArray(value.data_ptr(), tuple(value.shape()), _dtype(value.data_type()), dlpack_device, value)
        for value in binding.get_outputs()
    ]


def _dtype(name: str) -> np.dtype[Any]:
    """The dtype of a tensor from ONNX Runtime's name of it, such as "tensor(float)"."""
    scalar = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(scalar, scalar))


def _open_session(
    ort: Any, model: Path, provider: str, kernels: str, options: tuple[int | None, bool]
) -> tuple[Any, str]:
    """Open a session with these kernels; returns it with the kernels that it has, "fused" or "function"."""
    if kernels != "function":
        try:
            library = custom_ops.library(provider)
            return _session(ort, model, provider, options, library), "fused"
        except custom_ops.NoKernelError as error:
            if kernels == "fused":
                raise DependencyError(f"kernels is 'fused', and {error}, or leave kernels out") from error
            if custom_ops.INSTRUCTIONS_VARIABLE in str(error):  # set by the user, for these kernels
                _log.warning("attention runs without lfx's kernels: %s", one_line(error))
        except LfxError:  # such as nodes of float16, which the kernels do not take
            if kernels == "fused":
                raise
    return _session(ort, model, provider, options, None), "function"


def _session(ort: Any, model: Path, provider: str, options: tuple[int | None, bool], library: Path | None) -> Any:
    session_options = _session_options(ort, *options)
    if library is not None:
        try:
            session_options.register_custom_ops_library(str(library))
        except Exception as error:
            raise custom_ops.NoKernelError(
                f"{library} cannot be loaded ({one_line(error, 160)}); install lfx again on this machine"
            ) from error
    try:
        return ort.InferenceSession(
            str(model),
            session_options,
            providers=[(PROVIDERS[provider], PROVIDER_OPTIONS.get(provider, {}))],
            disabled_optimizers=DISABLED_ON_CPU if provider == "cpu" else [],
        )
    except Exception as error:
        if library is not None and (reason := custom_ops.refusal(error)):
            raise custom_ops.NoKernelError(f"there is no kernel for a node ({reason}); change that") from error
        if "NOT_IMPLEMENTED" in str(error):
            raise DependencyError(
                f"ONNX Runtime has no {provider} kernel for this model ({one_line(error, 160)}); run it with "
                "backend='openvino' (pip install 'longformer-lfx[openvino]'), or export it with --precision fp32"
            ) from error
        raise ArtifactError(f"{model} cannot be loaded by ONNX Runtime: {with_cure(error)}") from error


def check_threads(threads: int | None, *, may_choose: bool = True) -> None:
    """Check that the system starts the threads of a session: ONNX Runtime hangs if it refuses one but not the first.

    The calling thread is one of those of a run. By default ONNX Runtime has one for each core, which may be half of
    what `os.cpu_count` returns.

    Args:
        threads: number of threads; None = ONNX Runtime's default.
        may_choose: whether the user may give another number.
    Raises:
        DependencyError: it refuses one.
    """
    wanted = (os.cpu_count() or 1) if threads is None else threads
    allowed, deadline = _startable(wanted), time.monotonic() + _RELEASE_SECONDS
    while allowed < wanted and time.monotonic() < deadline:  # those of an Engine just closed may still count
        time.sleep(_RELEASE_SECONDS / 50)
        allowed = max(allowed, _startable(wanted))
    if allowed < wanted:
        fewer = f", or give threads={allowed} (--threads {allowed})" if may_choose else ""
        raise DependencyError(
            f"the system starts only {allowed} of {wanted} threads (ulimit -u, or the limit of processes of the "
            f"container); raise that limit{fewer}"
        )


def _startable(wanted: int) -> int:
    """How many of these threads the system starts, the calling one included; when this returns, it has freed them."""
    started: list[threading.Thread] = []
    end = threading.Event()
    try:
        while 1 + len(started) < wanted:
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    finally:
        end.set()
        for thread in started:
            thread.join()
        _wait_until_freed([thread.native_id for thread in started])
    return 1 + len(started)


def _wait_until_freed(threads: Sequence[int | None]) -> None:
    """Wait until Linux has freed threads that were joined: it counts one for a moment longer, up to its entry's end."""
    deadline = time.monotonic() + _RELEASE_SECONDS
    for thread in threads:
        while Path(f"/proc/self/task/{thread}").exists() and time.monotonic() < deadline:
            time.sleep(0.0005)


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
