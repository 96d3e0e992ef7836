"""The two ops as functions of a library that take a params struct, and those of the plugin library, on CUDA tensors."""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from lfx.errors import LfxError, PluginError
from lfx.runtime import plugin
from lfx.torch.params import BandedParams, GlobalParams, make_params, readable

_INVALID_VALUE = 1  # cudaErrorInvalidValue: the kernels do not support the sizes, and nothing was launched


class Kernels(ABC):
    """The ops on torch tensors; a subclass has the functions of a library, and calls them.

    Args:
        banded, global_: the functions, of a pointer to the params and further arguments.
        arguments: ctypes of the further arguments.
        result: ctype of the result.
    """

    alignment = 1  # of each row of query, key and value, in bytes

    def __init__(self, banded: Any, global_: Any, arguments: list[Any], result: Any) -> None:
        self._banded, self._global = banded, global_
        for function, params in ((banded, BandedParams), (global_, GlobalParams)):
            function.restype, function.argtypes = result, [ctypes.POINTER(params), *arguments]

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
        """Compute BandedAttention; None if the kernels do not support the sizes."""
        tensors = {
            "query": query,
            "key": key,
            "value": value,
            "key_mask": key_mask,
            "global_index": global_index,
            "global_context": global_context,
        }
        sizes = {"slots": global_index.shape[1], "window": window, "dilation": dilation, "causal": int(causal)}
        return self._run(self._banded, BandedParams, tensors, num_heads, scale=scale, **sizes)

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
        """Compute GlobalAttention; None if the kernels do not support the sizes."""
        batch, queries, width = query.shape
        size = self.workspace_bytes(batch, queries, num_heads, width // num_heads)
        workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        tensors = {"query": query, "key": key, "value": value, "key_mask": key_mask, "workspace": workspace}
        return self._run(self._global, GlobalParams, tensors, num_heads, scale=scale, queries=queries)

    def workspace_bytes(self, batch: int, queries: int, num_heads: int, head_size: int) -> int:
        """Size of the workspace that GlobalAttention needs."""
        return 0

    @abstractmethod
    def call(self, function: Any, params: ctypes.Structure, device: torch.device) -> bool:
        """Call a function of the library on tensors of a device; False if it does not support the sizes."""

    def _run(
        self,
        function: Any,
        params: type[ctypes.Structure],
        tensors: dict[str, torch.Tensor],
        num_heads: int,
        **fields: Any,
    ) -> torch.Tensor | None:
        context = torch.empty_like(tensors["query"], memory_format=torch.contiguous_format)
        tensors = {**readable(tensors, self.alignment), "context": context}
        filled = make_params(params, tensors, num_heads, **fields)
        return context if self.call(function, filled, context.device) else None


class CudaKernels(Kernels):
    """The kernels of the plugin library, which run on PyTorch's current stream.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it has no such functions.
    """

    alignment = 16  # kDEVICE_ALIGNMENT of plugins/attention.h

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        super().__init__(library.lfxBandedAttention, library.lfxGlobalAttention, [ctypes.c_void_p], ctypes.c_int32)
        self._workspace_bytes = library.lfxGlobalWorkspaceBytes
        self._workspace_bytes.restype = ctypes.c_size_t
        self._workspace_bytes.argtypes = [ctypes.c_int32] * 4

    def workspace_bytes(self, batch: int, queries: int, num_heads: int, head_size: int) -> int:
        """Size of the workspace that GlobalAttention needs."""
        return int(self._workspace_bytes(batch, queries, num_heads, head_size))

    def call(self, function: Any, params: ctypes.Structure, device: torch.device) -> bool:
        """Launch a kernel; False if the kernels do not support the sizes.

        Raises:
            LfxError: CUDA failed.
        """
        if device.type == "cuda":
            with torch.cuda.device(device):
                status = function(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
        else:  # kernels that are emulated on the host, in tests
            status = function(ctypes.byref(params), None)
        if status not in (0, _INVALID_VALUE):
            raise LfxError(f"an lfx kernel failed: CUDA error {status}")
        return bool(status == 0)


@functools.cache
def _installed() -> CudaKernels | None:
    try:
        return CudaKernels(plugin.library())
    except (PluginError, OSError, AttributeError):
        return None


def kernels_for(tensor: torch.Tensor) -> CudaKernels | None:
    """The kernels that run on the device of a tensor; None where there are none."""
    return _installed() if tensor.is_cuda else None
