"""Arrays in memory as the C interface takes them: guarded, and with gaps between rows."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.bench.launch import BandedParams, GlobalParams

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """A copy of an array, followed by a guard page that must not be accessed."""

    def __init__(self, array: NDArray[Any]) -> None:
        page = mmap.PAGESIZE
        size = -(-array.nbytes // 16) * 16
        pages = max(-(-size // page), 1) * page
        self._map = mmap.mmap(-1, pages + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        assert _libc.mprotect(start + pages, page, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
        self.address = start + pages - size
        self.array = np.frombuffer(self._map, array.dtype, array.size, pages - size).reshape(array.shape)
        self.array[...] = array


# Layouts of rows with gaps. "packed": query, key and value are parts of the rows of one tensor; "gaps": each tensor has
# its own stride. The numbers are elements between two rows.
LAYOUTS = {
    "packed": {"query": 8, "context": 8},
    "gaps": {"query": 8, "key": 24, "value": 16, "context": 40},
}


class Tensors:
    """Guarded copies of a problem's inputs, and its outputs, which start as NaN.

    Args:
        layout: a key of `LAYOUTS`; empty: rows follow one another, and the log-sum-exp is not asked for.
    """

    def __init__(self, inputs: Mapping[str, NDArray[Any]], num_heads: int, dtype: np.dtype[Any], layout: str) -> None:
        self._layout = layout
        gaps = LAYOUTS.get(layout, {})
        context = np.full(inputs["query"].shape, np.nan, dtype)
        batch, rows, width = context.shape
        self.addresses: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        self._held: list[Guarded] = []
        packed = _packed(inputs) if layout == "packed" else []
        if packed:
            tensor = self._hold(np.concatenate([inputs[name] for name in packed], axis=2))
            for i, name in enumerate(packed):
                self.addresses[name] = tensor.address + i * width * dtype.itemsize
                self.strides[f"{name}_stride"] = len(packed) * width
        for name, array in [*inputs.items(), ("context", context)]:
            if name in packed:
                continue
            has_stride = name in ("query", "key", "value", "context")
            stride = width + gaps.get(name, 0)
            self.strides |= {f"{name}_stride": stride} if has_stride else {}
            held = self._hold(_spread(array, stride) if has_stride else array)
            self.addresses[name] = held.address
        self._context = _rows(self._held[-1].array, context.shape, width + gaps.get("context", 0))
        self._sums = Guarded(np.full((batch, num_heads, rows), np.nan, np.float32))
        if layout:
            self.addresses["log_sum_exp"] = self._sums.address

    def set_strides(self, params: BandedParams | GlobalParams) -> None:
        """Set the strides of a call."""
        for name, stride in self.strides.items():
            setattr(params, name, stride)

    def outputs(self) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        """Returns context and log-sum-exp; what lies between the rows of the context must not be written."""
        context = self._context.astype(np.float64)
        self._context[...] = np.nan
        assert np.isnan(self._held[-1].array.astype(np.float32)).all()
        return context, self._sums.array if self._layout else None

    def _hold(self, array: NDArray[Any]) -> Guarded:
        self._held.append(Guarded(array))
        return self._held[-1]


def _packed(inputs: Mapping[str, NDArray[Any]]) -> list[str]:
    """The names of the tensors that have as many rows as the key."""
    return [name for name in ("query", "key", "value") if inputs[name].shape == inputs["key"].shape]


def _rows(flat: NDArray[Any], shape: tuple[int, ...], stride: int) -> NDArray[Any]:
    """A view of (B, S, width) rows that are `stride` numbers apart."""
    step = stride * flat.itemsize
    return np.lib.stride_tricks.as_strided(flat, shape, (shape[1] * step, step, flat.itemsize))


def _spread(array: NDArray[Any], stride: int) -> NDArray[Any]:
    """Numbers in memory whose rows are `stride` apart, with NaN between them and nothing after the last row."""
    batch, rows, width = array.shape
    flat = np.full((batch * rows - 1) * stride + width, np.nan, array.dtype)
    _rows(flat, array.shape, stride)[...] = array
    return flat
