"""The host reference, which has the tile and mask arithmetic of the kernels, agrees with the dense definition."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any

import numpy as np
import pytest

from lfx.parity import Case, full_cases
from scripts.bench.launch import INPUTS, STRIDES, BandedParams, GlobalParams
from tests.plugins.problems import banded, global_

WINDOW = 8
CASES = full_cases(WINDOW, None)


@pytest.mark.parametrize(("dilation", "causal"), product((1, 2, 3), (0, 1)))
def test_banded_attention_is_the_dense_definition(host_reference: Any, dilation: int, causal: int) -> None:
    for case in CASES:
        problem = banded(case, 2, 16, WINDOW, dilation=dilation, causal=causal)
        error = np.abs(problem.run(host_reference.lfxBandedAttentionReference) - problem.dense()).max()
        assert error <= problem.tolerance(), case


@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 128, 2**31 - 1])
def test_windows_around_the_tile_of_64_queries(host_reference: Any, window: int) -> None:
    for seqlen in (1, 63, 64, 65, 127, 129, 200):
        for dilation, causal in ((1, 0), (1, 1), (2, 0)):
            problem = banded(Case(2, seqlen, "scattered", "holes"), 1, 8, window, dilation=dilation, causal=causal)
            error = np.abs(problem.run(host_reference.lfxBandedAttentionReference) - problem.dense()).max()
            assert error <= problem.tolerance(), (seqlen, dilation, causal)


@pytest.mark.parametrize("queries", [1, 5, 17])
def test_global_attention_is_the_dense_definition(host_reference: Any, queries: int) -> None:
    for case in CASES:
        problem = global_(case, queries, 2, 16)
        error = np.abs(problem.run(host_reference.lfxGlobalAttentionReference) - problem.dense()).max()
        assert error <= problem.tolerance(), case


def test_an_index_outside_the_sequence_is_an_unused_slot(host_reference: Any) -> None:
    problem = banded(Case(1, 40, "scattered"), 1, 8, 4)
    expected = problem.run(host_reference.lfxBandedAttentionReference)
    unused = np.flatnonzero(problem.inputs["global_index"][0] < 0)
    for outside in (40, 2**31 - 1, -7):
        problem.inputs["global_index"][0, unused] = outside
        np.testing.assert_array_equal(problem.run(host_reference.lfxBandedAttentionReference), expected)


COMMON = {"batch": 1, "seqlen": 8, "num_heads": 1, "head_size": 8, "scale": 1.0, **dict.fromkeys(STRIDES, 8)}
BANDED = {**COMMON, "struct_bytes": ctypes.sizeof(BandedParams), "slots": 1, "window": 2, "dilation": 1}
GLOBAL = {**COMMON, "struct_bytes": ctypes.sizeof(GlobalParams), "queries": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": 0}, "batch must be 1 to 65535"),
        ({"seqlen": 0}, "the sequence length must be 1 to 262144"),
        ({"seqlen": 2**18 + 1}, "the sequence length must be"),
        ({"num_heads": 0}, "num_heads must be 1 to 1024"),
        ({"head_size": 12}, "the head size must be a multiple of 8"),
        ({"head_size": 0}, "the head size must be a multiple of 8"),
        ({"scale": 0.0}, "scale must be a finite number above 0"),
        ({"scale": float("nan")}, "scale must be"),
        ({"type": 3}, "the type must be float32, float16 or bfloat16"),
        ({"struct_bytes": 96}, "the caller was compiled with another version of attention.h"),
        ({"query_stride": 7}, "the stride of a tensor must be num_heads * head size or more"),
        ({"context_stride": 0}, "the stride of a tensor must be num_heads * head size or more"),
        ({"value_stride": 2**31 + 1}, "the stride of a tensor must be num_heads * head size or more, and at most 2^31"),
    ],
)
def test_sizes_out_of_range_are_refused_by_name(host_reference: Any, change: dict[str, Any], reason: str) -> None:
    for params, values in ((BandedParams, BANDED), (GlobalParams, GLOBAL)):
        name = "lfxBandedAttentionReference" if params is BandedParams else "lfxGlobalAttentionReference"
        message = getattr(host_reference, name)(ctypes.byref(params(**{**values, **change})))
        assert message.decode().startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": -1}, "window must be 0 or more"),
        ({"dilation": 0}, "dilation must be 1 or more"),
        ({"causal": 2}, "causal must be 0 or 1"),
        ({"slots": 0}, "the number of global tokens must be"),
        ({"head_size": 136}, "the head size must be at most 128"),
        ({"window": 70000, "seqlen": 2**18}, "64 + 2 * window must be at most 131072 for sequences longer than"),
    ],
)
def test_attributes_out_of_range_are_refused_by_name(host_reference: Any, change: dict[str, Any], reason: str) -> None:
    message = host_reference.lfxBandedAttentionReference(ctypes.byref(BandedParams(**{**BANDED, **change})))
    assert message.decode().startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": None}, "query, key, value or context is a null pointer"),
        ({"context": 1}, "query, key, value or context is not aligned"),
        ({"key_mask": 2}, "key_mask is a null pointer or not aligned"),
        ({"log_sum_exp": 3}, "the log-sum-exp is not aligned"),
        ({"global_index": None}, "global_index is a null pointer or not aligned"),
        ({"global_context": 6}, "global_context is a null pointer or not aligned"),
    ],
)
def test_tensors_without_memory_are_refused_by_name(host_reference: Any, change: dict[str, Any], reason: str) -> None:
    tensors = dict.fromkeys((*INPUTS, "context"), 16)
    params = BandedParams(**{**BANDED, **tensors, **change})
    assert host_reference.lfxBandedAttentionReference(ctypes.byref(params)).decode().startswith(reason)
