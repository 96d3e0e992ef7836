"""The kernels' PTX, run by the interpreter through their own launch code, computes what the dense definition says.

These are the tests of tests/plugins/test_kernels.py with the PTX that nvcc emits in the place of the emulated device: the
fixture `emulated` of this folder is the interpreter. So the inline assembly of plugins/device.cuh is executed too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lfx.parity import Case
from tests.plugins.problems import global_
from tests.plugins.ptx.interpreter import InterpretedKernels
from tests.plugins.test_kernels import (
    check_global,
    several_tiles_in_a_part,
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
    "test_used_slots_among_unused_ones",
    "test_wide_heads_and_many_queries",
    "test_windows_and_lengths_around_the_tiles",
]


def test_accumulators_are_rescaled_across_the_tiles_of_a_part(emulated: InterpretedKernels) -> None:
    for problem in (*several_tiles_in_a_part("fp16"), *several_tiles_in_a_part("bf16")):
        check_global(problem, emulated)
    check_global(global_(Case(1, 70), 1, 270, 8), emulated)  # float32, smaller, since it takes longer


def test_every_opcode_of_the_kernels_has_a_test(kernels_folder: Path) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    tested = set(re.findall(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+|bra|ret", tests))
    used = set()
    for ptx in kernels_folder.glob("*.ptx"):
        lines = re.findall(r"^\s*(?:\{\s*)?(?:@!?%p\d+\s+)?([a-z][\w.]*)", ptx.read_text(encoding="utf-8"), re.MULTILINE)
        used |= set(lines)
    assert len(used) > 60
    assert used - tested == set()
