"""The params structs of plugins/attention.h, filled from torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STRIDED = ("query", "key", "value", "context")
_LARGEST_STRIDE = 2**31
Params = TypeVar("Params", bound=ctypes.Structure)


def _int32(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int32) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


_LAYOUT = [("struct_bytes", ctypes.c_uint32), ("type", ctypes.c_int32)]
_STRIDES = [(f"{name}_stride", ctypes.c_int64) for name in _STRIDED]
_QUERY_TO_MASK = ("query", "key", "value", "key_mask")
_SIZES = ("num_heads", "head_size")


class BandedParams(ctypes.Structure):
    """`lfx::BandedParams`, field by field."""

    _fields_ = (
        *_LAYOUT,
        *_pointers(*_QUERY_TO_MASK, "global_index", "global_context", "context", "log_sum_exp"),
        *_STRIDES,
        *_int32("batch", "seqlen", "slots", *_SIZES, "window", "dilation", "causal"),
        ("scale", ctypes.c_float),
    )


class GlobalParams(ctypes.Structure):
    """`lfx::GlobalParams`, field by field."""

    _fields_ = (
        *_LAYOUT,
        *_pointers(*_QUERY_TO_MASK, "context", "log_sum_exp", "workspace"),
        *_STRIDES,
        *_int32("batch", "seqlen", "queries", *_SIZES),
        ("scale", ctypes.c_float),
    )


def make_params(params: type[Params], tensors: Mapping[str, torch.Tensor], num_heads: int, **fields: Any) -> Params:
    """Fill a struct.

    Args:
        tensors: the tensors of the struct by the names of its fields, as `readable` returns them.
        fields: those that do not follow from the tensors.
    """
    batch, seqlen, width = tensors["key"].shape
    return params(
        struct_bytes=ctypes.sizeof(params),
        type=_TYPES[tensors["query"].dtype],
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **{f"{name}_stride": row_stride(tensors[name]) for name in _STRIDED},
        batch=batch,
        seqlen=seqlen,
        num_heads=num_heads,
        head_size=width // num_heads,
        **fields,
    )


def row_stride(tensor: torch.Tensor) -> int:
    """The number of elements from a token's row to the next one's, also across batch elements; (B, S, H·D)."""
    batch, tokens, width = tensor.shape
    if tokens > 1:
        return tensor.stride(1)
    return tensor.stride(0) if batch > 1 else width


def readable(tensors: Mapping[str, torch.Tensor], alignment: int) -> dict[str, torch.Tensor]:
    """The tensors as the kernels read them: those that have a stride as `with_rows` gives them, others contiguous."""
    return {
        name: with_rows(tensor, alignment) if name in _STRIDED else tensor.contiguous()
        for name, tensor in tensors.items()
    }


def with_rows(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    """The tensor (B, S, H·D) if its rows have no gaps inside, one distance and the alignment; otherwise a copy.

    Args:
        alignment: of the address of each row, in bytes.
    """
    batch, tokens, width = tensor.shape
    stride = row_stride(tensor)
    is_regular = tensor.stride(2) == 1 and width <= stride <= _LARGEST_STRIDE
    is_regular &= batch == 1 or tensor.stride(0) == tokens * stride
    is_aligned = not any(number % alignment for number in (tensor.data_ptr(), stride * tensor.element_size()))
    return tensor if is_regular and is_aligned else tensor.clone(memory_format=torch.contiguous_format)
