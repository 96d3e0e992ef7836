"""Device memory and pinned host memory of the TensorRT backend."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import LfxError
from lfx.runtime import forks
from lfx.runtime.device import check

# A smaller output is copied out of the worker's own pinned buffer: that takes less time than another allocation.
LEASED_FROM_BYTES = 1 << 18
# Limit of the pinned memory that callers hold and that waits for reuse. Above it outputs are copied to pageable memory.
LEASED_BYTES = 1 << 28
_ROUNDED_TO_BYTES = 1 << 16


class Buffer:
    """Device memory and, where it is needed, pinned host memory of one tensor. It grows and never shrinks."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.bytes = 0
        self.device = 0
        self.host = 0

    def reserve(self, size: int, *, on_host: bool = True) -> None:
        """Grow to at least `size` bytes, on the host too if `on_host`."""
        if size > self.bytes:
            self.free()
            self.device = int(check(self._cuda.cudaMalloc(size)))
            self.bytes = size
        if on_host and not self.host:
            try:
                self.host = int(check(self._cuda.cudaMallocHost(self.bytes)))
            except LfxError:
                self.free()
                raise

    @property
    def address(self) -> int:
        """Address of the host memory."""
        return self.host

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A view of the host memory as an array."""
        count = int(np.prod(shape, dtype=np.int64))
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.host)
        return np.ndarray(shape, dtype, memoryview(raw))

    def free(self) -> None:
        """Free the device and host memory."""
        if self.host:
            self._cuda.cudaFreeHost(self.host)
            self.host = 0
        if self.bytes:
            self._cuda.cudaFree(self.device)
            self.bytes = 0


class DeviceMemory:
    """Device memory that is freed with the last reference. cudaFree waits for the kernels that still read it."""

    def __init__(self, cuda: Any, size: int) -> None:
        self._cuda = cuda
        self._generation = forks.generation()
        self.address = int(check(cuda.cudaMalloc(max(size, 1))))

    def __del__(self) -> None:
        if hasattr(self, "address") and self._generation == forks.generation():  # CUDA does not work in a forked child
            self._cuda.cudaFree(self.address)


class Lease:
    """Pinned host memory that is lent to one output. It returns to its pool when the array and all views are gone."""

    def __init__(self, pool: PinnedPool, address: int, size: int) -> None:
        self._pool, self.address, self._bytes = pool, address, size
        self.__array_interface__: dict[str, Any] = {}

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The memory as an array, which keeps the lease."""
        self.__array_interface__ = {
            "version": 3,
            "data": (self.address, False),
            "shape": shape,
            "typestr": dtype.str,
        }
        return np.asarray(self)

    def __del__(self) -> None:
        self._pool.returned.append((self._bytes, self.address))


class PinnedPool:
    """Pinned host memory for the outputs that callers get without a copy. Thread-safe.

    Memory is lent to one output at a time, and reused when that output is gone.

    Attributes:
        returned: (bytes, address) of memory whose output is gone. A lease may end inside any other call, also one that
            holds the lock, so it appends here without the lock.
    """

    def __init__(self, cuda: Any, limit_bytes: int = LEASED_BYTES) -> None:
        self._cuda, self._limit_bytes = cuda, limit_bytes
        self._generation = forks.generation()
        self._lock = threading.Lock()
        self._bytes = 0  # lent and waiting
        self.returned: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> Lease | None:
        """Lend memory of at least `size` bytes; None if that would exceed the limit.

        Raises:
            LfxError: CUDA has no more pinned memory.
        """
        size = -(-size // _ROUNDED_TO_BYTES) * _ROUNDED_TO_BYTES
        with self._lock:
            waiting = sorted(self.returned.popleft() for _ in range(len(self.returned)))
            fitting = next((block for block in waiting if block[0] >= size), None)
            if fitting is not None:
                waiting.remove(fitting)
            while waiting and fitting is None and self._bytes + size > self._limit_bytes:
                self._free(waiting.pop())
            self.returned.extend(waiting)
            if fitting is None:
                if self._bytes + size > self._limit_bytes:
                    return None
                fitting = (size, int(check(self._cuda.cudaMallocHost(size))))
                self._bytes += size
        return Lease(self, fitting[1], fitting[0])

    def _free(self, block: tuple[int, int]) -> None:
        self._cuda.cudaFreeHost(block[1])
        self._bytes -= block[0]

    def __del__(self) -> None:
        if hasattr(self, "returned") and self._generation == forks.generation():
            while self.returned:
                self._free(self.returned.popleft())
