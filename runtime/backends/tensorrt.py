"""Plans on an NVIDIA GPU: TensorRT and TensorRT-RTX behind the same `infer(feeds) -> outputs` as the other backends."""

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
    """A plan on the first GPU; every thread that runs it has a context, a stream and buffers of its own."""

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
                f"{plan} was built by {manifest.flavor} {manifest.tensorrt_version}, and {trt.__version__} is here; "
                "install that version, or build the plan again with: lfx build-engine"
            )
        library = plugins.library() if manifest.plugin_layers else None
        found = require_gpu()
        if found != manifest.target:
            raise ArtifactError(
                f"{plan} was built for {manifest.target}, and this GPU is {found}; build it again here with: "
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
        self.name = f"{manifest.flavor} {trt.__version__} {found}"
        self._profiles = manifest.profiles
        self._workers = threading.local()

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether a profile of the plan does."""
        return choose(self._profiles, batch, seqlen) is not None

    def infer(self, feeds: Arrays) -> Arrays:
        """One batch, on this thread's own context and stream.

        Raises:
            InputError: no profile of the plan takes this shape.
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
            check(self._cuda.cudaSetDevice(DEVICE))  # every thread has a current device of its own
            context = self._engine.create_execution_context()
            if context is None:
                raise LfxError(f"TensorRT made no execution context: {self._log.last()}")
            worker = self._workers.worker = _Worker(self._cuda, self._trt, self._engine, context, self._log.last)
        return worker.run(feeds, profile, self.output_names)


def _load_plugins(trt: Any, library: Path) -> None:
    registry = trt.get_plugin_registry()
    have = {creator.name for creator in registry.all_creators if creator.plugin_namespace == plugins.NAMESPACE}
    if not have and registry.load_library(str(library)) is None:
        raise PluginError(f"{trt.__name__} {trt.__version__} did not take {library}; install lfx again")


class _Log:
    """TensorRT's errors, for the message of what failed."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def last(self) -> str:
        """The newest error."""
        return self._lines[-1] if self._lines else "it gave no reason"

    def logger(self, trt: Any) -> Any:
        """An ILogger that collects errors."""
        lines = self._lines

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    lines.append(" ".join(message.split()))

        return Logger()


class _Buffer:
    """Device memory and page-locked host memory of one tensor; both grow and never shrink."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.bytes = 0
        self.device = 0
        self.host = 0

    def reserve(self, wanted: int) -> bool:
        """Make room; returns whether the addresses changed."""
        if wanted <= self.bytes:
            return False
        self.free()
        self.device = int(check(self._cuda.cudaMalloc(wanted)))
        try:
            self.host = int(check(self._cuda.cudaMallocHost(wanted)))
        except LfxError:
            self._cuda.cudaFree(self.device)
            raise
        self.bytes = wanted
        return True

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The host memory as an array."""
        count = int(np.prod(shape, dtype=np.int64))
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.host)
        return np.ndarray(shape, dtype, memoryview(raw))

    def free(self) -> None:
        """Give both back."""
        if self.bytes:
            self._cuda.cudaFree(self.device)
            self._cuda.cudaFreeHost(self.host)
            self.bytes = 0


class _Worker:
    """What one thread runs with. Not to be shared.

    A batch of the same shape as the one before it is replayed from a CUDA graph. There is one graph at a time: changing
    a context's shapes makes what was captured from it undefined.
    """

    def __init__(self, cuda: Any, trt: Any, engine: Any, context: Any, reason: Callable[[], str]) -> None:
        self._cuda, self._trt, self._engine, self._context, self._reason = cuda, trt, engine, context, reason
        self._buffers: dict[str, _Buffer] = {}
        self._profile = 0  # which a new context has
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._graph: Any = None
        self._can_capture = True
        self._generation = forks.generation()
        self._stream = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))

    def run(self, feeds: Arrays, profile: int, outputs: list[str]) -> Arrays:
        """One batch; waits for the result."""
        shapes = {name: array.shape for name, array in feeds.items()}
        again = shapes == self._shapes
        if not again:
            self._prepare(feeds, profile, outputs)
        for name, array in feeds.items():
            self._buffers[name].array(array.shape, array.dtype)[...] = array
        found = {name: self._output(name) for name in outputs}
        copies = (
            {name: array.nbytes for name, array in feeds.items()},
            {name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in found.items()},
        )
        if again and self._graph is None and self._can_capture:
            self._graph = self._capture(*copies)
        if self._graph is not None:
            check(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        else:
            self._enqueue(*copies)
        check(self._cuda.cudaStreamSynchronize(self._stream))
        self._shapes = shapes
        return {name: self._buffers[name].array(*found[name]).copy() for name in outputs}

    def _prepare(self, feeds: Arrays, profile: int, outputs: list[str]) -> None:
        """Shapes, memory and addresses of a batch that differs from the one before it."""
        self._forget_graph()
        self._shapes = None  # until all is in place
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, int(self._stream)):
                raise LfxError(f"TensorRT did not take profile {profile}: {self._reason()}")
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
        """Shape and type of an output, for the shapes that are set."""
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return tuple(self._context.get_tensor_shape(name)), dtype

    def _enqueue(self, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        cuda = self._cuda
        for name, size in inputs.items():
            buffer = self._buffers[name]
            kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            check(cuda.cudaMemcpyAsync(buffer.device, buffer.host, size, kind, self._stream))
        if not self._context.execute_async_v3(int(self._stream)):
            raise LfxError(f"TensorRT failed: {self._reason()}")
        for name, size in outputs.items():
            buffer = self._buffers[name]
            kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            check(cuda.cudaMemcpyAsync(buffer.host, buffer.device, size, kind, self._stream))

    def _capture(self, inputs: dict[str, int], outputs: dict[str, int]) -> Any:
        """A graph of `_enqueue`, or None, and never again, where some layer cannot be captured."""
        cuda = self._cuda
        self._can_capture = False
        asks = getattr(self._context, "is_stream_capturable", None)  # of TensorRT-RTX
        if asks is not None and not asks(int(self._stream)):
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

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._cuda.cudaGraphExecDestroy(self._graph)
            self._graph = None

    def __del__(self) -> None:
        if not hasattr(self, "_stream"):  # it never came to be
            return
        if self._generation != forks.generation():  # of a thread of the parent's; CUDA does not work in this child
            forks.keep(self)
            return
        self._forget_graph()
        for buffer in self._buffers.values():
            buffer.free()
        self._cuda.cudaStreamDestroy(self._stream)
