"""The custom ops call the CUDA kernels, whose own source runs on an emulated device here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lfx.errors import LfxError
from lfx.parity import Case
from lfx.torch import banded_attention, global_attention, kernels
from tests.conftest import MakeOnce
from tests.plugins import problems
from tests.plugins.build import emulated_library
from tests.torch.test_ops import error, tensors

CASES = [Case(2, 70, "ragged", "right"), Case(1, 1), Case(2, 33, "all", "left"), Case(3, 65, "scattered", "holes")]


@pytest.fixture(scope="module")
def library(made_once: MakeOnce) -> kernels.CudaKernels:
    """The kernels for the emulated device."""
    return kernels.CudaKernels(made_once("emulated", emulated_library) / "liblfx_emulated.so")


@pytest.fixture
def calls(library: kernels.CudaKernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the ops run the kernels on CPU tensors; the results are counted: "kernel" or "not supported"."""
    counted: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            def call(*inputs: Any, **attributes: Any) -> Any:
                context = getattr(library, name)(*inputs, **attributes)
                counted.append("not supported" if context is None else "kernel")
                return context

            return call

    monkeypatch.setattr(kernels, "kernels_for", lambda tensor: Counting())
    return counted


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_ops_on_kernels_are_the_definition(calls: list[str], precision: str) -> None:
    attributes: tuple[dict[str, int], ...] = ({}, {"dilation": 3}, {"causal": 1}, {"dilation": 2, "causal": 1})
    for case, more in zip(CASES, attributes, strict=True):
        banded = problems.banded(case, 2, 16, window=9, precision=precision, **more)
        output = banded_attention(**tensors(banded), **banded.attributes)
        assert output.is_contiguous() and error(output, banded.dense()) <= banded.tolerance(), f"{case} {more}"
        rows = problems.global_(case, 3, 2, 16, precision=precision)
        output = global_attention(**tensors(rows), **rows.attributes)
        assert error(output, rows.dense()) <= rows.tolerance(), str(case)
    assert set(calls) == {"kernel"}


def test_thirds_of_one_projection_and_a_scale_reach_the_kernel(
    calls: list[str], library: kernels.CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, given = library._banded, []
    monkeypatch.setattr(library, "_banded", lambda params, stream: given.append(params._obj) or launch(params, stream))
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, 16, window=5)
    inputs = tensors(problem)
    packed = torch.cat([2 * inputs["query"], inputs["key"], inputs["value"]], dim=2)
    parts = dict(zip(("query", "key", "value"), packed.chunk(3, dim=2), strict=True))
    output = banded_attention(**{**inputs, **parts}, **problem.attributes, scale=16**-0.5 / 2)
    assert error(output, problem.dense()) <= problem.tolerance()
    assert calls == ["kernel"]
    addresses = [given[0].query, given[0].key, given[0].value]
    assert addresses == [part.data_ptr() for part in parts.values()]  # they are not copied


def test_rows_that_are_not_aligned_are_copied(calls: list[str]) -> None:
    def moved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("query", "key", "value")
        views = {name: torch.cat([inputs[name][..., :1], inputs[name]], dim=2)[..., 1:] for name in names}
        assert all(view.data_ptr() % 16 == 2 and view.stride(1) % 8 == 1 for view in views.values())
        return {**inputs, **views}

    problem = problems.banded(Case(2, 20, "scattered"), 2, 16, window=5, precision="fp16")
    inputs = tensors(problem)
    expected = banded_attention(**inputs, **problem.attributes)
    assert torch.equal(banded_attention(**moved(inputs), **problem.attributes), expected)
    rows = problems.global_(Case(2, 20), 3, 2, 16, precision="fp16")
    expected = global_attention(**tensors(rows), **rows.attributes)
    assert torch.equal(global_attention(**moved(tensors(rows)), **rows.attributes), expected)
    assert calls == ["kernel"] * 4


def test_sizes_that_the_kernels_do_not_support_run_in_pytorch(calls: list[str]) -> None:
    problem = problems.banded(Case(2, 40, "scattered", "right"), 2, 12, window=5)  # no multiple of 8
    output = banded_attention(**tensors(problem), **problem.attributes)
    assert error(output, problem.dense()) <= problem.tolerance()
    rows = problems.global_(Case(2, 40), 3, 2, 12)
    assert error(global_attention(**tensors(rows), **rows.attributes), rows.dense()) <= rows.tolerance()
    assert calls == ["not supported", "not supported"]


def test_a_kernel_that_fails_is_an_error(library: kernels.CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_for", lambda tensor: library)
    monkeypatch.setattr(library, "_banded", lambda params, stream: 700)
    problem = problems.banded(Case(1, 9), 2, 16, window=5)
    with pytest.raises(LfxError, match="an lfx kernel failed: CUDA error 700"):
        banded_attention(**tensors(problem), **problem.attributes)


def test_tensors_on_the_cpu_have_no_cuda_kernels() -> None:
    assert kernels.kernels_for(torch.zeros(1)) is None
