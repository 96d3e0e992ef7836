"""The kernels' own source, run on an emulated CUDA machine, computes what the dense definition says.

Shared memory and outputs start as NaN, and a page that must not be accessed follows every input and the shared memory:
the tests fail if a kernel reads too early or past the end.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.parity import Case, full_cases
from scripts.bench.launch import Kernels
from tests.marks import fast_where, first_of_each
from tests.plugins import mutants
from tests.plugins.build import ROOT, built_once
from tests.plugins.problems import Banded, Global, banded, global_, rounding_of_sums
from tests.plugins.races import in_a_fork
from tests.plugins.tensors import LAYOUTS

PRECISIONS = ("fp32", "fp16", "bf16")
# BandedAttention's kernels: the precision, and whether blocks have 128 queries or 64.
KERNELS = [("fp32", False), ("fp16", False), ("fp16", True), ("bf16", False), ("bf16", True)]
IDS = ["fp32", "fp16", "fp16w", "bf16", "bf16w"]
every_kernel = pytest.mark.parametrize(("precision", "wide"), KERNELS, ids=IDS)
# The kernels for bfloat16 are the templates of those for float16: the slow part has their sweeps.
SWEPT = fast_where(KERNELS, lambda kernel: kernel[0] != "bf16")
every_swept_kernel = pytest.mark.parametrize(("precision", "wide"), SWEPT, ids=IDS)


def choose_blocks(wide: bool) -> None:
    """Make the emulated GPU so small that wide blocks occupy it, or too large for them."""
    os.environ["LFX_MULTIPROCESSORS"] = "0" if wide else "1000000"


def check(problem: Banded, kernels: Kernels, wide: bool) -> None:
    """The kernel's error is at most the tolerance, which is derived from rounding."""
    choose_blocks(wide)
    error = np.abs(problem.run(kernels.banded, None) - problem.dense()).max()
    assert error <= problem.tolerance()


def check_global(problem: Global, kernels: Kernels) -> None:
    """`check` for GlobalAttention."""
    error = np.abs(problem.run(kernels.global_, kernels.workspace_bytes) - problem.dense()).max()
    assert error <= problem.tolerance()


def one_key_masked(key: int, precision: str) -> Banded:
    """Keys that are visible except one. Their scores are negative, so that a zero-filled key would outweigh them."""
    problem = banded(Case(1, 330), 1, 64, 100, precision=precision)
    problem.inputs["key_mask"][0, key] = 0
    problem.inputs["key"] = np.abs(problem.inputs["key"])
    problem.inputs["query"] = -np.abs(problem.inputs["query"])
    return problem


def some_slots_used(used: list[int], slots: int, precision: str, head_size: int = 16, seqlen: int = 150) -> Banded:
    """Global tokens in given slots; unused slots are -1 or another position outside the sequence."""
    problem = banded(Case(1, seqlen), 1, head_size, 20, precision=precision)
    index = np.where(np.arange(slots) % 2, -1, -150).astype(np.int32)
    index[used] = 7 + 3 * np.arange(len(used))
    problem.inputs["global_index"] = index[None]
    rows = np.random.default_rng(slots).standard_normal((1, slots, head_size))
    problem.inputs["global_context"] = rows.astype(problem.inputs["query"].dtype)
    return problem


