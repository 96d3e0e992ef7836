"""The custom ops: the dense definition, torch's own checks, what they refuse, and torch.compile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from lfx.errors import InputError
from lfx.parity import GLOBALS, PADDINGS, Case
from lfx.torch import banded_attention, blocks, cpu_kernels, global_attention, ops
from tests.plugins import problems

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Odd lengths, those around the window, and one of several blocks of queries; two patterns of masks each.
LENGTHS = (1, 2, 7, 8, 9, 17, 129, 300)
CASES = [
    Case(3, length, GLOBALS[(i + j) % len(GLOBALS)], PADDINGS[(i + 2 * j) % len(PADDINGS)])
    for i, length in enumerate(LENGTHS)
    for j in range(3)
]
ATTRIBUTES = ({}, {"dilation": 3}, {"causal": 1}, {"dilation": 2, "causal": 1})


def tensors(problem: problems.Banded | problems.Global) -> dict[str, torch.Tensor]:
    """The inputs of a problem as tensors."""
    converted = {}
    for name, array in problem.inputs.items():
        is_float = array.dtype.kind != "i"
        tensor = torch.from_numpy(array.astype(np.float32) if is_float else array)
        converted[name] = tensor.to(DTYPES[problem.precision]) if is_float else tensor
    return converted


def error(output: torch.Tensor, expected: Any) -> float:
    """The largest difference."""
    return float(np.abs(output.double().numpy() - expected).max())


@pytest.fixture(params=[64, 256, "kernels"], ids=lambda size: f"blocks of {size}" if size != "kernels" else size)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of queries in a block of PyTorch's operators; or the CPU kernels, which take float32."""
    if request.param == "kernels":
        assert cpu_kernels.kernels_for(torch.zeros(1)) is not None
    else:
        monkeypatch.setattr(cpu_kernels, "kernels_for", lambda tensor: None)
        monkeypatch.setattr(blocks, "BLOCK", request.param)


@pytest.mark.parametrize("precision", DTYPES)
def test_banded_attention_is_the_definition(block: None, precision: str) -> None:
    for i, case in enumerate(CASES):
        attributes = ATTRIBUTES[i % len(ATTRIBUTES)]
        problem = problems.banded(case, 2, 8, window=5 + 40 * (i % 2), precision=precision, **attributes)
        output = banded_attention(**tensors(problem), **problem.attributes)
        assert output.is_contiguous() and output.dtype == DTYPES[precision]
        assert error(output, problem.dense()) <= problem.tolerance(), f"{case} {attributes}"


@pytest.mark.parametrize("precision", DTYPES)
def test_slots_with_a_position_outside_the_sequence_are_unused(block: None, precision: str) -> None:
    problem = problems.banded(Case(2, 9, "scattered"), 2, 8, window=5, precision=precision)
    inputs = tensors(problem)
    expected = banded_attention(**inputs, **problem.attributes)
    for outside in (9, 10, 2**31 - 1, -(2**31)):
        index = inputs["global_index"].masked_fill(inputs["global_index"] < 0, outside)
        assert torch.equal(banded_attention(**{**inputs, "global_index": index}, **problem.attributes), expected)


@pytest.mark.parametrize("precision", DTYPES)
def test_global_attention_is_the_definition(block: None, precision: str) -> None:
    for i, case in enumerate(CASES):
        problem = problems.global_(case, (1, 5, 70)[i % 3], 2, 8, precision=precision)
        output = global_attention(**tensors(problem), **problem.attributes)
        assert output.is_contiguous() and output.dtype == DTYPES[precision]
        assert error(output, problem.dense()) <= problem.tolerance(), str(case)


def test_thirds_of_one_projection_and_a_scale_are_taken() -> None:
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, 8, window=5)
    inputs = tensors(problem)
    packed = torch.cat([inputs[name] for name in ("query", "key", "value")], dim=2)
    parts = dict(zip(("query", "key", "value"), packed.chunk(3, dim=2), strict=True))
    assert not parts["query"].is_contiguous()
    output = banded_attention(**{**inputs, **parts}, **problem.attributes)
    torch.testing.assert_close(output, banded_attention(**inputs, **problem.attributes), rtol=0, atol=0)
    doubled = banded_attention(**{**inputs, "query": 2 * inputs["query"]}, **problem.attributes, scale=8**-0.5 / 2)
    assert error(doubled, problem.dense()) <= problem.tolerance()


