"""A fake TensorRT and CUDA runtime on host memory, with the calls that `backends.tensorrt` makes.

Device memory is host memory that is accessed by copies only. A stream queues work and runs it when it is synchronized;
a capturing stream records work and does not run it. An engine computes each batch with a function of the test.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Compute = Callable[[dict[str, np.ndarray[Any, Any]]], dict[str, np.ndarray[Any, Any]]]


class Error(enum.IntEnum):
    """cudaError_t."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1


class Cuda:
    """cuda.bindings.runtime."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.counts = {"copies": 0, "launches": 0, "graphs": 0, "frees": 0}
        self.copied_bytes = {1: 0, 2: 0, 3: 0}  # by the kind of the copy

    def allocate(self, size: int) -> tuple[Error, int]:
        buffer = (ctypes.c_char * size)()
        ctypes.memset(buffer, 0xFF, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return Error(0), ctypes.addressof(buffer)

    cudaMalloc = cudaMallocHost = allocate

    def cudaSetDevice(self, device: int) -> tuple[Error]:
        assert device == 0
        return (Error(0),)

    def free(self, address: int) -> tuple[Error]:
        del self.memory[address]
        self.counts["frees"] += 1
        return (Error(0),)

    cudaFree = cudaFreeHost = free

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        self.streams[len(self.streams) + 1] = []
        return Error(0), len(self.streams)

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        return (Error(0),)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self.capturing.get(stream, self.streams[stream]).append(work)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[Error]:
        for address in (to, source):
            # Only what was allocated, from its start; rows are copied on the device from anywhere inside.
            start = address if kind != self.cudaMemcpyKind.cudaMemcpyDeviceToDevice else self.start_of(address)
            assert address + size <= start + len(self.memory[start])
        self.counts["copies"] += 1
        self.copied_bytes[kind] += size
        self.enqueue(stream, lambda: ctypes.memmove(to, source, size))
        return (Error(0),)

    def start_of(self, address: int) -> int:
        """The start of the allocation that an address is in."""
        allocated = list(self.memory.items())  # other threads may allocate meanwhile
        return next(start for start, buffer in allocated if start <= address < start + len(buffer))

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self.capturing[stream] = []
        return (Error(0),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        return Error(0), self.capturing.pop(stream)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        self.counts["graphs"] += 1
        return Error(0), list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:
        return (Error(0),)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Error]:
        self.counts["graphs"] -= 1
        return (Error(0),)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Error]:
        self.counts["launches"] += 1
        self.streams[stream] += graph
        return (Error(0),)

    def cudaGetLastError(self) -> tuple[Error]:
        return (Error(0),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()
        return (Error(0),)


class Context:
    """An IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.shape_of(name, self.shapes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda, engine = self.engine.cuda, self.engine
        if engine.uncapturable and stream in cuda.capturing:
            return False
        addresses, shapes = dict(self.addresses), dict(self.shapes)

        def work() -> None:
            feeds = {}
            for name in engine.inputs:
                raw = cuda.memory[addresses[name]]
                count = int(np.prod(shapes[name]))
                dtype = np.dtype(engine.dtypes.get(name, "int64"))
                assert count * dtype.itemsize <= len(raw)
                feeds[name] = np.frombuffer(raw, dtype, count).reshape(shapes[name]).copy()
            for name, array in engine.compute(feeds).items():
                data = np.ascontiguousarray(array, engine.get_tensor_dtype(name))
                assert data.nbytes <= len(cuda.memory[addresses[name]])
                ctypes.memmove(addresses[name], data.ctypes.data, data.nbytes)

        cuda.enqueue(stream, work)
        return True


class Engine:
    """An ICudaEngine.

    Args:
        dtypes: of inputs that are not int64, and of outputs that are not float32.
    """

    def __init__(
        self,
        cuda: Cuda,
        inputs: list[str],
        outputs: list[str],
        shape_of: Any,
        compute: Compute,
        dtypes: dict[str, str] | None = None,
    ) -> None:
        self.cuda, self.inputs, self.outputs, self.dtypes = cuda, inputs, outputs, dtypes or {}
        self.shape_of, self.compute, self.uncapturable = shape_of, compute, False
        self.contexts = 0
        self.num_io_tensors = len(inputs) + len(outputs)

    def get_tensor_name(self, i: int) -> str:
        return [*self.inputs, *self.outputs][i]

    def get_tensor_mode(self, name: str) -> int:
        return TensorRt.TensorIOMode.INPUT if name in self.inputs else TensorRt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return self.dtypes.get(name, "float32")

    def create_execution_context(self) -> Context:
        self.contexts += 1
        return Context(self)


class TensorRt:
    """The module tensorrt."""

    __name__ = "tensorrt"
    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)

    class ILogger:
        ERROR = 1

        def __init__(self) -> None:
            pass

    def __init__(self, version: str, engine: Engine | None) -> None:
        self.__version__, self.engine = version, engine
        self.engines: dict[bytes, Engine] = {}  # content of a plan -> its engine, if that is not `engine`
        self.loaded: list[str] = []

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(all_creators=[], load_library=lambda path: self.loaded.append(path) or path)

    def Runtime(self, logger: Any) -> Any:
        def deserialize(data: bytes) -> Engine | None:
            if self.engine is None and not self.engines:
                logger.log(1, "the plan is not  for me")
            return self.engines.get(data, self.engine)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    @staticmethod
    def nptype(name: str) -> Any:
        return np.dtype(name)
