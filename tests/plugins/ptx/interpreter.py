"""The interpreter from Python: loads PTX, and runs kernels by name or through the kernels' own launch code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.launch import BandedParams, GlobalParams, Kernels


class PtxError(Exception):
    """What the interpreter refuses: the reason, the kernel, the warp and lane, and the line of PTX."""


class Buffer(NamedTuple):
    """Memory that kernels may access; writable memory starts undefined."""

    address: int
    bytes: int
    is_writable: bool


class Interpreter:
    """One library with the interpreter, and the kernels that it has loaded."""

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        for name in ("lfxPtxError", "lfxPtxKernels"):
            getattr(library, name).restype = ctypes.c_char_p
        library.lfxPtxLoad.restype = library.lfxPtxLaunch.restype = ctypes.c_bool
        library.lfxPtxLoad.argtypes = [ctypes.c_char_p]
        words = ctypes.POINTER(ctypes.c_uint32)
        library.lfxPtxLaunch.argtypes = [ctypes.c_char_p, words, words, ctypes.c_uint64, ctypes.c_void_p]

    def error(self) -> str:
        """The reason of the first failure since PTX was loaded or buffers were set."""
        return str(self.library.lfxPtxError().decode())

    def load(self, text: str) -> None:
        """Add the kernels of a module; they replace those of the same name."""
        if not self.library.lfxPtxLoad(text.encode()):
            raise PtxError(self.error())

    def kernels(self) -> list[str]:
        """The names of the loaded kernels."""
        return str(self.library.lfxPtxKernels().decode()).splitlines()

    def set_buffers(self, buffers: Iterable[Buffer]) -> None:
        """Name the only memory that kernels may access."""
        listed = list(buffers)
        self.library.lfxPtxSetBuffers(
            len(listed),
            (ctypes.c_uint64 * len(listed))(*(buffer.address for buffer in listed)),
            (ctypes.c_uint64 * len(listed))(*(buffer.bytes for buffer in listed)),
            (ctypes.c_int32 * len(listed))(*(buffer.is_writable for buffer in listed)),
        )

    def launch(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int, *arguments: Any
    ) -> None:
        """Run a kernel by name; arguments are ctypes values."""
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        dimensions = [(ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes))) for sizes in (grid, block)]
        if not self.library.lfxPtxLaunch(kernel.encode(), *dimensions, shared_bytes, addresses):
            raise PtxError(self.error())


class InterpretedKernels:
    """`Kernels` whose launches the interpreter runs. They may access the arrays of their parameters only."""

    def __init__(self, path: Path) -> None:
        self.interpreter = Interpreter(path)
        self._kernels = Kernels(path)
        self.workspace_bytes = self._kernels.workspace_bytes

    def banded(self, params: Any, stream: Any) -> int:
        """`Kernels.banded`; `params` is a reference."""
        self._run(self._kernels.banded, params, stream, banded_buffers(params._obj))
        return 0

    def global_(self, params: Any, stream: Any) -> int:
        """`Kernels.global_`."""
        self._run(self._kernels.global_, params, stream, self._global_buffers(params._obj))
        return 0

    def _run(self, function: Any, params: Any, stream: Any, buffers: list[Buffer]) -> None:
        self.interpreter.set_buffers(buffers)
        status = function(params, stream)
        if status:
            raise PtxError(self.interpreter.error() or f"CUDA error {status}")

    def _global_buffers(self, params: GlobalParams) -> list[Buffer]:
        queries, tokens = params.batch * params.queries, params.batch * params.seqlen
        workspace_bytes = self.workspace_bytes(params.batch, params.queries, params.num_heads, params.head_size)
        return [
            Buffer(params.query, _rows_bytes(params, queries, params.query_stride), False),
            Buffer(params.key, _rows_bytes(params, tokens, params.key_stride), False),
            Buffer(params.value, _rows_bytes(params, tokens, params.value_stride), False),
            Buffer(params.key_mask, tokens * 4, False),
            Buffer(params.context, _rows_bytes(params, queries, params.context_stride), True),
            Buffer(params.workspace, workspace_bytes, True),
            *_sums(params, params.queries),
        ]


def banded_buffers(params: BandedParams) -> list[Buffer]:
    """The arrays of BandedAttention, whose sizes plugins/attention.h gives."""
    tokens, slots = params.batch * params.seqlen, params.batch * params.slots
    return [
        Buffer(params.query, _rows_bytes(params, tokens, params.query_stride), False),
        Buffer(params.key, _rows_bytes(params, tokens, params.key_stride), False),
        Buffer(params.value, _rows_bytes(params, tokens, params.value_stride), False),
        Buffer(params.key_mask, tokens * 4, False),
        Buffer(params.global_index, slots * 4, False),
        Buffer(params.global_context, _rows_bytes(params, slots, params.num_heads * params.head_size), False),
        Buffer(params.context, _rows_bytes(params, tokens, params.context_stride), True),
        *_sums(params, params.seqlen),
    ]


def _rows_bytes(params: BandedParams | GlobalParams, rows: int, stride: int) -> int:
    """Bytes from the first row to the end of the last one."""
    element_bytes = 4 if params.type == 0 else 2
    return int(((rows - 1) * stride + params.num_heads * params.head_size) * element_bytes)


def _sums(params: BandedParams | GlobalParams, rows: int) -> list[Buffer]:
    """The log-sum-exp, if it is asked for."""
    asked = params.log_sum_exp is not None
    return [Buffer(params.log_sum_exp, params.batch * params.num_heads * rows * 4, True)] if asked else []
