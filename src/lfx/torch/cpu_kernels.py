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
from lfx.torch.kernels import Kernels


class CpuKernels(Kernels):
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
        functions = library.lfxBandedAttentionCpu, library.lfxGlobalAttentionCpu
        super().__init__(*functions, [ctypes.c_int32, ctypes.c_int32], ctypes.c_char_p)
        library.lfxCpuInstructionSet.argtypes = [ctypes.c_char_p]
        self._set = library.lfxCpuInstructionSet(instructions.encode())
        if self._set < 0:
            raise InputError(
                f"{custom_ops.INSTRUCTIONS_VARIABLE} is {instructions!r}; it must be baseline, avx2 or avx512, and "
                "this CPU must have it"
            )

    def call(self, function: Any, params: ctypes.Structure, device: torch.device) -> bool:
        """Compute an op on torch's number of threads; False if the kernels do not support the sizes."""
        return function(ctypes.byref(params), self._set, torch.get_num_threads()) is None


@functools.cache
def _installed() -> CpuKernels | None:
    try:
        return CpuKernels(custom_ops.library(), os.environ.get(custom_ops.INSTRUCTIONS_VARIABLE, ""))
    except (custom_ops.NoKernelError, OSError, AttributeError):
        return None


def kernels_for(tensor: torch.Tensor) -> CpuKernels | None:
    """The kernels for a tensor's device and dtype; None where there are none."""
    return _installed() if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else None
