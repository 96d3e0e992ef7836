"""Both ops with each argument in each layout, and in each mode of PyTorch, against the dense definition."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lfx.errors import InputError
from lfx.parity import Case
from lfx.torch import banded_attention, cpu_kernels, global_attention
from tests.plugins import problems
from tests.torch.test_ops import DTYPES, error, tensors

Layout = Callable[[torch.Tensor], torch.Tensor]
PROBLEMS = {
    "banded": lambda precision: problems.banded(Case(2, 21, "scattered", "right"), 2, 8, window=4, precision=precision),
    "global": lambda precision: problems.global_(Case(2, 21, "none", "right"), 3, 2, 8, precision=precision),
    "global of many": lambda precision: problems.global_(Case(2, 21, "none", "right"), 70, 2, 8, precision=precision),
}
FUNCTIONS = {"banded": banded_attention, "global": global_attention, "global of many": global_attention}


def part(axis: int, step: int = 1) -> Layout:
    """Every step-th element of a larger tensor, from its fourth on."""

    def layout(tensor: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[axis] = step * shape[axis] + 5
        index = [slice(None)] * tensor.dim()
        index[axis] = slice(3, 3 + step * tensor.shape[axis], step)
        view = tensor.new_full(shape, 77)[tuple(index)]
        return view.copy_(tensor)

    return layout


def swapped(first: int, second: int) -> Layout:
    return lambda tensor: tensor.transpose(first, second).contiguous().transpose(first, second)


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


def for_floats(layout: Layout) -> Layout:
    return lambda tensor: layout(tensor) if tensor.is_floating_point() else tensor


LAYOUTS: dict[str, Layout] = {
    "rows of a larger tensor": part(-1),
    "every second number": part(-1, 2),
    "tokens of a longer text": part(1),
    "every third text": part(0, 3),
    "tokens first": swapped(0, 1),
    "tokens last": swapped(1, -1),
    "parameter": for_floats(torch.nn.Parameter),
    "of inference mode": inference,
    "negative view": for_floats(lambda tensor: torch._neg_view(-tensor)),
}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "deterministic": deterministic,
    "float64 by default": default_float64,
    "meta by default": lambda: torch.device("meta"),
}
TRANSFORMS: dict[str, Callable[[Any, Any], Any]] = {
    "functionalize": lambda function, given: torch.func.functionalize(function)(*given),
    "vmap": lambda function, given: torch.func.vmap(function)(*(tensor[None] for tensor in given))[0],
    "trace": lambda function, given: torch.jit.trace(function, given)(*given),
    "make_fx": lambda function, given: make_fx(function)(*given)(*given),
    "checkpoint": lambda function, given: checkpoint(function, *given, use_reentrant=False),
    "compile": lambda function, given: torch.compile(function, backend="aot_eager", fullgraph=True)(*given),
}


@pytest.mark.parametrize(
    ("precision", "kernels"),
    [("fp32", True), ("fp32", False), ("fp16", False), ("bf16", False)],
    ids=["kernels", "fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_each_layout_and_mode_gives_the_definition(
    op: str, precision: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(cpu_kernels, "kernels_for", lambda tensor: None)
    problem: Any = PROBLEMS[op](precision)
    inputs, expected, tolerance = tensors(problem), problem.dense(), problem.tolerance()

    def call(*given: torch.Tensor) -> Any:
        return FUNCTIONS[op](*given, **problem.attributes)

    def check(output: torch.Tensor, name: str) -> None:
        assert output.dtype == DTYPES[precision] and output.is_contiguous(), name
        assert error(output.detach(), expected) <= tolerance, name

    for layout, change in LAYOUTS.items():
        check(call(*map(change, inputs.values())), f"all {layout}")
        for argument in inputs:
            check(call(*{**inputs, argument: change(inputs[argument])}.values()), f"{argument} {layout}")
    for name, context in CONTEXTS.items():
        with context():
            output = call(*inputs.values())
        check(output, name)
    torch._dynamo.reset()
    for name, transform in TRANSFORMS.items():
        check(transform(call, tuple(inputs.values())), name)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_tensor_on_another_device_is_refused_by_name(op: str) -> None:
    problem: Any = PROBLEMS[op]("fp32")
    inputs = tensors(problem)
    for name in list(inputs)[1:]:
        moved = {**inputs, name: inputs[name].to("meta")}
        with pytest.raises(InputError, match=f": {name} is on meta, and query on cpu; move it there"):
            FUNCTIONS[op](**moved, **problem.attributes)
    on_meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    assert FUNCTIONS[op](**on_meta, **problem.attributes).shape == inputs["query"].shape