def test_the_order_of_a_batch_changes_no_bit() -> None:
    problem = problems.banded(Case(4, 300, "ragged", "right"), 2, 8, window=45)
    inputs, order = tensors(problem), torch.tensor([2, 0, 3, 1])
    output = banded_attention(**inputs, **problem.attributes)
    moved = banded_attention(**{name: x[order] for name, x in inputs.items()}, **problem.attributes)
    assert torch.equal(moved, output[order])
    given = global_inputs(4, 300, 3)
    moved = global_attention(**{name: x[order] for name, x in given.items()}, num_heads=2)
    assert torch.equal(moved, global_attention(**given, num_heads=2)[order])


def global_inputs(batch: int, seqlen: int, queries: int) -> dict[str, torch.Tensor]:
    """Tensors for global_attention of two heads of 8."""
    return tensors(problems.global_(Case(batch, seqlen, "none", "right"), queries, 2, 8))


def test_torch_s_own_checks_pass() -> None:
    problem = problems.banded(Case(2, 37, "scattered", "right"), 2, 8, window=5)
    for causal in (0, 1):
        options = {**problem.attributes, "causal": causal}
        torch.library.opcheck(torch.ops.lfx.banded_attention, tuple(tensors(problem).values()), options)
    torch.library.opcheck(torch.ops.lfx.global_attention, tuple(global_inputs(2, 37, 3).values()), {"num_heads": 2})
    torch.library.opcheck(ops.at_most, (torch.eye(3, 7, dtype=torch.bool), 1))
    assert torch.ops.lfx.banded_attention.default._schema.name == "lfx::banded_attention"


