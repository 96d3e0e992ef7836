"""The kernels' C interface (plugins/attention.h): parameters, and launches on torch tensors."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

TYPES = {"fp32": 0, "fp16": 1, "bf16": 2}
INPUTS = ("query", "key", "value", "key_mask", "global_index", "global_context")


STRIDES = ("query_stride", "key_stride", "value_stride", "context_stride")


class BandedParams(ctypes.Structure):
    """`lfx::BandedParams` of plugins/attention.h, field by field."""

    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (*INPUTS, "context", "log_sum_exp")),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int32) for name in ("batch", "seqlen", "slots", "num_heads", "head_size")),
        *((name, ctypes.c_int32) for name in ("window", "dilation", "causal")),
        ("scale", ctypes.c_float),
    )


class GlobalParams(ctypes.Structure):
    """`lfx::GlobalParams` of plugins/attention.h, field by field."""

    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (*INPUTS[:4], "context", "log_sum_exp", "workspace")),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int32) for name in ("batch", "seqlen", "queries", "num_heads", "head_size")),
        ("scale", ctypes.c_float),
    )


class Kernels:
    """The launch functions of a library, which take parameters and a stream, and return a cudaError_t."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.banded, self.global_ = library.lfxBandedAttention, library.lfxGlobalAttention
        for function, params in ((self.banded, BandedParams), (self.global_, GlobalParams)):
            function.restype = ctypes.c_int32
            function.argtypes = [ctypes.POINTER(params), ctypes.c_void_p]
        self.workspace_bytes = library.lfxGlobalWorkspaceBytes
        self.workspace_bytes.restype = ctypes.c_size_t
        self.workspace_bytes.argtypes = [ctypes.c_int32] * 4


def banded_params(
    inputs: Mapping[str, Any], addresses: Mapping[str, int], precision: str, num_heads: int, **attributes: int
) -> BandedParams:
    """Fill the parameters of BandedAttention.

    Args:
        inputs: arrays or tensors by name; only their shapes are read.
        addresses: of the inputs and of `context`.
        attributes: window, and dilation and causal if they are not 1 and 0.
    """
    attributes = {"dilation": 1, "causal": 0, **attributes}
    shared = _shared_fields(BandedParams, inputs, precision, num_heads)
    return BandedParams(**addresses, **shared, **attributes, slots=inputs["global_index"].shape[1])


def global_params(
    inputs: Mapping[str, Any], addresses: Mapping[str, int], precision: str, num_heads: int
) -> GlobalParams:
    """Fill the parameters of GlobalAttention, as `banded_params` does; `addresses` has `workspace` too."""
    shared = _shared_fields(GlobalParams, inputs, precision, num_heads)
    return GlobalParams(**addresses, **shared, queries=inputs["query"].shape[1])


def _shared_fields(
    params: type[ctypes.Structure], inputs: Mapping[str, Any], precision: str, num_heads: int
) -> dict[str, Any]:
    batch, seqlen, width = inputs["key"].shape
    size = width // num_heads
    sizes = {"batch": batch, "seqlen": seqlen, "num_heads": num_heads, "head_size": size}
    strides = dict.fromkeys(STRIDES, width)
    layout = {"struct_bytes": ctypes.sizeof(params), "type": TYPES[precision]}
    return {**layout, **sizes, **strides, "scale": size**-0.5}


def run_banded(kernels: Kernels, inputs: Mapping[str, Any], out: Any, **attributes: int) -> Any:
    """Run BandedAttention on torch tensors and write its output to `out`, which is returned.

    Args:
        inputs: query, key and value (B, S, H·D), key_mask (B, S) int32, global_index (B, G) int32, and global_context
            (B, G, H·D).
        out: (B, S, H·D). There may be gaps between its rows, and those of query, key and value.
        attributes: num_heads, and those of `banded_params`.
    """
    params = banded_params(inputs, _addresses(**inputs, context=out), _precision(out), **attributes)
    _set_strides(params, inputs, out)
    return _launch(kernels.banded, params, out)


def run_global(
    kernels: Kernels, inputs: Mapping[str, Any], out: Any, workspace: Any, num_heads: int, scale: float | None = None
) -> Any:
    """Run GlobalAttention on torch tensors and write its output to `out`, which is returned.

    Args:
        inputs: query (B, G, H·D), key and value (B, S, H·D), and key_mask (B, S) int32.
        out: (B, G, H·D). There may be gaps between its rows, and those of query, key and value.
        workspace: `workspace_bytes` bytes.
        scale: default: 1/√D.
    """
    addresses = _addresses(**inputs, context=out, workspace=workspace)
    params = global_params(inputs, addresses, _precision(out), num_heads)
    params.scale = scale or params.scale
    _set_strides(params, inputs, out)
    return _launch(kernels.global_, params, out)


def dtype_of(precision: str) -> Any:
    """Return torch's dtype of a precision."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _precision(tensor: Any) -> str:
    return next(precision for precision in TYPES if dtype_of(precision) == tensor.dtype)


def _addresses(**tensors: Any) -> dict[str, int]:
    for name, tensor in tensors.items():
        may_have_gaps = f"{name}_stride" in STRIDES
        stride_bytes = _row_stride(tensor) * tensor.element_size() if may_have_gaps else 0
        if not (stride_bytes or tensor.is_contiguous()) or tensor.data_ptr() % 16 or stride_bytes % 16:
            raise ValueError(f"{name} is not contiguous and 16-byte aligned, apart from gaps between its rows")
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _row_stride(tensor: Any) -> int:
    """Return the number of elements from a row of a tensor (B, S, width) to the next; 0 if it varies."""
    batch, rows, width = tensor.shape
    stride = tensor.stride(1) if rows > 1 else tensor.stride(0) if batch > 1 else width
    is_regular = tensor.stride(2) == 1 and stride >= width and (batch == 1 or tensor.stride(0) == rows * stride)
    return int(stride) if is_regular else 0


def _set_strides(params: Any, inputs: Mapping[str, Any], out: Any) -> None:
    for name in STRIDES:
        tensor = out if name == "context_stride" else inputs[name.removesuffix("_stride")]
        setattr(params, name, _row_stride(tensor))


def _launch(function: Any, params: ctypes.Structure, out: Any) -> Any:
    """Launch on torch's current stream, which is the captured one inside torch.cuda.graph; CPU tensors have none."""
    stream = None
    if out.is_cuda:
        import torch

        stream = torch.cuda.current_stream(out.device).cuda_stream
    status = function(ctypes.byref(params), stream)
    if status:
        raise RuntimeError(f"the launch failed: CUDA error {status}")
    return out


@contextlib.contextmanager
def in_lfx_torch(library: str | Path) -> Iterator[None]:
    """Let `lfx.torch` run the kernels of a library in place of the installed one's."""
    from lfx.torch import kernels

    fused = kernels.CudaKernels(Path(library))
    with mock.patch.object(kernels, "_installed", lambda: fused):
        yield
