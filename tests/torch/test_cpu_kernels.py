"""The custom ops on the CPU call the kernels of ONNX Runtime's ops, on views as they are and on torch's threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lfx.errors import InputError
from lfx.parity import Case
from lfx.runtime import custom_ops
from lfx.torch import banded_attention, cpu_kernels, global_attention, kernels, params
from tests.plugins import problems
from tests.plugins.test_custom_ops import context, model, session
from tests.torch.test_ops import error, tensors

CASES = [Case(2, 150, "ragged", "right"), Case(1, 1), Case(2, 33, "all", "left"), Case(3, 65, "scattered", "holes")]


@pytest.fixture
def no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes PyTorch's operators an error."""
    monkeypatch.delattr("lfx.torch.blocks.banded_attention")
    monkeypatch.delattr("lfx.torch.blocks.global_attention")


@pytest.fixture
def uncached() -> Iterator[None]:
    """The library is opened again in the test, and after it."""
    cpu_kernels._installed.cache_clear()
    yield
    cpu_kernels._installed.cache_clear()


def test_every_bit_is_that_of_onnx_runtime(no_formula: None) -> None:
    library = custom_ops.library()
    attributes: tuple[dict[str, int], ...] = ({}, {"dilation": 3}, {"causal": 1}, {"dilation": 2, "causal": 1})
    for case, more in zip(CASES, attributes, strict=True):
        banded = problems.banded(case, 2, 16, window=9, **more)
        output = banded_attention(**tensors(banded), **banded.attributes)
        np.testing.assert_array_equal(output.numpy(), context(session(model(banded), library), banded))
        rows = problems.global_(case, 3, 2, 16)
        output = global_attention(**tensors(rows), **rows.attributes)
        np.testing.assert_array_equal(output.numpy(), context(session(model(rows), library), rows))


def test_views_of_one_projection_are_read_where_they_are(no_formula: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, 16, window=5)
    inputs = tensors(problem)
    expected = banded_attention(**inputs, **problem.attributes)
    names = ("query", "key", "value")
    thirds = torch.cat([inputs[name] for name in names], dim=2).chunk(3, dim=2)
    addresses: list[dict[str, int]] = []

    def make_params(struct: Any, given: dict[str, torch.Tensor], *rest: Any, **fields: Any) -> ctypes.Structure:
        addresses.append({name: tensor.data_ptr() for name, tensor in given.items()})
        return params.make_params(struct, given, *rest, **fields)

    monkeypatch.setattr(kernels, "make_params", make_params)
    packed = {**inputs, **dict(zip(names, thirds, strict=True))}
    assert torch.equal(banded_attention(**packed, **problem.attributes), expected)
    assert [addresses[0][name] for name in names] == [part.data_ptr() for part in thirds]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # columns
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],  # a gap between the batch elements
        lambda x: torch.cat([x, x], dim=0).view(2, *x.shape)[0],
        lambda x: torch.stack([x, x], dim=1)[:, 0],
    ],
    ids=["columns", "gap", "half", "every second"],
)
def test_other_views_give_the_same_bits(no_formula: None, change: Any) -> None:
    for case in (Case(2, 20, "scattered"), Case(1, 20), Case(2, 1), Case(1, 1)):
        problem = problems.banded(case, 2, 16, window=5)
        inputs = tensors(problem)
        expected = banded_attention(**inputs, **problem.attributes)
        changed = {name: change(x) if x.dim() == 3 else x for name, x in inputs.items()}
        assert torch.equal(banded_attention(**changed, **problem.attributes), expected)
        rows = problems.global_(case, 3, 2, 16)
        expected = global_attention(**tensors(rows), **rows.attributes)
        changed = {name: change(x) if x.dim() == 3 else x for name, x in tensors(rows).items()}
        assert torch.equal(global_attention(**changed, **rows.attributes), expected)


def test_one_key_for_the_whole_batch_is_copied(no_formula: None) -> None:
    rows = problems.global_(Case(2, 20), 3, 2, 16)
    inputs = tensors(rows)
    for name in ("key", "value"):
        inputs[name] = inputs[name][:1].expand(2, -1, -1)
    output = global_attention(**inputs, **rows.attributes)
    copies = {name: x.contiguous() for name, x in inputs.items()}
    assert torch.equal(output, global_attention(**copies, **rows.attributes))


def test_torch_s_number_of_threads_changes_no_bit(no_formula: None) -> None:
    problem = problems.banded(Case(3, 300, "ragged", "holes"), 2, 16, window=45)
    rows = problems.global_(Case(3, 700, padding="left"), 5, 2, 16)
    outputs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(
                (
                    banded_attention(**tensors(problem), **problem.attributes),
                    global_attention(**tensors(rows), **rows.attributes),
                )
            )
    finally:
        torch.set_num_threads(before)
    for pair in outputs[1:]:
        assert all(torch.equal(output, first) for output, first in zip(pair, outputs[0], strict=True))


def test_the_number_of_threads_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu_kernels.CpuKernels(custom_ops.library())
    counts: list[int] = []
    monkeypatch.setattr(library, "_banded", lambda params, instructions, threads: counts.append(threads))
    monkeypatch.setattr(cpu_kernels, "kernels_for", lambda tensor: library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    problem = problems.banded(Case(1, 9), 2, 16, window=5)
    banded_attention(**tensors(problem), **problem.attributes)
    assert counts == [7]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_the_kernels_do_not_take_runs_in_pytorch(precision: str) -> None:
    size = 12 if precision == "fp32" else 16  # no multiple of 8
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, size, window=5, precision=precision)
    output = banded_attention(**tensors(problem), **problem.attributes)
    assert error(output, problem.dense()) <= problem.tolerance()
    rows = problems.global_(Case(2, 40), 3, 2, size, precision=precision)
    assert error(global_attention(**tensors(rows), **rows.attributes), rows.dense()) <= rows.tolerance()


def test_without_the_library_pytorch_s_operators_run(uncached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_ops, "LIBRARIES", ("libnone.so",))
    assert cpu_kernels.kernels_for(torch.zeros(1)) is None
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, 16, window=5)
    output = banded_attention(**tensors(problem), **problem.attributes)
    assert error(output, problem.dense()) <= problem.tolerance()


def test_the_environment_names_the_instruction_set(uncached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, 16, window=5)
    monkeypatch.setenv("LFX_CPU_INSTRUCTIONS", "mmx")
    with pytest.raises(InputError, match="LFX_CPU_INSTRUCTIONS is 'mmx'; it must be baseline, avx2 or avx512, and"):
        banded_attention(**tensors(problem), **problem.attributes)
    monkeypatch.setenv("LFX_CPU_INSTRUCTIONS", "baseline")
    assert error(banded_attention(**tensors(problem), **problem.attributes), problem.dense()) <= problem.tolerance()