def test_both_ops_compile_to_one_graph_for_every_length() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def layer(inputs: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> torch.Tensor:
        context = global_attention(**rows, num_heads=2)
        return banded_attention(**inputs, num_heads=2, window=5) + context.sum()

    for seqlen in (37, 40, 57, 130):
        problem = problems.banded(Case(2, seqlen, "scattered"), 2, 8, window=5)
        inputs, rows = tensors(problem), global_inputs(2, seqlen, 3)
        expected = banded_attention(**inputs, num_heads=2, window=5) + global_attention(**rows, num_heads=2).sum()
        torch.testing.assert_close(layer(inputs, rows), expected)
    assert counter.frame_count == 1


def test_gradients_are_refused_in_one_line() -> None:
    problem = problems.banded(Case(1, 9, "first"), 2, 8, window=5)
    inputs = tensors(problem)
    output = banded_attention(**{**inputs, "query": inputs["query"].requires_grad_()}, **problem.attributes)
    with pytest.raises(InputError, match="the lfx ops compute no gradients; train with Hugging Face's attention"):
        output.sum().backward()
    rows = global_inputs(1, 9, 2)
    output = global_attention(**{**rows, "value": rows["value"].requires_grad_()}, num_heads=2)
    with pytest.raises(InputError, match="the lfx ops compute no gradients"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["query", "key", "value", "global_context"])
def test_derivatives_in_forward_mode_are_refused(name: str) -> None:
    problem = problems.banded(Case(1, 9, "first"), 2, 8, window=5)
    inputs, rows = tensors(problem), global_inputs(1, 9, 2)

    def banded(x: torch.Tensor) -> torch.Tensor:
        return banded_attention(**{**inputs, name: x}, **problem.attributes)

    def global_(x: torch.Tensor) -> torch.Tensor:
        return global_attention(**{**rows, name: x}, num_heads=2)

    for op, given in ((banded, inputs), (global_, rows)):
        if name in given:
            with pytest.raises(InputError, match="the lfx ops compute no gradients"):
                torch.func.jvp(op, (given[name],), (torch.ones_like(given[name]),))
            with forward_ad.dual_level(), pytest.raises(InputError, match="the lfx ops compute no gradients"):
                op(forward_ad.make_dual(given[name], torch.ones_like(given[name])))


@pytest.mark.parametrize("name", ["query", "value", "global_context"])
def test_a_compiled_forward_runs_where_gradients_are_enabled_and_its_backward_is_refused(name: str) -> None:
    torch._dynamo.reset()
    problem = problems.banded(Case(1, 9, "first"), 2, 8, window=5)
    inputs, rows = tensors(problem), global_inputs(1, 9, 2)
    for given in (inputs, rows):
        if name in given:
            given[name].requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(inputs: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return banded_attention(**inputs, **problem.attributes).sum() + global_attention(**rows, num_heads=2).sum()

    output = layer(inputs, rows)
    expected = banded_attention(**inputs, **problem.attributes).sum() + global_attention(**rows, num_heads=2).sum()
    torch.testing.assert_close(output, expected)
    with pytest.raises(InputError, match="the lfx ops compute no gradients; train with Hugging Face's attention"):
        output.backward()


def half(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float16."""
    return x.half()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", torch.Tensor.double, "query is float64; convert it to one of float32, float16, bfloat16"),
        ("query", torch.Tensor.int, "query is int32; convert it"),
        ("key", half, "key is float16, and query float32; give one dtype"),
        ("value", half, "value is float16, and query float32"),
        ("global_context", half, r"global_context is float16 \(2, 5, 16\); give float32 \(2, 5, 16\)"),
        ("key_mask", torch.Tensor.long, r"key_mask is int64 \(2, 9\); give int32 \(2, 9\)"),
        ("global_index", torch.Tensor.long, r"global_index is int64 \(2, 5\); give int32 \(2, 5\)"),
        ("query", lambda x: x[0], r"query has shape \(9, 16\); give \(batch, tokens, heads · head size\)"),
        ("query", lambda x: x[:, :0], r"query has shape \(2, 0, 16\)"),
        ("query", lambda x: x[:, :3], r"key has shape \(2, 9, 16\), and query \(2, 3, 16\); give one shape"),
        ("key", lambda x: x[:, :, :8], r"query \(2, 9, 16\), key \(2, 9, 8\) and value \(2, 9, 16\) do not fit"),
        ("value", lambda x: x[:1], "do not fit"),
        ("key_mask", lambda x: x[:, :8], r"key_mask is int32 \(2, 8\); give int32 \(2, 9\)"),
        ("global_index", lambda x: x[:, :0], r"global_index has shape \(2, 0\); give \(batch, slots\), slots >= 1"),
        ("global_context", lambda x: x[:, :2], r"global_context is float32 \(2, 2, 16\); give float32 \(2, 5, 16\)"),
        ("num_heads", 3, "num_heads is 3; give a divisor of the width 16"),
        ("num_heads", 0, "num_heads is 0; give a divisor"),
        ("window", 0, "window is 0; give 1 or more"),
        ("dilation", -1, "dilation is -1; give 1 or more"),
        ("causal", 2, "causal is 2; give 0 or 1"),
    ],
)
def test_what_banded_attention_does_not_take_is_one_clear_error(name: str, change: Any, message: str) -> None:
    problem = problems.banded(Case(2, 9, "scattered"), 2, 8, window=5)
    arguments = {**tensors(problem), **problem.attributes}
    arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(InputError, match=f"banded_attention: .*{message}") as raised:
        banded_attention(**arguments)
    assert "\n" not in str(raised.value)


def test_a_tensor_on_another_device_is_refused() -> None:
    problem = problems.banded(Case(2, 9, "scattered"), 2, 8, window=5)
    for name in ("key_mask", "global_index"):
        arguments = {**tensors(problem), **problem.attributes}
        arguments[name] = arguments[name].to("meta")  # type: ignore[union-attr]
        with pytest.raises(InputError, match=f"{name} is on meta, and query on cpu; move it there"):
            ops._banded(**arguments)


def test_what_global_attention_does_not_take_is_one_clear_error() -> None:
    given = global_inputs(2, 9, 3)
    for changed, message in (
        ({"key": given["key"][:, :5]}, r"query \(2, 3, 16\), key \(2, 5, 16\) and value \(2, 9, 16\) do not fit"),
        ({"key_mask": given["key_mask"].bool()}, r"key_mask is bool \(2, 9\); give int32 \(2, 9\)"),
        ({"num_heads": 5}, "num_heads is 5; give a divisor of the width 16"),
    ):
        with pytest.raises(InputError, match=f"global_attention: {message}"):
            global_attention(**{**given, "num_heads": 2, **changed})
