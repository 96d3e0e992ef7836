"""The plugin library: its path, and its kernel launches through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import lfx
from lfx.errors import PluginError

NAMESPACE = "lfx"
VERSION = "1"
LIBRARY = "liblfx_plugins.so"
# The kernels load a head's row 16 bytes at a time; see plugins/attention.h for the limits.
HEAD_SIZE_MULTIPLE = 8
TYPES = {"fp32": 0, "fp16": 1, "bf16": 2}


def library() -> Path:
    """The path of the installed plugin library.

    Raises:
        PluginError: lfx was installed without it.
    """
    for folder in lfx.__path__:
        path = Path(folder) / "_lib" / LIBRARY
        if path.is_file():
            return path
    raise PluginError(
        f"{LIBRARY} is not installed: pip found no CUDA compiler or no TensorRT header when it built lfx; install "
        "again where nvcc is on the PATH, with CMAKE_ARGS=-DTensorRT_INCLUDE_DIR=FOLDER, or use --no-plugin"
    )


class BandedParams(ctypes.Structure):
    """`lfx::BandedParams` of plugins/attention.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "key_mask", "global_index", "global_context")),
        ("context", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("batch", "seqlen", "slots", "num_heads", "head_size")),
        *((name, ctypes.c_int32) for name in ("window", "dilation", "causal")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class GlobalParams(ctypes.Structure):
    """`lfx::GlobalParams` of plugins/attention.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "key_mask", "context", "workspace")),
        *((name, ctypes.c_int32) for name in ("batch", "seqlen", "queries", "num_heads", "head_size")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class Kernels:
    """The library's kernel launches, for callers that have device pointers and a stream."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise PluginError(f"{path} cannot be loaded: {error}") from error
        self.banded = self._launch("lfxBandedAttention", BandedParams)
        self.global_ = self._launch("lfxGlobalAttention", GlobalParams)
        self.workspace_bytes = self._library.lfxGlobalWorkspaceBytes
        self.workspace_bytes.restype = ctypes.c_size_t
        self.workspace_bytes.argtypes = [ctypes.c_int32] * 4

    def _launch(self, name: str, params: type[ctypes.Structure]) -> Any:
        """A function (params, stream) -> cudaError_t, 0 if the kernel was launched."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.POINTER(params), ctypes.c_void_p]
        return function
