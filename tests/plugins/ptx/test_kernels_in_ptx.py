"""The kernels' PTX, run by the interpreter through their own launch code, computes what the dense definition says.

These are the tests of tests/plugins/test_kernels.py with the PTX that nvcc emits in the place of the emulated device:
in this folder the fixture `emulated` is the interpreter. So the inline assembly of plugins/device.cuh is executed too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lfx.parity import Case
from tests.marks import first_of_each
from tests.plugins.problems import banded, global_
from tests.plugins.ptx.build import COMPUTE_CAPABILITIES
from tests.plugins.ptx.conftest import KernelFolder
from tests.plugins.ptx.interpreter import InterpretedKernels
from tests.plugins.test_kernels import (
    KERNELS,
    check,
    check_global,
    growing_scores,
    one_key_masked,
    several_tiles_in_a_part,
    some_slots_used,
    test_a_long_sequence_with_the_window_of_the_base_model,
    test_banded_attention_over_the_cases_of_the_parity_suite,
    test_dilation_and_causal,
    test_global_attention_over_the_cases_of_the_parity_suite,
    test_head_sizes,
    test_keys_and_values_may_be_one_tensor,
    test_keys_in_many_parts_join_to_one_row,
    test_large_scores_do_not_overflow,
    test_masked_keys_are_never_read,
    test_masked_keys_of_global_attention_are_never_read,
    test_more_global_tokens_than_a_tile_holds,
    test_one_masked_key_in_a_tile_of_visible_keys,
    test_row_strides_change_no_bit_and_the_log_sum_exp_is_the_references,
    test_row_strides_of_global_attention,
    test_scores_that_grow_or_fall_along_a_row,
    test_used_slots_among_unused_ones,
    test_wide_heads_and_many_queries,
    test_windows_and_lengths_around_the_tiles,
)

__all__ = [
    "test_a_long_sequence_with_the_window_of_the_base_model",
    "test_banded_attention_over_the_cases_of_the_parity_suite",
    "test_dilation_and_causal",
    "test_global_attention_over_the_cases_of_the_parity_suite",
    "test_head_sizes",
    "test_keys_and_values_may_be_one_tensor",
    "test_keys_in_many_parts_join_to_one_row",
    "test_large_scores_do_not_overflow",
    "test_masked_keys_are_never_read",
    "test_masked_keys_of_global_attention_are_never_read",
    "test_more_global_tokens_than_a_tile_holds",
    "test_one_masked_key_in_a_tile_of_visible_keys",
    "test_row_strides_change_no_bit_and_the_log_sum_exp_is_the_references",
    "test_row_strides_of_global_attention",
    "test_scores_that_grow_or_fall_along_a_row",
    "test_used_slots_among_unused_ones",
    "test_wide_heads_and_many_queries",
    "test_windows_and_lengths_around_the_tiles",
]


def test_accumulators_are_rescaled_across_the_tiles_of_a_part(emulated: InterpretedKernels) -> None:
    for problem in several_tiles_in_a_part("fp16"):
        check_global(problem, emulated)
    check_global(global_(Case(1, 70), 1, 270, 8), emulated)  # in float32 one that is smaller, since it takes longer


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "wide"), KERNELS)
def test_ptx_for_newer_gpus(interpreted: Callable[[int], InterpretedKernels], precision: str, wide: bool) -> None:
    """The cases above in small, since another compiler emits this PTX."""
    kernels = interpreted(COMPUTE_CAPABILITIES[1])
    check(banded(Case(1, 150, "scattered", "holes"), 2, 64, 20, precision=precision), kernels, wide)
    check(banded(Case(2, 130, "ragged", "right"), 2, 32, 20, precision=precision, dilation=2, causal=1), kernels, wide)
    check(banded(Case(1, 150, "all", "left"), 1, 16, 4, precision=precision), kernels, wide)
    check(banded(Case(1, 200), 1, 128, 100, precision=precision), kernels, wide)
    check(one_key_masked(200, precision), kernels, wide)
    check(some_slots_used([64], 80, precision), kernels, wide)
    check(growing_scores(60, precision), kernels, wide)
    if not wide:
        check_global(global_(Case(2, 100, "none", "left"), 12, 1, 768, precision=precision), kernels)
        check_global(global_(Case(1, 700, "none", "right"), 17, 2, 64, precision=precision), kernels)


@pytest.mark.parametrize("compute_capability", first_of_each(COMPUTE_CAPABILITIES))
def test_every_opcode_of_the_kernels_has_a_test(kernel_folder: KernelFolder, compute_capability: int) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    tested = set(re.findall(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+|bra|ret", tests))
    opcode = re.compile(r"^\s*(?:\{\s*)?(?:@!?%p\d+\s+)?([a-z][\w.]*)", re.MULTILINE)
    paths = kernel_folder(compute_capability).glob("*.ptx")
    used = {match for path in paths for match in opcode.findall(path.read_text(encoding="utf-8"))}
    assert len(used) > 60
    assert used - tested == set()
