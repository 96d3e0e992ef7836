"""BandedAttention's kernel for a warpgroup (plugins/banded/warpgroup.cuh), tested as test_kernels tests the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.parity import Case, full_cases
from scripts.bench.launch import Kernels
from tests.marks import fast_where
from tests.plugins import mutants, races, test_kernels
from tests.plugins.problems import Banded, banded
from tests.plugins.races import RaceDetector
from tests.plugins.tensors import LAYOUTS
from tests.plugins.test_kernels import check_layout, one_key_masked, outcome, unchanged
from tests.plugins.test_races import race_library, turns

__all__ = ["race_library", "turns", "unchanged"]  # fixtures

every_precision = pytest.mark.parametrize("precision", fast_where(("fp16", "bf16"), lambda name: name == "fp16"))


@pytest.fixture(autouse=True)
def _on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFX_COMPUTE_CAPABILITY", "90")


def check(problem: Banded, kernels: Kernels) -> None:
    """The kernel's error is at most the tolerance, which is derived from rounding."""
    test_kernels.check(problem, kernels, wide=False)


some_slots_used = functools.partial(test_kernels.some_slots_used, head_size=64, seqlen=300)
growing_scores = functools.partial(test_kernels.growing_scores, head_size=64, seqlen=300)


def problems(precision: str) -> dict[str, Banded]:
    """Problems that reach every part of the kernel."""
    case = Case(2, 130, "ragged", "right")
    return {
        "scattered": banded(Case(2, 150, "scattered", "holes"), 2, 64, 20, precision=precision),
        "right": banded(Case(1, 70, "none", "right"), 1, 64, 20, precision=precision),
        "dilation": banded(case, 2, 48, 20, precision=precision, dilation=3),
        "causal": banded(case, 2, 64, 70, precision=precision, causal=1),
        "slots": some_slots_used([3, 16], 20, precision),
        "tiles of slots": some_slots_used([3, 70, 139], 140, precision),
        "one key masked": one_key_masked(200, precision),
        "growing": growing_scores(60, precision),
    }


@every_precision
def test_the_cases_of_the_parity_suite(emulated: Kernels, precision: str) -> None:
    for case in full_cases(64, None)[::4]:
        check(banded(case, 2, 64, 64, precision=precision), emulated)


@every_precision
@pytest.mark.parametrize("window", (0, 1, 15, 16, 31, 33, 63, 64, 65, 100, 2**31 - 1))
def test_windows_and_lengths_around_the_tiles(emulated: Kernels, precision: str, window: int) -> None:
    for seqlen in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129):
        check(banded(Case(1, seqlen, "first", "holes"), 1, 64, window, precision=precision), emulated)
    check(banded(Case(1, 330), 1, 64, window, precision=precision), emulated)


@every_precision
@pytest.mark.parametrize("head_size", (40, 48, 56, 64))
def test_head_sizes_dilation_and_causal(emulated: Kernels, precision: str, head_size: int) -> None:
    for dilation, causal in ((1, 0), (1, 1), (2, 0), (3, 1)):
        for case in (
            Case(2, 130, "ragged", "right"),
            Case(1, 200, "scattered", "left"),
            Case(2, 64, "none", "empty_row"),
        ):
            attributes = {"dilation": dilation, "causal": causal}
            check(banded(case, 2, head_size, 20, precision=precision, **attributes), emulated)


@every_precision
def test_used_slots_among_unused_ones(emulated: Kernels, precision: str) -> None:
    cases: list[tuple[int, list[int]]] = [(1, []), (80, []), (1, [0]), (80, [0]), (80, [15, 16]), (80, [40])]
    cases += [(20, [2, 15]), (20, [2, 16]), (96, [80]), (80, [64]), (140, [3, 139]), (90, list(range(90)))]
    for slots, used in cases:
        check(some_slots_used(used, slots, precision), emulated)
    for padding in ("none", "left"):
        check(banded(Case(1, 150, "all", padding), 1, 64, 4, precision=precision), emulated)


@every_precision
def test_scores_of_all_sizes_and_masked_keys(emulated: Kernels, precision: str) -> None:
    for key in (0, 63, 64, 100, 127, 200, 329):
        check(one_key_masked(key, precision), emulated)
    for growth in (5, 20, 60, 200, -200):
        check(growing_scores(growth, precision), emulated)
    check(banded(Case(1, 1100, "scattered", "right"), 1, 64, 256, precision=precision), emulated)


