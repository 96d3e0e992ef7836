"""The CPU kernels, on every instruction set that this CPU has, against the dense definition."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from lfx.parity import Case, full_cases
from scripts.bench.launch import STRIDES, BandedParams, GlobalParams, banded_params
from tests.marks import fast_where
from tests.plugins.build import built_once, cpu_check
from tests.plugins.problems import Banded, Global, banded, global_

SETS = ("baseline", "avx2", "avx512")
WINDOW = 8
CASES = full_cases(WINDOW, None)
Run = Callable[..., Any]


@pytest.fixture(params=SETS)
def run(request: pytest.FixtureRequest, cpu: Any) -> Run:
    """run(problem, threads) -> the context, with one instruction set."""
    number = SETS.index(request.param)
    if not cpu.lfxIsSupported(number):
        pytest.skip(f"this CPU has no {request.param}")

    def compute(problem: Banded | Global, threads: int = 1) -> Any:
        function = cpu.lfxBandedAttentionCpu if isinstance(problem, Banded) else cpu.lfxGlobalAttentionCpu
        return problem.run(lambda params: function(params, number, threads))

    compute.number = number  # type: ignore[attr-defined]
    return compute


def check(run: Run, problem: Banded | Global, threads: int = 1) -> None:
    error = np.abs(run(problem, threads) - problem.dense()).max()
    assert error <= problem.tolerance(), (problem.inputs["query"].shape, problem.attributes)


@pytest.mark.parametrize(("dilation", "causal"), product((1, 2, 3), (0, 1)))
def test_banded_attention_is_the_dense_definition(run: Run, dilation: int, causal: int) -> None:
    for case in CASES:
        check(run, banded(case, 2, 16, WINDOW, dilation=dilation, causal=causal))


@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 2**31 - 1])
def test_windows_and_lengths_around_the_tile_of_64_queries(run: Run, window: int) -> None:
    for seqlen in (1, 15, 16, 17, 63, 64, 65, 129, 200):
        for dilation, causal in ((1, 0), (1, 1), (2, 0)):
            check(run, banded(Case(2, seqlen, "scattered", "holes"), 1, 8, window, dilation=dilation, causal=causal))


@pytest.mark.parametrize("seqlen", fast_where([1, 129, 255, 256, 257, 1134], lambda seqlen: seqlen < 1000))
def test_the_base_window(run: Run, seqlen: int) -> None:
    for globals_, padding in (("none", "none"), ("first", "right"), ("all", "left"), ("ragged", "empty_row")):
        check(run, banded(Case(2, seqlen, globals_, padding), 1, 64, 256), threads=2)


@pytest.mark.parametrize("head_size", range(8, 136, 8))
def test_every_head_size_of_the_band(run: Run, head_size: int) -> None:
    check(run, banded(Case(2, 100, "scattered", "holes"), 3, head_size, 20))


@pytest.mark.parametrize("queries", [1, 5, 17, 65])
def test_global_attention_is_the_dense_definition(run: Run, queries: int) -> None:
    for case in CASES[:: 3 if queries > 1 else 1]:
        check(run, global_(case, queries, 2, 16))


@pytest.mark.parametrize("head_size", [8, 64, 128, 136, 768, 1024])
@pytest.mark.parametrize("seqlen", fast_where([1, 511, 512, 513, 1134], lambda seqlen: seqlen < 512))
def test_parts_of_the_keys_and_heads_of_hidden_width(run: Run, seqlen: int, head_size: int) -> None:
    for queries in (1, 12, 17):
        check(run, global_(Case(2, seqlen, padding="holes"), queries, 1, head_size), threads=2)


def test_results_are_bitwise_equal_for_any_number_of_threads(run: Run) -> None:
    case = Case(3, 700, "ragged", "holes")
    for problem in (banded(case, 3, 24, 50), banded(case, 2, 64, 40, dilation=3), global_(case, 5, 2, 64)):
        expected = run(problem, 1)
        for threads in (2, 3, 7):
            np.testing.assert_array_equal(run(problem, threads), expected)


def test_a_row_does_not_depend_on_the_others_or_on_its_place(run: Run) -> None:
    case = Case(4, 600, "ragged", "holes")
    for problem in (banded(case, 2, 32, 30), global_(case, 5, 2, 64)):
        expected = run(problem)
        given = problem.inputs
        problem.inputs = {name: array[::-1].copy() for name, array in given.items()}
        np.testing.assert_array_equal(run(problem), expected[::-1])
        problem.inputs = {name: array[2:3] for name, array in given.items()}
        np.testing.assert_array_equal(run(problem), expected[2:3])


def test_padding_at_the_end_changes_no_bit(run: Run) -> None:
    short = banded(Case(2, 150, "scattered"), 2, 32, 30)
    expected = run(short)
    for name in ("query", "key", "value", "key_mask"):
        array = short.inputs[name]
        fill = 0 if name == "key_mask" else np.nan
        padding = np.full((2, 77, *array.shape[2:]), fill, array.dtype)
        short.inputs[name] = np.concatenate([array, padding], axis=1)
    np.testing.assert_array_equal(run(short)[:, :150], expected)
    assert not run(short)[:, 150:].any()


def test_masked_keys_and_queries_are_not_read(run: Run) -> None:
    for problem in (
        banded(Case(2, 200, "scattered", "holes"), 2, 16, 20),
        global_(Case(2, 200, "none", "holes"), 3, 2, 16),
    ):
        expected = run(problem)
        masked = problem.inputs["key_mask"] == 0
        if isinstance(problem, Banded):  # global tokens are read whatever the mask
            index = problem.inputs["global_index"]
            for row, positions in enumerate(index):
                masked[row, positions[positions >= 0]] = False
            problem.inputs["query"][masked] = np.nan
        problem.inputs["key"][masked] = problem.inputs["value"][masked] = np.nan
        np.testing.assert_array_equal(run(problem), expected)


@pytest.mark.parametrize(
    ("name", "value"), [("query", np.nan), ("key", np.nan), ("value", np.nan), ("query", np.inf), ("value", np.inf)]
)
def test_a_number_that_is_none_is_not_hidden(run: Run, name: str, value: float) -> None:
    for problem in (banded(Case(1, 90), 1, 16, 200), global_(Case(1, 90), 3, 1, 16)):
        problem.inputs[name][0, 1, 3] = value
        context = run(problem)
        seen = context[0, 1] if name == "query" else context[0, :]
        assert not np.isfinite(seen).all(axis=-1).any()


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_scores_far_from_zero_neither_overflow_nor_vanish(run: Run, scale: float) -> None:
    problem = banded(Case(2, 100, "first", "holes"), 2, 16, 20)
    problem.inputs["query"] *= np.float32(scale)
    check(run, problem)


def test_packed_rows_and_the_log_sum_exp(run: Run, cpu: Any, host_reference: Any) -> None:
    """Query, key and value are thirds of the rows of one tensor, and the context has gaps."""
    problem = banded(Case(2, 130, "scattered", "holes"), 2, 16, 20)
    expected = run(problem)
    packed = np.concatenate([problem.inputs[name] for name in ("query", "key", "value")], axis=2)
    context = np.full((2, 130, 40), np.nan, np.float32)
    addresses = {name: array.ctypes.data for name, array in problem.inputs.items()} | {"context": context.ctypes.data}
    for i, name in enumerate(("query", "key", "value")):
        addresses[name] = packed.ctypes.data + 4 * 32 * i
    sums = {}
    for name in ("kernel", "reference"):
        sums[name] = np.full((2, 2, 130), np.nan, np.float32)
        params = banded_params(problem.inputs, addresses, "fp32", **problem.attributes)
        params.log_sum_exp = sums[name].ctypes.data
        params.query_stride = params.key_stride = params.value_stride = 96
        params.context_stride = 40
        if name == "kernel":
            assert not cpu.lfxBandedAttentionCpu(ctypes.byref(params), run.number, 2)  # type: ignore[attr-defined]
            np.testing.assert_array_equal(context[:, :, :32], expected)
            assert np.isnan(context[:, :, 32:]).all()
        else:
            assert not host_reference.lfxBandedAttentionReference(ctypes.byref(params))
    assert np.isneginf(sums["reference"]).any()
    np.testing.assert_allclose(sums["kernel"], sums["reference"], atol=problem.tolerance(), rtol=0)


def test_the_error_of_exp2_is_at_most_the_bound(run: Run, cpu: Any) -> None:
    exponents = np.concatenate([np.linspace(-126, 1, 2_000_000), np.linspace(-1e-3, 1e-3, 1600)]).astype(np.float32)
    exponents = exponents[: exponents.size // 16 * 16]
    powers = np.empty_like(exponents)
    cpu.lfxExp2Cpu(run.number, exponents.ctypes.data, powers.ctypes.data, powers.size)  # type: ignore[attr-defined]
    exact = np.exp2(exponents.astype(np.float64))
    assert np.abs(powers / exact - 1).max() <= 2.0**-22
    assert np.abs(powers / exact - 1).max() >= 2.0**-25  # the bound is of this order


def test_exp2_of_special_numbers(run: Run, cpu: Any) -> None:
    numbers = np.array([0, -0.0, 1, -1, -126, -126.5, -1e30, -np.inf, np.nan, *[0] * 7], np.float32)
    powers = np.empty_like(numbers)
    cpu.lfxExp2Cpu(run.number, numbers.ctypes.data, powers.ctypes.data, powers.size)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(powers[:9], np.float32([1, 1, 2, 0.5, 2.0**-126, 0, 0, 0, np.nan]))


def test_the_kernels_say_what_they_do_not_compute(cpu: Any) -> None:
    problem = banded(Case(1, 8), 1, 8, 2)
    addresses = {name: array.ctypes.data for name, array in problem.inputs.items()}
    addresses["context"] = problem.inputs["query"].ctypes.data

    def reason(instruction_set: int = 0, **changes: int) -> str:
        params = banded_params(problem.inputs, addresses, "fp32", **problem.attributes)
        for name, value in changes.items():
            setattr(params, name, value)
        return str(cpu.lfxBandedAttentionCpu(ctypes.byref(params), instruction_set, 1).decode())

    assert reason(type=1) == "the CPU kernels compute float32 only"
    assert reason(9) == "this CPU does not have the instruction set"
    assert reason(struct_bytes=8).startswith("the caller was compiled with another version of attention.h")
    assert reason(query=addresses["query"] + 2) == "query, key, value or context is not aligned"


def test_the_sizes_of_the_structs_are_those_of_the_header(cpu: Any) -> None:
    """A caller with a wrong size is refused, so these are right."""
    common = {"batch": 1, "seqlen": 8, "num_heads": 1, "head_size": 8, "scale": 1.0, **dict.fromkeys(STRIDES, 8)}
    banded_call = BandedParams(struct_bytes=ctypes.sizeof(BandedParams), slots=1, window=2, dilation=1, **common)
    global_call = GlobalParams(struct_bytes=ctypes.sizeof(GlobalParams), queries=1, **common)
    for function, params in ((cpu.lfxBandedAttentionCpu, banded_call), (cpu.lfxGlobalAttentionCpu, global_call)):
        assert b"null pointer" in function(ctypes.byref(params), 0, 1)


@pytest.mark.slow
def test_sanitizers_find_nothing_in_random_problems() -> None:
    program = built_once("cpu-check", cpu_check) / "check"
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
