"""Tensors in device memory of the TensorRT backend, which pass from run to run, such as cached keys and values."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import LfxError
from lfx.runtime import forks
from lfx.runtime.device import check

_SMALLEST_BYTES = 1 << 12


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor in device memory."""

    memory: Block
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Block:
    """Device memory that is lent to one tensor. It returns to its pool with the last reference."""

    def __init__(self, pool: DevicePool, address: int, size: int) -> None:
        self._pool, self.address, self._bytes = pool, address, size

    def __del__(self) -> None:
        self._pool.returned.append((self._bytes, self.address))


class DevicePool:
    """Device memory for tensors. Thread-safe.

    Memory whose tensor is gone waits for another tensor of about its size. Waiting memory is freed, the largest first,
    before it exceeds the memory that is lent, and all of it if the device has no more. No tensor may be dropped before
    the work that was enqueued with it has finished.

    Attributes:
        returned: (bytes, address) of memory whose tensor is gone. A tensor may be dropped inside any other call, also
            one that holds the lock, so its memory is appended here without the lock.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._generation = forks.generation()
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, int]] = []  # (bytes, address), ascending
        self._lent_bytes = 0
        self.returned: deque[tuple[int, int]] = deque()

    def tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor of memory with any content.

        Raises:
            LfxError: the device has no more memory.
        """
        size = _rounded(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        with self._lock:
            self._collect()
            block = next((block for block in self._waiting if block[0] == size), None)
            if block is not None:
                self._waiting.remove(block)
            else:
                self._free_waiting(self._lent_bytes)
                block = (size, self._allocate(size))
            self._lent_bytes += size
        return DeviceTensor(Block(self, block[1], size), shape, dtype)

    def _collect(self) -> None:
        gone = [self.returned.popleft() for _ in range(len(self.returned))]
        self._lent_bytes -= sum(size for size, _ in gone)
        self._waiting = sorted(self._waiting + gone)

    def _allocate(self, size: int) -> int:
        try:
            return int(check(self._cuda.cudaMalloc(size)))
        except LfxError:
            self._cuda.cudaGetLastError()  # clears the error
            self._free_waiting(0)
            return int(check(self._cuda.cudaMalloc(size)))

    def _free_waiting(self, limit_bytes: int) -> None:
        """Free waiting memory until at most `limit_bytes` wait."""
        while sum(size for size, _ in self._waiting) > limit_bytes:
            self._cuda.cudaFree(self._waiting.pop()[1])

    def __del__(self) -> None:
        if hasattr(self, "returned") and self._generation == forks.generation():  # CUDA does not work in a forked child
            self._collect()
            self._free_waiting(0)


def _rounded(size: int) -> int:
    """Round up to one of four sizes between two powers of 2, so that a growing tensor is allocated in few sizes."""
    step = 1 << max(max(size, _SMALLEST_BYTES).bit_length() - 3, 0)
    return max(-(-size // step) * step, _SMALLEST_BYTES)


class Copies:
    """Copies tensors from and to the host, and on the device, and waits for them. Not thread-safe.

    Args:
        stream: of the copies. pool: memory of the new tensors.
    """

    def __init__(self, cuda: Any, stream: Any, pool: DevicePool) -> None:
        self._cuda, self._stream, self._pool = cuda, stream, pool
        self._host = self._host_bytes = 0  # pinned memory that grows and never shrinks

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """The tensor of an array."""
        tensor = self._pool.tensor(array.shape, array.dtype)
        self._staging(array.shape, array.dtype)[...] = array
        self._copy(tensor.memory.address, self._host, tensor.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        self._wait()
        return tensor

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """The array of a tensor, which the caller owns."""
        array = self._staging(tensor.shape, tensor.dtype)
        self._copy(self._host, tensor.memory.address, tensor.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self._wait()
        return array.copy()

    def take(self, tensor: DeviceTensor, rows: NDArray[np.int64]) -> DeviceTensor:
        """A new tensor of these rows of a tensor."""
        taken = self._pool.tensor((len(rows), *tensor.shape[1:]), tensor.dtype)
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        try:
            for target, source, count in _runs(rows):
                addresses = (taken.memory.address + target * row_bytes, tensor.memory.address + source * row_bytes)
                self._copy(*addresses, count * row_bytes, kind)
        finally:
            self._wait()
        return taken

    def free(self) -> None:
        """Free the pinned memory."""
        if self._host_bytes:
            self._cuda.cudaFreeHost(self._host)
            self._host = self._host_bytes = 0

    def _staging(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The pinned memory as an array."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size > self._host_bytes:
            self.free()
            self._host, self._host_bytes = int(check(self._cuda.cudaMallocHost(size))), size
        if size == 0:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, memoryview((ctypes.c_char * size).from_address(self._host)))

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        if size > 0:
            check(self._cuda.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def _wait(self) -> None:
        check(self._cuda.cudaStreamSynchronize(self._stream))


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Split rows into runs of neighbours: (index in the new tensor, row, number of rows)."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield start, int(rows[start]), i - start
            start = i
