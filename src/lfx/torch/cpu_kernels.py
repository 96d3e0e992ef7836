"""The CPU kernels on torch tensors, through the C functions of plugins/cpu/calls.cpp, on torch's number of threads."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from lfx.errors import InputError
from lfx.runtime import custom_ops
from lfx.torch.params import BandedParams, GlobalParams, make_params, with_rows


class CpuKernels:
    """The functions of a library; they take float32.

    Args:
        instructions: name of the instruction set; empty = the widest one of this CPU.
    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it has no such functions.
        InputError: this CPU does not have the instruction set.
    """

    def __init__(self, path: Path, instructions: str = "") -> None:
        library = ctypes.CDLL(str(path))
        self._banded, self._global = library.lfxBandedAttentionCpu, library.lfxGlobalAttentionCpu
        for function, params in ((self._banded, BandedParams), (self._global, GlobalParams)):
            function.restype = ctypes.c_char_p
            function.argtypes = [ctypes.POINTER(params), ctypes.c_int32, ctypes.c_int32]
        library.lfxCpuInstructionSet.argtypes = [ctypes.c_char_p]
        self._set = library.lfxCpuInstructionSet(instructions.encode())
        if self._set < 0:
            raise InputError(
                f"{custom_ops.INSTRUCTIONS_VARIABLE} is {instructions!r}; it must be baseline, avx2 or avx512, and "
                "this CPU must have it"
            )

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
            "query": with_rows(query),
            "key": with_rows(key),
            "value": with_rows(value),
            "key_mask": key_mask.contiguous(),
            "global_index": global_index.contiguous(),
            "global_context": global_context.contiguous(),
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
        tensors = {
            "query": with_rows(query),
            "key": with_rows(key),
            "value": with_rows(value),
            "key_mask": key_mask.contiguous(),
        }
        return self._run(self._global, GlobalParams, tensors, num_heads, scale=scale, queries=query.shape[1])

    def _run(
        self,
        function: Any,
        params: type[ctypes.Structure],
        tensors: dict[str, torch.Tensor],
        num_heads: int,
        **fields: Any,
    ) -> torch.Tensor | None:
        query = tensors["query"]
        context = tensors["context"] = torch.empty_like(query, memory_format=torch.contiguous_format)
        filled = make_params(params, tensors, num_heads, **fields)
        unsupported = function(ctypes.byref(filled), self._set, torch.get_num_threads())
        return context if unsupported is None else None


@functools.cache
def _installed() -> CpuKernels | None:
    try:
        return CpuKernels(custom_ops.library(), os.environ.get(custom_ops.INSTRUCTIONS_VARIABLE, ""))
    except (custom_ops.NoKernelError, OSError, AttributeError):
        return None


def kernels_for(tensor: torch.Tensor) -> CpuKernels | None:
    """The kernels for a tensor's device and dtype; None where there are none."""
    return _installed() if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else None
