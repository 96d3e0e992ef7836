"""`Worker`: runs the batches of one thread on a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LfxError
from lfx.runtime import forks
from lfx.runtime.backends.cuda_memory import LEASED_FROM_BYTES, Buffer, DeviceMemory, Lease, PinnedPool
from lfx.runtime.backends.device_tensors import Copies, DevicePool, DeviceTensor
from lfx.runtime.device import check
from lfx.runtime.dlpack import DeviceArray

Arrays = dict[str, NDArray[Any]]


class Worker:
    """Execution context, stream, buffers and CUDA graph of one thread. Not thread-safe.

    The second batch in a row of one shape and with the same outputs is captured as a CUDA graph, and further ones
    replay it. The copies of large outputs, and of those that stay on the device, are not in the graph: each run has
    other memory for them. A worker has at most one graph, since setting other shapes on the context invalidates a graph
    that was captured from it.
    """

    def __init__(
        self,
        cuda: Any,
        trt: Any,
        engine: Any,
        context: Any,
        pools: tuple[PinnedPool, DevicePool],
        reason: Callable[[], str],
        dlpack_device: tuple[int, int],
    ) -> None:
        self._cuda, self._trt, self._engine, self._context, self._reason = cuda, trt, engine, context, reason
        self._pool, self._device_pool = pools
        self._dlpack_device = dlpack_device
        self._buffers: dict[str, Buffer] = {}
        self._profile = 0  # a new context has profile 0 selected
        # Shapes of the inputs, names of the outputs and `on_device` of the previous run; None if it failed.
        self._previous: tuple[dict[str, tuple[int, ...]], list[str], bool] | None = None
        self._graph: Any = None
        self._can_capture = True
        self._generation = forks.generation()
        self._stream = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.copies = Copies(cuda, self._stream, self._device_pool)

    def run_tensors(
        self, tensors: Mapping[str, DeviceTensor], profile: int, outputs: Sequence[str]
    ) -> dict[str, DeviceTensor]:
        """Run one batch of tensors, and wait for its outputs, which are new tensors on the device."""
        self._previous = None  # the next `run` sets its shapes and addresses again
        self._destroy_graph()
        self._select(profile)
        for name, tensor in tensors.items():
            self._set_shape(name, tensor.shape)
            self._context.set_tensor_address(name, tensor.memory.address)
        results = {name: self._device_pool.tensor(*self._output(name)) for name in outputs}
        for name, tensor in results.items():
            self._context.set_tensor_address(name, tensor.memory.address)
        if not self._context.execute_async_v3(int(self._stream)):
            self._cuda.cudaStreamSynchronize(self._stream)  # before the memory of the outputs is used again
            raise LfxError(f"TensorRT failed: {self._reason()}")
        check(self._cuda.cudaStreamSynchronize(self._stream))
        return results

    def run(self, feeds: Arrays, profile: int, outputs: list[str], on_device: bool) -> Arrays:
        """Run one batch and wait for its outputs."""
        current = ({name: array.shape for name, array in feeds.items()}, outputs, on_device)
        is_repeat = current == self._previous
        self._previous = None  # stays None if a step below fails
        if not is_repeat:
            self._prepare(feeds, profile, outputs, on_device)
        for name, array in feeds.items():
            self._buffers[name].array(array.shape, array.dtype)[...] = array
        specs = {name: self._output(name) for name in outputs}
        # Before anything is enqueued: an error must not return memory that a pending copy writes.
        targets = {name: self._target(name, _bytes(spec), on_device) for name, spec in specs.items()}
        sizes = (
            {name: array.nbytes for name, array in feeds.items()},
            {name: _bytes(specs[name]) for name, target in targets.items() if target is None},
        )
        if is_repeat and self._graph is None and self._can_capture:
            self._graph = self._capture(*sizes)
        if self._graph is not None:
            check(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        else:
            self._enqueue(*sizes)
        kinds = self._cuda.cudaMemcpyKind
        kind = kinds.cudaMemcpyDeviceToDevice if on_device else kinds.cudaMemcpyDeviceToHost
        for name, target in targets.items():
            if target is not None:
                source = self._buffers[name].device
                check(self._cuda.cudaMemcpyAsync(target.address, source, _bytes(specs[name]), kind, self._stream))
        check(self._cuda.cudaStreamSynchronize(self._stream))
        self._previous = current
        return {name: self._result(name, target, *specs[name]) for name, target in targets.items()}

    def _prepare(self, feeds: Arrays, profile: int, outputs: list[str], on_device: bool) -> None:
        """Set the profile, shapes, buffers and addresses for a batch of other shapes or outputs than the previous."""
        self._destroy_graph()
        self._select(profile)
        for name, array in feeds.items():
            self._set_shape(name, array.shape)
            self._buffers.setdefault(name, Buffer(self._cuda)).reserve(max(array.nbytes, 1))
        for i in range(self._engine.num_io_tensors):  # the engine writes all outputs, also those that are not copied
            name = self._engine.get_tensor_name(i)
            if name not in feeds:
                size = max(_bytes(self._output(name)), 1)
                is_staged = name in outputs and not on_device and size < LEASED_FROM_BYTES
                self._buffers.setdefault(name, Buffer(self._cuda)).reserve(size, on_host=is_staged)
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.device)

    def _select(self, profile: int) -> None:
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, int(self._stream)):
                raise LfxError(f"TensorRT could not select profile {profile}: {self._reason()}")
            self._profile = profile

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise InputError(f"{name} of shape {shape} is outside the plan's profile: {self._reason()}")

    def _target(self, name: str, size: int, on_device: bool) -> DeviceMemory | Lease | Buffer | None:
        """The memory that an output is copied to after the graph; None if the graph copies it to its buffer's own."""
        if on_device:
            return DeviceMemory(self._cuda, size)
        if size < LEASED_FROM_BYTES:
            return None
        lease = self._pool.take(size)
        if lease is not None:
            return lease
        self._buffers[name].reserve(size)
        return self._buffers[name]

    def _result(
        self, name: str, target: DeviceMemory | Lease | Buffer | None, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Any:
        """An output that has been copied to its target."""
        if target is None or isinstance(target, Buffer):
            return self._buffers[name].array(shape, dtype).copy()
        if isinstance(target, Lease):
            return target.array(shape, dtype)
        return DeviceArray(target.address, shape, dtype, self._dlpack_device, target)

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
        self.copies.free()
        self._cuda.cudaStreamDestroy(self._stream)


def _bytes(spec: tuple[tuple[int, ...], np.dtype[Any]]) -> int:
    """Size of a tensor of this shape and dtype."""
    shape, dtype = spec
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
