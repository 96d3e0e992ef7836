"""`lfx::banded_attention` and `lfx::global_attention`: the ops of docs/ops.md as custom ops of PyTorch.

torch.compile and torch.export keep each as one node with a known shape. The ops compute no gradients. Where they are
installed and support the sizes, kernels run: on a GPU those of the plugin library, and on the CPU in float32 those of
ONNX Runtime's custom ops. Otherwise PyTorch's operators run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from lfx.errors import InputError
from lfx.torch import blocks, cpu_kernels, kernels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor key_mask"
_LARGEST = 2**31 - 1


def _banded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor,
    global_index: torch.Tensor,
    global_context: torch.Tensor,
    *,
    num_heads: int,
    window: int,
    dilation: int = 1,
    causal: int = 0,
    scale: float = 0.0,
) -> torch.Tensor:
    _check_attention("banded_attention", query, key, value, key_mask, num_heads)
    _check_banded(query, global_index, global_context, window, dilation, causal)
    if key.shape != query.shape:
        raise InputError(f"banded_attention: key has shape {_shape(key)}, and query {_shape(query)}; give one shape")
    attributes: dict[str, Any] = {
        "num_heads": num_heads,
        "window": window,
        "dilation": dilation,
        "causal": bool(causal),
        "scale": scale or blocks.default_scale(query.shape[2], num_heads),
    }
    inputs = (query, key, value, key_mask, global_index, global_context)
    fused = _kernels_for(query)
    context = None if fused is None else fused.banded_attention(*inputs, **attributes)
    if context is None:
        with torch.autocast(query.device.type, enabled=False):  # which would change dtypes
            context = blocks.banded_attention(*inputs, **attributes)
    return context


def _global(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> torch.Tensor:
    _check_attention("global_attention", query, key, value, key_mask, num_heads)
    scale = scale or blocks.default_scale(query.shape[2], num_heads)
    inputs, attributes = (query, key, value, key_mask), {"num_heads": num_heads, "scale": scale}
    fused = _kernels_for(query)
    context = None if fused is None else fused.global_attention(*inputs, **attributes)  # type: ignore[arg-type]
    if context is None:
        with torch.autocast(query.device.type, enabled=False):
            context = blocks.global_attention(*inputs, **attributes)  # type: ignore[arg-type]
    return context


def _kernels_for(query: torch.Tensor) -> kernels.Kernels | None:
    return kernels.kernels_for(query) or cpu_kernels.kernels_for(query)


def _check_attention(
    op: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor, num_heads: int
) -> None:
    """Raise InputError for tensors that neither op takes."""
    # The results would have no tangents. torch.func.jvp hides those of the inputs from the op.
    if torch.autograd.forward_ad._current_level >= 0:
        raise InputError(f"{op} has no derivatives in forward mode; take them of Hugging Face's attention")
    if query.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise InputError(f"{op}: query is {_dtype(query)}; convert it to one of {names}")
    for name, tensor in (("key", key), ("value", value)):
        _check_device(op, name, tensor, query)
        if tensor.dtype != query.dtype:
            raise InputError(f"{op}: {name} is {_dtype(tensor)}, and query {_dtype(query)}; give one dtype")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise InputError(f"{op}: {name} has shape {_shape(tensor)}; give (batch, tokens, heads · head size)")
    same = key.shape == value.shape and query.shape[::2] == key.shape[::2]
    if not same:
        shapes = f"query {_shape(query)}, key {_shape(key)} and value {_shape(value)}"
        raise InputError(f"{op}: {shapes} do not fit; give one batch and width, and one length of key and value")
    _check_integers(op, "key_mask", key_mask, key.shape[:2], query)
    if not 1 <= num_heads <= query.shape[2] or query.shape[2] % num_heads:
        raise InputError(f"{op}: num_heads is {num_heads}; give a divisor of the width {query.shape[2]}")


def _check_banded(
    query: torch.Tensor, index: torch.Tensor, context: torch.Tensor, window: int, dilation: int, causal: int
) -> None:
    """Raise InputError for what is particular to banded_attention."""
    if index.dim() != 2 or index.shape[1] < 1:
        raise InputError(f"banded_attention: global_index has shape {_shape(index)}; give (batch, slots), slots >= 1")
    _check_integers("banded_attention", "global_index", index, (query.shape[0], index.shape[1]), query)
    _check_device("banded_attention", "global_context", context, query)
    expected = (query.shape[0], index.shape[1], query.shape[2])
    if context.dtype != query.dtype or tuple(context.shape) != expected:
        raise InputError(
            f"banded_attention: global_context is {_dtype(context)} {_shape(context)}; give {_dtype(query)} {expected}"
        )
    for name, value in (("window", window), ("dilation", dilation)):
        if not 1 <= value <= _LARGEST:
            raise InputError(f"banded_attention: {name} is {value}; give 1 or more")
    if causal not in (0, 1):
        raise InputError(f"banded_attention: causal is {causal}; give 0 or 1")


def _check_integers(op: str, name: str, tensor: torch.Tensor, shape: Any, query: torch.Tensor) -> None:
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != tuple(shape):
        raise InputError(f"{op}: {name} is {_dtype(tensor)} {_shape(tensor)}; give int32 {tuple(shape)}")
    _check_device(op, name, tensor, query)


def _check_device(op: str, name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        raise InputError(f"{op}: {name} is on {tensor.device}, and query on {query.device}; move it there")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _keep_shapes(ctx: Any, inputs: tuple[torch.Tensor, ...], keyword_only_inputs: Any, output: Any) -> None:
    ctx.shapes = [tensor.shape if tensor.is_floating_point() else None for tensor in inputs]


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """For each tensor that may have a gradient an op that refuses it.

    The error is not raised here: torch.compile traces this for every forward in which gradients are enabled.
    """
    return tuple(None if shape is None else no_gradient(gradient, shape) for shape in ctx.shapes)


def _no_gradient(gradient: torch.Tensor, shape: Any) -> NoReturn:
    raise InputError("the lfx ops compute no gradients; train with Hugging Face's attention, and accelerate afterwards")


def _fake(op: str) -> Callable[..., torch.Tensor]:
    """The fake kernel of an op: a contiguous output with the shape, dtype and device of the query, and without data.

    PyTorch also calls it where any tensor is on the device "meta".
    """

    def like_query(query: torch.Tensor, *others: torch.Tensor, **_: Any) -> torch.Tensor:
        names = ("key", "value", "key_mask", "global_index", "global_context")
        for name, tensor in zip(names, others, strict=False):
            _check_device(op, name, tensor, query)
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    return like_query


def _at_most(is_global: torch.Tensor, most: int) -> torch.Tensor:
    """A copy of a (B, S) bool, if no row has more than `most` global tokens.

    An op of its own: inductor would fuse an assertion into a parallel loop, in which an exception ends the process.
    """
    fits = (is_global.sum(dim=1) <= most).all()
    message = f"a row has more than max_global={most} global tokens"
    if fits.is_cuda:  # without waiting for the device
        torch._assert_async(fits, message)
    elif not fits:
        raise RuntimeError(message)
    return is_global.clone()


# Explicit schemas: torch cannot infer them from annotations that are strings.
banded_attention = torch.library.custom_op(
    "lfx::banded_attention",
    _banded,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor global_index, Tensor global_context, *, int num_heads, int window, int dilation=1, "
    "int causal=0, float scale=0.0) -> Tensor",
)
global_attention = torch.library.custom_op(
    "lfx::global_attention",
    _global,
    mutates_args=(),
    schema=f"({_TENSORS}, *, int num_heads, float scale=0.0) -> Tensor",
)
for _name, _op in (("banded_attention", banded_attention), ("global_attention", global_attention)):
    _op.register_fake(_fake(_name))
    _op.register_autograd(_gradients, setup_context=_keep_shapes)

no_gradient = torch.library.custom_op(
    "lfx::no_gradient", _no_gradient, mutates_args=(), schema="(Tensor gradient, SymInt[] shape) -> Tensor"
)
no_gradient.register_fake(lambda gradient, shape: gradient.new_empty(shape))

at_most = torch.library.custom_op(
    "lfx::at_most", _at_most, mutates_args=(), schema="(Tensor is_global, int most) -> Tensor"
)
at_most.register_fake(lambda is_global, most: torch.empty_like(is_global))
