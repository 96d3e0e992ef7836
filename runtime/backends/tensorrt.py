"""The TensorRT backend: runs plans of TensorRT and TensorRT-RTX on an NVIDIA GPU."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ArtifactError, InputError, LfxError, PluginError, require
from lfx.runtime import forks
from lfx.runtime import plugin as plugins
from lfx.runtime.device import check, cudart, require_gpu
from lfx.runtime.flavor import FLAVORS
from lfx.runtime.plan import PlanManifest
from lfx.runtime.profile import choose

Arrays = dict[str, NDArray[Any]]
DEVICE = 0


class TensorRt:
    """A plan on the first GPU. Each thread that runs it has its own execution context, stream and buffers."""

    def __init__(self, plan: Path, manifest: PlanManifest) -> None:
        flavor = FLAVORS.get(manifest.flavor)
        if flavor is None:
            raise ArtifactError(
                f"{plan} is of flavor {manifest.flavor!r}, which this lfx does not know; build it again"
            )
        trt = require(flavor.module, flavor.extra)
        compatible = "VERSION_COMPATIBLE" in manifest.options.get("flags", [])
        if trt.__version__ != manifest.tensorrt_version and not compatible:
            raise ArtifactError(
                f"{plan} was built by {manifest.flavor} {manifest.tensorrt_version}, and {trt.__version__} is "
                "installed; install that version, or build the plan again with: lfx build-engine"
            )
        library = plugins.library() if manifest.plugin_layers else None
        capability = require_gpu()
        if capability != manifest.target:
            raise ArtifactError(
                f"{plan} was built for {manifest.target}, and this GPU is {capability}; build it again here with: "
                "lfx build-engine"
            )
        self._cuda = cudart()
        check(self._cuda.cudaSetDevice(DEVICE))
        self._trt = trt
        self._log = _Log()
        logger = self._log.logger(trt)
        if library is not None:
            _load_plugins(trt, library)
        self._runtime = trt.Runtime(logger)
        if compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{plan} cannot be loaded by {manifest.flavor}: {self._log.last()}; build it again")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.input_names = [name for name in names if is_input[name]]
        self.output_names = [name for name in names if not is_input[name]]
        self.name = f"{manifest.flavor} {trt.__version__} {capability}"
        self._profiles = manifest.profiles
        self._workers = threading.local()

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether a profile of the plan takes a batch of this shape."""
        return choose(self._profiles, batch, seqlen) is not None

    def infer(self, feeds: Arrays) -> Arrays:
        """Run one batch on this thread's own context and stream.

        Raises:
            InputError: no profile of the plan takes this shape.
            LfxError: CUDA or TensorRT failed.
        """
        shape = next(iter(feeds.values())).shape
        profile = choose(self._profiles, shape[0], shape[-1])
        if profile is None:
            ranges = " or ".join(map(str, self._profiles))
            raise InputError(
                f"batch {shape[0]}, seqlen {shape[-1]} is outside what the plan was built for ({ranges}); split the "
                "batch, or rebuild with other ranges: lfx build-engine --batch MIN:OPT:MAX --seqlen MIN:OPT:MAX"
            )
        worker = getattr(self._workers, "worker", None)
        if worker is None:
            check(self._cuda.cudaSetDevice(DEVICE))  # CUDA's current device is per thread
            context = self._engine.create_execution_context()
            if context is None:
                raise LfxError(f"TensorRT could not create an execution context: {self._log.last()}")
            worker = self._workers.worker = _Worker(self._cuda, self._trt, self._engine, context, self._log.last)
        return worker.run(feeds, profile, self.output_names)


def _load_plugins(trt: Any, library: Path) -> None:
    """Register the lfx plugins with TensorRT, once in a process."""
    registry = trt.get_plugin_registry()
    is_loaded = any(creator.plugin_namespace == plugins.NAMESPACE for creator in registry.all_creators)
    if not is_loaded and registry.load_library(str(library)) is None:
        raise PluginError(f"{trt.__name__} {trt.__version__} could not load {library}; install lfx again")


