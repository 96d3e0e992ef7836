"""The CUDA kernels of the plugin library on torch tensors, through the C interface of plugins/attention.h."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from lfx.errors import LfxError, PluginError
from lfx.runtime import plugin

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STRIDES = ("query_stride", "key_stride", "value_stride", "context_stride")
_SIZES = ("num_heads", "head_size")
_INVALID_VALUE = 1  # cudaErrorInvalidValue: the kernels do not support the sizes, and nothing was launched


def _int32(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int32) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


_LAYOUT = [("struct_bytes", ctypes.c_uint32), ("type", ctypes.c_int32)]
_QUERY_TO_MASK = ("query", "key", "value", "key_mask")


class _BandedParams(ctypes.Structure):
    """`lfx::BandedParams`, field by field."""

    _fields_ = (
        *_LAYOUT,
        *_pointers(*_QUERY_TO_MASK, "global_index", "global_context", "context", "log_sum_exp"),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *_int32("batch", "seqlen", "slots", *_SIZES, "window", "dilation", "causal"),
        ("scale", ctypes.c_float),
    )


class _GlobalParams(ctypes.Structure):
    """`lfx::GlobalParams`, field by field."""

    _fields_ = (
        *_LAYOUT,
        *_pointers(*_QUERY_TO_MASK, "context", "log_sum_exp", "workspace"),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *_int32("batch", "seqlen", "queries", *_SIZES),
        ("scale", ctypes.c_float),
    )


class Kernels:
    """The launch functions of a library.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it has no such functions.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._banded, self._global = library.lfxBandedAttention, library.lfxGlobalAttention
        for function, params in ((self._banded, _BandedParams), (self._global, _GlobalParams)):
            function.restype = ctypes.c_int32
            function.argtypes = [ctypes.POINTER(params), ctypes.c_void_p]
        self._workspace_bytes = library.lfxGlobalWorkspaceBytes
        self._workspace_bytes.restype = ctypes.c_size_t
        self._workspace_bytes.argtypes = [ctypes.c_int32] * 4

    def banded_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor,
        global_index: torch.Tensor,
        global_context: torch.Tensor,
        *,
        num_heads: int,
        window: int,
        dilation: int,
        causal: bool,
        scale: float,
    ) -> torch.Tensor | None:
        """Launch BandedAttention on the current stream; None if the kernels do not support the sizes.

        Raises:
            LfxError: CUDA failed.
        """
        inputs = [x.contiguous() for x in (query, key, value, key_mask, global_index, global_context)]
        context = torch.empty_like(inputs[0])
        names = (*_QUERY_TO_MASK, "global_index", "global_context", "context")
        params = _BandedParams(
            **_shared(_BandedParams, names, [*inputs, context], num_heads, scale),
            slots=global_index.shape[1],
            window=window,
            dilation=dilation,
            causal=int(causal),
        )
        return _launch(self._banded, params, context)

    def global_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor,
        *,
        num_heads: int,
        scale: float,
    ) -> torch.Tensor | None:
        """Launch GlobalAttention on the current stream; None if the kernels do not support the sizes.

        Raises:
            LfxError: CUDA failed.
        """
        inputs = [x.contiguous() for x in (query, key, value, key_mask)]
        context = torch.empty_like(inputs[0])
        batch, queries, width = query.shape
        size = self._workspace_bytes(batch, queries, num_heads, width // num_heads)
        workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        names = (*_QUERY_TO_MASK, "context", "workspace")
        tensors = [*inputs, context, workspace]
        params = _GlobalParams(**_shared(_GlobalParams, names, tensors, num_heads, scale), queries=queries)
        return _launch(self._global, params, context)


def _shared(
    params: type[ctypes.Structure], names: tuple[str, ...], tensors: list[torch.Tensor], num_heads: int, scale: float
) -> dict[str, Any]:
    """The fields that both params have."""
    query, key = tensors[:2]
    batch, seqlen, width = key.shape
    return {
        "struct_bytes": ctypes.sizeof(params),
        "type": _TYPES[query.dtype],
        **{name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)},
        **dict.fromkeys(_STRIDES, width),
        "batch": batch,
        "seqlen": seqlen,
        "num_heads": num_heads,
        "head_size": width // num_heads,
        "scale": scale,
    }


def _launch(function: Any, params: ctypes.Structure, context: torch.Tensor) -> torch.Tensor | None:
    if context.is_cuda:
        with torch.cuda.device(context.device):
            status = function(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    else:  # kernels that are emulated on the host, in tests
        status = function(ctypes.byref(params), None)
    if status == _INVALID_VALUE:
        return None
    if status:
        raise LfxError(f"an lfx kernel failed: CUDA error {status}")
    return context


@functools.cache
def _installed() -> Kernels | None:
    try:
        return Kernels(plugin.library())
    except (PluginError, OSError, AttributeError):
        return None


def kernels_for(tensor: torch.Tensor) -> Kernels | None:
    """The kernels that run on the device of a tensor; None where there are none."""
    return _installed() if tensor.is_cuda else None
