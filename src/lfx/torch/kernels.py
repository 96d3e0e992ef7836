"""The CUDA kernels of the plugin library on torch tensors, through the C interface of plugins/attention.h."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from lfx.errors import LfxError, PluginError
from lfx.runtime import plugin
from lfx.torch.params import BandedParams, GlobalParams, make_params

_INVALID_VALUE = 1  # cudaErrorInvalidValue: the kernels do not support the sizes, and nothing was launched


class Kernels:
    """The launch functions of a library.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it has no such functions.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._banded, self._global = library.lfxBandedAttention, library.lfxGlobalAttention
        for function, params in ((self._banded, BandedParams), (self._global, GlobalParams)):
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
        tensors = {
            "query": query,
            "key": key,
            "value": value,
            "key_mask": key_mask,
            "global_index": global_index,
            "global_context": global_context,
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        tensors["context"] = torch.empty_like(tensors["query"])
        sizes = {"slots": global_index.shape[1], "window": window, "dilation": dilation, "causal": int(causal)}
        params = make_params(BandedParams, tensors, num_heads, scale=scale, **sizes)
        return _launch(self._banded, params, tensors["context"])

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
        tensors = {"query": query, "key": key, "value": value, "key_mask": key_mask}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        tensors["context"] = torch.empty_like(tensors["query"])
        batch, queries, width = query.shape
        size = self._workspace_bytes(batch, queries, num_heads, width // num_heads)
        tensors["workspace"] = torch.empty(size, dtype=torch.uint8, device=query.device)
        params = make_params(GlobalParams, tensors, num_heads, scale=scale, queries=queries)
        return _launch(self._global, params, tensors["context"])


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