class _Log:
    """Collects TensorRT's errors, whose text is needed when a call fails."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def last(self) -> str:
        """The text of the newest error."""
        return self._lines[-1] if self._lines else "it gave no reason"

    def logger(self, trt: Any) -> Any:
        """Make an ILogger that appends errors to this log."""
        lines = self._lines

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    lines.append(" ".join(message.split()))

        return Logger()


class _Buffer:
    """Device memory and pinned host memory of one tensor. The buffer grows and never shrinks."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.bytes = 0
        self.device = 0
        self.host = 0

    def reserve(self, size: int) -> bool:
        """Grow to at least `size` bytes; returns whether the addresses changed."""
        if size <= self.bytes:
            return False
        self.free()
        self.device = int(check(self._cuda.cudaMalloc(size)))
        try:
            self.host = int(check(self._cuda.cudaMallocHost(size)))
        except LfxError:
            self._cuda.cudaFree(self.device)
            raise
        self.bytes = size
        return True

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A view of the host memory as an array."""
        count = int(np.prod(shape, dtype=np.int64))
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.host)
        return np.ndarray(shape, dtype, memoryview(raw))

    def free(self) -> None:
        """Free the device and host memory."""
        if self.bytes:
            self._cuda.cudaFree(self.device)
            self._cuda.cudaFreeHost(self.host)
            self.bytes = 0


class _Worker:
    """Execution context, stream, buffers and CUDA graph of one thread. Not thread-safe.

    The second batch in a row of one shape is captured as a CUDA graph, and further ones replay it. A worker has at most
    one graph, since setting other shapes on the context invalidates a graph that was captured from it.
    """

    def __init__(self, cuda: Any, trt: Any, engine: Any, context: Any, reason: Callable[[], str]) -> None:
        self._cuda, self._trt, self._engine, self._context, self._reason = cuda, trt, engine, context, reason
        self._buffers: dict[str, _Buffer] = {}
        self._profile = 0  # a new context has profile 0 selected
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._graph: Any = None
        self._can_capture = True
        self._generation = forks.generation()
        self._stream = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))

    def run(self, feeds: Arrays, profile: int, outputs: list[str]) -> Arrays:
        """Run one batch and wait for its outputs."""
        shapes = {name: array.shape for name, array in feeds.items()}
        is_repeat = shapes == self._shapes
        if not is_repeat:
            self._prepare(feeds, profile, outputs)
        for name, array in feeds.items():
            self._buffers[name].array(array.shape, array.dtype)[...] = array
        specs = {name: self._output(name) for name in outputs}
        sizes = (
            {name: array.nbytes for name, array in feeds.items()},
            {name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in specs.items()},
        )
        if is_repeat and self._graph is None and self._can_capture:
            self._graph = self._capture(*sizes)
        if self._graph is not None:
            check(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        else:
            self._enqueue(*sizes)
        check(self._cuda.cudaStreamSynchronize(self._stream))
        self._shapes = shapes
        return {name: self._buffers[name].array(*specs[name]).copy() for name in outputs}

    def _prepare(self, feeds: Arrays, profile: int, outputs: list[str]) -> None:
        """Set the profile, shapes, buffers and addresses for a batch whose shape differs from the previous one."""
        self._destroy_graph()
        self._shapes = None  # stays None if a step below fails
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, int(self._stream)):
                raise LfxError(f"TensorRT could not select profile {profile}: {self._reason()}")
            self._profile = profile
        for name, array in feeds.items():
            if not self._context.set_input_shape(name, array.shape):
                raise InputError(f"{name} of shape {array.shape} is outside the plan's profile: {self._reason()}")
            self._buffers.setdefault(name, _Buffer(self._cuda)).reserve(max(array.nbytes, 1))
        for name in outputs:
            shape, dtype = self._output(name)
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            self._buffers.setdefault(name, _Buffer(self._cuda)).reserve(max(size, 1))
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.device)

    def _output(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of an output for the input shapes that are set."""
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return tuple(self._context.get_tensor_shape(name)), dtype

    def _enqueue(self, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        """Enqueue the copies to the device, the engine and the copies back; tensor name -> bytes to copy."""
        cuda = self._cuda
        to_device, to_host = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for name, size in inputs.items():
            buffer = self._buffers[name]
            check(cuda.cudaMemcpyAsync(buffer.device, buffer.host, size, to_device, self._stream))
        if not self._context.execute_async_v3(int(self._stream)):
            raise LfxError(f"TensorRT failed: {self._reason()}")
        for name, size in outputs.items():
            buffer = self._buffers[name]
            check(cuda.cudaMemcpyAsync(buffer.host, buffer.device, size, to_host, self._stream))

    def _capture(self, inputs: dict[str, int], outputs: dict[str, int]) -> Any:
        """Capture `_enqueue` as a CUDA graph; returns None, and does not retry, if a layer cannot be captured."""
        cuda = self._cuda
        self._can_capture = False
        is_capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX only
        if is_capturable is not None and not is_capturable(int(self._stream)):
            return None
        check(cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            self._enqueue(inputs, outputs)
        except LfxError:
            cuda.cudaStreamEndCapture(self._stream)
            cuda.cudaGetLastError()
            return None
        error, graph = cuda.cudaStreamEndCapture(self._stream)
        if int(error) != 0:
            cuda.cudaGetLastError()
            return None
        try:
            executable = check(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)
        self._can_capture = True
        return executable

    def _destroy_graph(self) -> None:
        if self._graph is not None:
            self._cuda.cudaGraphExecDestroy(self._graph)
            self._graph = None

    def __del__(self) -> None:
        if not hasattr(self, "_stream"):  # `__init__` failed before the stream was created
            return
        if self._generation != forks.generation():  # CUDA does not work in a forked child
            forks.keep(self)
            return
        self._destroy_graph()
        for buffer in self._buffers.values():
            buffer.free()
        self._cuda.cudaStreamDestroy(self._stream)