@every_precision
def test_masked_keys_are_never_read(emulated: Kernels, precision: str) -> None:
    problem = banded(Case(1, 330, "none", "right"), 1, 64, 20, precision=precision)
    expected = problem.run(emulated.banded, None)
    masked = problem.inputs["key_mask"][0] == 0
    for name in ("key", "value"):
        problem.inputs[name][0, masked] = np.nan
    np.testing.assert_array_equal(problem.run(emulated.banded, None), expected)


@every_precision
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_strides_change_no_bit_and_the_log_sum_exp_is_the_references(
    emulated: Kernels, host_reference: Any, precision: str, layout: str
) -> None:
    for problem in (
        banded(Case(2, 150, "scattered", "holes"), 2, 64, 20, precision=precision),
        banded(Case(2, 130, "ragged", "empty_row"), 3, 40, 20, precision=precision, dilation=2, causal=1),
        growing_scores(60, precision),
    ):
        check_layout(problem, layout, emulated, host_reference)


@every_precision
def test_it_has_no_races(race_library: Path, precision: str) -> None:
    cases: dict[str, races.Problem] = {**problems(precision)}
    outcome = RaceDetector(race_library).check(cases, {name: problem.dense() for name, problem in cases.items()})
    assert (outcome.races, outcome.wrong) == ([], [])
    assert outcome.accesses > 1_000_000


@every_precision
def test_the_order_of_blocks_and_warps_does_not_change_a_bit(
    emulated: Kernels, turns: Callable[[int], None], precision: str
) -> None:
    cases = problems(precision)
    turns(0)
    expected = {name: problem.run(emulated.banded, None) for name, problem in cases.items()}
    for seed in (1, 2, 3):
        turns(seed)
        for name, problem in cases.items():
            np.testing.assert_array_equal(problem.run(emulated.banded, None), expected[name], err_msg=f"{name}, {seed}")


# Mutation -> text in warpgroup.cuh, replacement.
MUTATIONS = {
    "copies that are not published": ("publishCopies();", ""),
    "products that read before the copies arrive": ("waitForCopies<0>();", ""),
    "a column masked too many": ("columnLessRow(n, i) >= first", "columnLessRow(n, i) > first"),
    "a column masked too few": ("columnLessRow(n, i) <= last", "columnLessRow(n, i) <= last + 1"),
    "masked keys": ("if ((local[0] & local[1]) != UINT32_MAX)", "if (false)"),
    "a bit of another key": ("keys[1] >> column}", "keys[1] >> (column ^ 2)}"),
    "the next columns of the keys twice": ("right(step * 16)", "right(16)"),
    "the next values twice": ("down(step * 16)", "down(0)"),
    "slots that are not copied": ("Traits::kFEW_KEYS : Traits::kKEYS;", "Traits::kFEW_KEYS : tiles.slotsFrom(tile);"),
    "values with the stride of the keys": ("params.valueStride))", "params.keyStride))"),
    "the band of the next tile": ("source.key += static_cast<int64_t>(keyStep) * kSTEPS;", ""),
    "a window too wide": ("last = first + lastOffset", "last = first + lastOffset + 1"),
}


@pytest.fixture(scope="module")
def with_results() -> list[tuple[Banded, bool, np.ndarray]]:
    """Problems with their results by the dense definition, as test_kernels has them: not for wide blocks."""
    cases = [*problems("fp16").values(), banded(Case(2, 150, "scattered", "holes"), 2, 64, 20, precision="fp16")]
    cases[-1].layout = "gaps"
    return [(problem, False, problem.dense()) for problem in cases]


def test_the_kernel_before_the_mutations_is_right(unchanged: Path, with_results: Any) -> None:
    assert outcome(unchanged / "libunchanged.so", with_results) == "right"


@pytest.mark.parametrize("name", fast_where(MUTATIONS, lambda name: name == "a window too wide"))
def test_the_suite_finds_a_broken_kernel(name: str, unchanged: Path, with_results: Any, tmp_path: Path) -> None:
    changed = mutants.mutant(tmp_path, unchanged, "banded/warpgroup.cuh", *MUTATIONS[name])
    assert outcome(changed, with_results) in ("wrong", "stopped")