def growing_scores(growth: float, precision: str, head_size: int = 16, seqlen: int = 200) -> Banded:
    """Scores that grow by `growth` over the sequence, in powers of 2, so that a row's maximum grows group by group."""
    problem = banded(Case(1, seqlen), 1, head_size, seqlen // 2, precision=precision)
    ramp = np.linspace(0, growth * np.log(2) * head_size**0.5, seqlen)
    for name, values in (("query", np.ones(seqlen)), ("key", ramp)):
        array = problem.inputs[name]
        array[...] = 0
        array[0, :, 0] = values.astype(array.dtype)
    return problem


def several_tiles_in_a_part(precision: str, blocks: int = 270) -> list[Global]:
    """270 blocks, too many to split the keys: each block visits three tiles, of 64 keys or of 32."""
    return [
        global_(Case(1, 140), 2, blocks, 8, precision=precision),
        global_(Case(9, 70), 1, blocks // 9, 136, precision=precision),
    ]


@every_kernel
def test_banded_attention_over_the_cases_of_the_parity_suite(emulated: Kernels, precision: str, wide: bool) -> None:
    for case in full_cases(8, None):
        check(banded(case, 2, 16, 8, precision=precision), emulated, wide)


@every_swept_kernel
@pytest.mark.parametrize(("dilation", "causal"), product((1, 2, 3), (0, 1)))
def test_dilation_and_causal(emulated: Kernels, precision: str, wide: bool, dilation: int, causal: int) -> None:
    for case in (Case(1, 1), Case(2, 130, "ragged", "right"), Case(1, 200, "scattered", "holes"), Case(1, 65, "first")):
        check(banded(case, 2, 32, 20, precision=precision, dilation=dilation, causal=causal), emulated, wide)


@every_swept_kernel
@pytest.mark.parametrize("head_size", (8, 24, 32, 40, 64, 72, 128))
def test_head_sizes(emulated: Kernels, precision: str, wide: bool, head_size: int) -> None:
    for case in (Case(1, 150, "scattered", "left"), Case(2, 64, "none", "empty_row")):
        check(banded(case, 3, head_size, 30, precision=precision), emulated, wide)
        check_global(global_(case, 4, 3, head_size, precision=precision), emulated)


@every_swept_kernel
@pytest.mark.parametrize("window", (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 2**31 - 1))
def test_windows_and_lengths_around_the_tiles(emulated: Kernels, precision: str, wide: bool, window: int) -> None:
    for seqlen in (15, 16, 17, 63, 64, 65, 127, 128, 129):
        check(banded(Case(1, seqlen, "first", "holes"), 1, 16, window, precision=precision), emulated, wide)
    check(banded(Case(1, 330), 1, 16, window, precision=precision), emulated, wide)


@every_kernel
def test_more_global_tokens_than_a_tile_holds(emulated: Kernels, precision: str, wide: bool) -> None:
    for case in (Case(1, 150, "all"), Case(1, 150, "all", "left")):
        problem = banded(case, 1, 16, 4, precision=precision)
        check(problem, emulated, wide)
    # Queries that see 100 global tokens: every second token is one.
    problem = banded(Case(2, 200, "none", "right"), 1, 16, 4, precision=precision)
    problem.inputs["global_index"] = np.tile(np.arange(0, 200, 2, dtype=np.int32), (2, 1))
    rows = np.random.default_rng(0).standard_normal((2, 100, 16))
    problem.inputs["global_context"] = rows.astype(problem.inputs["query"].dtype)
    check(problem, emulated, wide)


@every_swept_kernel
@pytest.mark.parametrize("key", (0, 63, 64, 100, 127, 170, 200, 329))
def test_one_masked_key_in_a_tile_of_visible_keys(emulated: Kernels, precision: str, wide: bool, key: int) -> None:
    check(one_key_masked(key, precision), emulated, wide)


@every_kernel
def test_used_slots_among_unused_ones(emulated: Kernels, precision: str, wide: bool) -> None:
    cases: list[tuple[int, list[int]]] = [(1, []), (80, []), (1, [0]), (80, [0]), (80, [15, 16]), (80, [40])]
    cases += [(20, [2, 15]), (80, [5, 79]), (96, [80])]  # at most 16 slots in the last tile, and 17
    for slots, used in [*cases, (80, [64]), (140, [3, 139])]:
        check(some_slots_used(used, slots, precision), emulated, wide)


@every_kernel
def test_a_long_sequence_with_the_window_of_the_base_model(emulated: Kernels, precision: str, wide: bool) -> None:
    check(banded(Case(1, 1100, "scattered", "right"), 1, 64, 256, precision=precision), emulated, wide)


@every_kernel
def test_large_scores_do_not_overflow(emulated: Kernels, precision: str, wide: bool) -> None:
    problem = banded(Case(1, 100, "first"), 1, 32, 16, precision=precision)
    for name in ("query", "key"):
        problem.inputs[name] = (problem.inputs[name] * 20).astype(problem.inputs[name].dtype)
    check(problem, emulated, wide)


@every_swept_kernel
@pytest.mark.parametrize("growth", (5, 20, 60, 200, -200))
def test_scores_that_grow_or_fall_along_a_row(emulated: Kernels, precision: str, wide: bool, growth: float) -> None:
    check(growing_scores(growth, precision), emulated, wide)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_global_attention_over_the_cases_of_the_parity_suite(emulated: Kernels, precision: str) -> None:
    for case in full_cases(8, None)[::3]:
        check_global(global_(case, 3, 2, 16, precision=precision), emulated)


SIZES = ((1, 1, 136), (12, 1, 768), (17, 1, 256), (5, 1, 1024), (40, 2, 64), (16, 12, 64))


@pytest.mark.parametrize(
    ("precision", "queries", "num_heads", "head_size"),
    fast_where(((precision, *sizes) for precision in PRECISIONS for sizes in SIZES), lambda case: case[0] == "fp16"),
)
def test_wide_heads_and_many_queries(
    emulated: Kernels, precision: str, queries: int, num_heads: int, head_size: int
) -> None:
    for case in (Case(1, 31), Case(2, 100, "none", "left"), Case(1, 33, "none", "holes")):
        check_global(global_(case, queries, num_heads, head_size, precision=precision), emulated)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_keys_in_many_parts_join_to_one_row(emulated: Kernels, precision: str) -> None:
    check_global(global_(Case(1, 3000, "none", "right"), 2, 1, 16, precision=precision), emulated)


@pytest.mark.parametrize("precision", fast_where(PRECISIONS, lambda precision: precision == "fp16"))
def test_accumulators_are_rescaled_across_the_tiles_of_a_part(emulated: Kernels, precision: str) -> None:
    for problem in several_tiles_in_a_part(precision):
        check_global(problem, emulated)


def test_keys_and_values_may_be_one_tensor(emulated: Kernels) -> None:
    problem = global_(Case(2, 100, "none", "right"), 3, 1, 256, precision="fp16")
    problem.inputs["value"] = problem.inputs["key"]
    expected = problem.run(emulated.global_, emulated.workspace_bytes)
    shared = problem.run(emulated.global_, emulated.workspace_bytes, share_values=True)
    np.testing.assert_array_equal(shared, expected)


def test_masked_keys_of_global_attention_are_never_read(emulated: Kernels) -> None:
    for precision, width in ((p, w) for p in PRECISIONS for w in (32, 256)):
        problem = global_(Case(1, 130, "none", "right"), 3, 1, width, precision=precision)
        expected = problem.run(emulated.global_, emulated.workspace_bytes)
        for name in ("key", "value"):
            problem.inputs[name][0, problem.inputs["key_mask"][0] == 0] = np.nan
        np.testing.assert_array_equal(problem.run(emulated.global_, emulated.workspace_bytes), expected)


def test_masked_keys_are_never_read(emulated: Kernels) -> None:
    for precision, wide in KERNELS:
        choose_blocks(wide)
        problem = banded(Case(1, 130, "none", "right"), 1, 32, 20, precision=precision)
        expected = problem.run(emulated.banded, None)
        masked = problem.inputs["key_mask"][0] == 0
        for name in ("key", "value"):
            problem.inputs[name][0, masked] = np.nan
        np.testing.assert_array_equal(problem.run(emulated.banded, None), expected)


def sums_of_the_reference(problem: Banded | Global, host_reference: Any) -> np.ndarray:
    """The log-sum-exp that the host reference computes from the same numbers."""
    inputs = {
        name: array if array.dtype == np.int32 else array.astype(np.float32) for name, array in problem.inputs.items()
    }
    exact = replace(problem, inputs=inputs, precision="fp32")
    if isinstance(exact, Banded):
        sums = exact.outputs(host_reference.lfxBandedAttentionReference)[1]
    else:
        sums = exact.outputs(host_reference.lfxGlobalAttentionReference)[1]
    assert sums is not None
    return sums


def check_layout(problem: Banded | Global, layout: str, kernels: Kernels, host_reference: Any) -> None:
    """In a layout the context has the bits that it has without a gap, and the log-sum-exp is that of the reference."""
    spread = replace(problem, layout=layout)
    if isinstance(problem, Banded) and isinstance(spread, Banded):
        expected, (context, sums) = problem.run(kernels.banded, None), spread.outputs(kernels.banded, None)
        keys = problem.inputs["key"].shape[1] + problem.inputs["global_index"].shape[1]
    else:
        assert isinstance(problem, Global) and isinstance(spread, Global)
        expected = problem.run(kernels.global_, kernels.workspace_bytes)
        context, sums = spread.outputs(kernels.global_, kernels.workspace_bytes)
        keys = problem.inputs["key"].shape[1]
    np.testing.assert_array_equal(context, expected)
    exact = sums_of_the_reference(spread, host_reference)
    assert sums is not None
    np.testing.assert_array_equal(np.isneginf(sums), np.isneginf(exact))
    seen = np.isfinite(exact)
    assert seen.any()
    assert np.abs(sums[seen] - exact[seen]).max() <= rounding_of_sums(problem.inputs, problem.num_heads, keys)


@every_swept_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_strides_change_no_bit_and_the_log_sum_exp_is_the_references(
    emulated: Kernels, host_reference: Any, precision: str, wide: bool, layout: str
) -> None:
    choose_blocks(wide)
    for problem in (
        banded(Case(2, 150, "scattered", "holes"), 2, 64, 20, precision=precision),
        banded(Case(2, 130, "ragged", "empty_row"), 3, 24, 20, precision=precision, dilation=2, causal=1),
        banded(Case(1, 70, "first"), 1, 128, 40, precision=precision),
        growing_scores(60, precision),
    ):
        check_layout(problem, layout, emulated, host_reference)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_strides_of_global_attention(emulated: Kernels, host_reference: Any, precision: str, layout: str) -> None:
    for problem in (
        global_(Case(2, 130, "none", "empty_row"), 3, 2, 64, precision=precision),
        global_(Case(1, 100, "none", "left"), 17, 1, 136, precision=precision),
    ):
        check_layout(problem, layout, emulated, host_reference)
    problem = replace(problem, layout=layout)
    expected = problem.run(emulated.global_, emulated.workspace_bytes, share_values=True)
    problem.inputs["value"] = problem.inputs["key"]
    np.testing.assert_array_equal(problem.run(emulated.global_, emulated.workspace_bytes), expected)


@pytest.mark.parametrize("head_size", [64, 72, 128])
def test_tables_that_do_not_fit_beside_the_tiles_of_wide_blocks(emulated: Kernels, head_size: int) -> None:
    """The tables of a long window; blocks of 64 queries run then. All tokens are padding, so nothing is computed."""
    problem = banded(Case(1, 20_480), 1, head_size, 10_240, precision="fp16")
    problem.inputs["key_mask"][...] = 0
    choose_blocks(wide=True)
    assert not problem.run(emulated.banded, None).any()


def test_a_launch_without_its_workspace_is_refused(emulated: Kernels) -> None:
    def launch(params: Any, stream: Any) -> int:
        params._obj.workspace = None
        return int(emulated.global_(params, stream) != 1)  # cudaErrorInvalidValue

    global_(Case(1, 40), 2, 1, 16).run(launch, emulated.workspace_bytes)


def test_launches_refuse_rows_that_are_not_aligned_or_too_far_apart(emulated: Kernels) -> None:
    for precision in PRECISIONS:
        problem = banded(Case(1, 40), 1, 16, 8, precision=precision, dilation=2)
        for strides in ({"key_stride": 17}, {"context_stride": 8}, {"value_stride": 2**23}):

            def launch(params: Any, stream: Any, changed: dict[str, int] = strides) -> int:
                for name, stride in changed.items():
                    setattr(params._obj, name, stride)
                return int(emulated.banded(params, stream) != 1)  # cudaErrorInvalidValue

            problem.run(launch, None)


def test_the_guard_page_after_an_input_works() -> None:
    code = (
        "import ctypes, numpy as np\n"
        "from tests.plugins.tensors import Guarded\n"
        "held = Guarded(np.zeros(100, np.float32))\n"
        "print(ctypes.c_float.from_address(held.address + 396).value, flush=True)\n"
        "ctypes.c_float.from_address(held.address + 400).value\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "0.0\n"
    assert done.returncode < 0  # stopped by the signal


# Mutation -> file of plugins/, text in it, replacement.
MUTATIONS = {
    "a copy is not waited for": (
        "banded/tensor_cores.cuh",
        "waitForCopies<0>();\n        __syncthreads(); // the tile has arrived",
        "__syncthreads(); //",
    ),
    "a key past the end": ("banded/block.cuh", "key < band.end && mask", "mask"),
    "a window too wide": ("banded/visibility.cuh", "block.window() + (block", "1 + block.window() + (block"),
    "a masked key among visible ones": ("banded/visibility.cuh", "keys == UINT32_MAX && distance", "distance"),
    "a group at the edge taken for one inside": (
        "banded/visibility.cuh",
        "distance >= kWARP_QUERIES - 1",
        "distance >= 0",
    ),
    "a group at the other edge taken for one inside": (
        "banded/visibility.cuh",
        "distance + kKEYS - 1 <= last",
        "distance <= last",
    ),
    "a group too few at an edge": ("banded/visibility.cuh", "distance + kKEYS <= 0", "distance <= 0"),
    "a group too few at the other edge": (
        "banded/visibility.cuh",
        "distance - kWARP_QUERIES >= last",
        "distance >= last",
    ),
    "a group of few slots for more slots than it has": (
        "banded/tensor_cores.cuh",
        "tiles.slotsFrom(tile) <= Traits::kFEW_KEYS",
        "tiles.slotsFrom(tile) <= Traits::kFEW_KEYS + 1",
    ),
    "a group of few slots of which some are unused": (
        "banded/tensor_cores.cuh",
        "kKEYS < visibility.kKEYS || !visibility.isAll()",
        "kKEYS == visibility.kKEYS && !visibility.isAll()",
    ),
    "a tile of the band taken for one of few slots": (
        "banded/tensor_cores.cuh",
        "tiles.isGlobal(tile) && tiles.slotsFrom",
        "tiles.slotsFrom",
    ),
    "the slots of the first tile in the last one": (
        "banded/tensor_cores.cuh",
        "visibleSlots<Traits>(block, tiles.firstSlot(tile)));",
        "visibleSlots<Traits>(block, 0));",
    ),
    "tables that are too small for a wide block": (
        "banded/block.cuh",
        "min(kQUERIES + 2 * window",
        "min(64 + 2 * window",
    ),
    "a row of values that is not advanced": ("banded/tensor_core_tiles.cuh", "+= valueStep;", "+= 0 * valueStep;"),
    "the last used slot left out": ("banded/block.cuh", "atomicMax(numSlots, slot + 1)", "atomicMax(numSlots, slot)"),
    "a group of slots that is not copied": (
        "banded/tensor_core_tiles.cuh",
        "if (row / kWORD_BITS * kWORD_BITS >= slots)",
        "if (row / kWORD_BITS * kWORD_BITS >= slots - 32)",
    ),
    "rowMax without its scale": ("softmax.cuh", "tileMax * scaleLog2", "tileMax"),
    "rowSum not rescaled": (
        "softmax.cuh",
        "previousMax - offset);\n        rowSum *= factor;",
        "previousMax - offset);",
    ),
    "rowSum of BandedAttention not rescaled": ("softmax.cuh", "next;\n        rowSum *= factor;", "next;"),
    "a reference without its scale": ("softmax.cuh", "? -max * scaleLog2 :", "? -max :"),
    "scores that outgrow the type": ("softmax.cuh", "kSLACK = 8.0F", "kSLACK = 100.0F"),
    "rows that are never rescaled": (
        "banded/tensor_cores.cuh",
        "isExceeded) == 0)",
        "isExceeded) == 0 || max[0][0] < 1e9F)",
    ),
    "acc of BandedAttention not rescaled": (
        "banded/tensor_cores.cuh",
        "rows.acc[tile][n][2 * i + 1] *= factor;",
        "(void) factor;",
    ),
    "acc of BandedAttention in float32 not rescaled": (
        "banded/fp32.cuh",
        "element *= factor;",
        "(void) element, (void) factor;",
    ),
    "a fragment of the wrong column": (
        "banded/tensor_cores.cuh",
        "lane / 8 % 2 * 8, lane / 16)",
        "lane / 8 % 2 * 8, lane / 8 % 2)",
    ),
    "a masked key": ("global/tensor_cores.cuh", "mask[key] != 0; }", "mask[key] >= 0; }"),
    "acc of GlobalAttention not rescaled": (
        "global/tensor_cores.cuh",
        "acc[i / 4][i % 4] *= factor[i % 4 / 2];",
        "(void) factor;",
    ),
    "acc of GlobalAttention in float32 not rescaled": ("global/fp32.cuh", "acc[i][c] *= scores.factor(i);", ""),
    "parts not rescaled": ("global/combine.cuh", "acc += weight * (column", "acc += (column"),
    "a part left out": ("global/combine.cuh", "other < Traits::kWARPS; ++other", "other < Traits::kWARPS - 1; ++other"),
    "values with the stride of the keys": (
        "banded/tensor_core_tiles.cuh",
        "valueStep = copy.step(block.params, block.params.valueStride)",
        "valueStep = copy.step(block.params, block.params.keyStride)",
    ),
    "combined rows without their stride": ("global/combine.cuh", "* p.contextStride", "* p.numHeads * p.headSize"),
    "a column not copied": (
        "global/tensor_cores.cuh",
        "threadIdx.x % Traits::kCOPY_THREADS * Traits::kCHUNK",
        "8 + threadIdx.x % Traits::kCOPY_THREADS * Traits::kCHUNK",
    ),
}


def problems_of_mutations() -> Iterator[tuple[Banded | Global, bool]]:
    """Problems that find each mutation, and whether blocks are wide."""
    for case in (Case(2, 150, "scattered", "holes"), Case(1, 70, "none", "right")):
        for wide in (False, True):
            yield banded(case, 2, 64, 20, precision="fp16"), wide
        yield global_(case, 3, 2, 64, precision="fp16"), False
    yield global_(Case(1, 700, "none", "left"), 3, 1, 64, precision="fp16"), False
    for wide in (False, True):
        yield one_key_masked(200, "fp16"), wide
        yield some_slots_used([64], 80, "fp16"), wide
        yield some_slots_used([3, 16], 20, "fp16"), wide
        yield growing_scores(60, "fp16"), wide
    yield banded(Case(1, 70, "first"), 1, 16, 40), False
    for case in (Case(1, 100, "first"), Case(2, 40)):
        yield replace(banded(case, 1, 32, 40, precision="fp16"), layout="gaps"), False
        yield replace(global_(case, 3, 2, 32, precision="fp16"), layout="gaps"), False
    for precision in ("fp16", "fp32"):
        for problem in several_tiles_in_a_part(precision, mutants.TARGET_BLOCKS + 2):
            yield problem, False


@pytest.fixture(scope="module")
def with_results() -> list[tuple[Banded | Global, bool, np.ndarray]]:
    """Those problems with their results by the dense definition."""
    return [(problem, wide, problem.dense()) for problem, wide in problems_of_mutations()]


@pytest.fixture(scope="module")
def unchanged() -> Path:
    """The kernels before each mutation."""
    return built_once("unchanged", mutants.unchanged)


def outcome(library: Path, with_results: list[tuple[Banded | Global, bool, np.ndarray]]) -> str:
    """Run the problems in a process of its own until a result is wrong; returns "right", "wrong" or "stopped"."""
    kernels = Kernels(library)

    def run() -> str:
        faulthandler.disable()  # pytest's, which would print a trace
        for problem, wide, expected in with_results:
            choose_blocks(wide)
            if isinstance(problem, Banded):
                actual = problem.run(kernels.banded, None)
            else:
                actual = problem.run(kernels.global_, kernels.workspace_bytes)
            if not np.abs(actual - expected).max() <= problem.tolerance():
                return "wrong"
        return "right"

    return in_a_fork(run)[0] or "stopped"


def test_the_kernels_before_the_mutations_are_right(unchanged: Path, with_results: Any) -> None:
    assert outcome(unchanged / "libunchanged.so", with_results) == "right"


@pytest.mark.parametrize("name", first_of_each(MUTATIONS, lambda name: MUTATIONS[name][0]))  # of each file
def test_the_suite_finds_a_broken_kernel(name: str, unchanged: Path, with_results: Any, tmp_path: Path) -> None:
    """Mutations of the kernels' source: each must make the checks fail, or they prove nothing."""
    assert outcome(mutants.mutant(tmp_path, unchanged, *MUTATIONS[name]), with_results) in ("wrong", "stopped")
