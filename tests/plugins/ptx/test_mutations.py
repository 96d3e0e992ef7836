"""Mutations of the kernels' source: compiled to PTX, each must be refused by the interpreter, or give a wrong result.

The emulated device of test_kernels.py finds none of those in device.cuh, since it replaces that file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lfx.parity import Case
from tests.marks import first_of_each
from tests.plugins.build import PLUGINS
from tests.plugins.problems import Banded, Global, banded, global_
from tests.plugins.ptx.build import COMPUTE_CAPABILITIES, ptx
from tests.plugins.ptx.conftest import KernelFolder
from tests.plugins.ptx.interpreter import InterpretedKernels, PtxError
from tests.plugins.test_kernels import check, check_global


class Target(NamedTuple):
    """A kernel to compile alone, which takes less time than its file, and a problem that launches it."""

    includes: str
    kernel: str
    problem: Callable[[], Banded | Global]
    wide: bool = False  # blocks of 128 queries


def banded_problem(head_size: int, precision: str) -> Banded:
    return banded(Case(1, 150, "scattered", "holes"), 1, head_size, 20, precision=precision)


TENSOR_CORES = "banded/tensor_cores.cuh"
BANDED_FP16 = Target(
    TENSOR_CORES,
    "void lfx::banded::bandedAttentionTensorCores<lfx::Half, 64, 2>(lfx::BandedParams)",
    lambda: banded_problem(64, "fp16"),
    wide=True,
)
BANDED_BF16 = Target(
    TENSOR_CORES,
    "void lfx::banded::bandedAttentionTensorCores<lfx::Bf16, 32, 1>(lfx::BandedParams)",
    lambda: banded_problem(32, "bf16"),
)
BANDED_FP32 = Target(
    "banded/fp32.cuh",
    "void lfx::banded::bandedAttentionFp32<32>(lfx::BandedParams)",
    lambda: banded_problem(32, "fp32"),
)
GLOBAL_FP16 = Target(
    "global/tensor_cores.cuh",
    "void lfx::global::globalAttentionTensorCores<lfx::Half, 128>(lfx::GlobalParams)",
    lambda: global_(Case(1, 100, "none", "holes"), 3, 2, 64, precision="fp16"),
)

WRONG = "wrong result"
RACE = "race: no barrier separates"
IN_FLIGHT = "before the copy to it has been waited for"
HALF_PRODUCT = "f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"


class Mutation(NamedTuple):
    """A change of one place in a file of plugins/, and how the interpreter finds it."""

    file: str
    before: str
    after: str
    target: Target
    reason: str


MUTATIONS = {
    "two matrices of ldmatrix exchanged": Mutation(
        "device.cuh", "x4.shared.b16 {%0,%1,%2,%3}", "x4.shared.b16 {%0,%2,%1,%3}", BANDED_FP16, WRONG
    ),
    "values not transposed": Mutation("device.cuh", "x4.trans.shared", "x4.shared", BANDED_BF16, WRONG),
    "fragments of a exchanged": Mutation(
        "device.cuh", HALF_PRODUCT, HALF_PRODUCT.replace("%4,%5,%6,%7", "%4,%6,%5,%7"), BANDED_FP16, WRONG
    ),
    "fragments of b exchanged": Mutation(
        "device.cuh",
        "bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}",
        "bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}",
        BANDED_BF16,
        WRONG,
    ),
    "an accumulator of another row": Mutation(
        "device.cuh", HALF_PRODUCT, HALF_PRODUCT.replace("{%0,%1,%2,%3};", "{%0,%1,%0,%3};"), BANDED_FP16, WRONG
    ),
    "a product of the other type": Mutation(
        "device.cuh", HALF_PRODUCT, HALF_PRODUCT.replace("f16.f16", "bf16.bf16"), BANDED_FP16, WRONG
    ),
    "a wait that leaves a group pending": Mutation(
        "device.cuh", '"n"(kPENDING)', '"n"(kPENDING + 1)', BANDED_FP16, IN_FLIGHT
    ),
    "a commit left out": Mutation(
        "device.cuh", 'asm volatile("cp.async.commit_group;" ::: "memory");', "", GLOBAL_FP16, IN_FLIGHT
    ),
    "half of a chunk copied": Mutation("device.cuh", "valid ? 16 : 0", "valid ? 8 : 0", BANDED_FP16, WRONG),
    "rows past the end copied": Mutation(
        "device.cuh", "valid ? 16 : 0", "16", BANDED_FP16, "access outside the buffers"
    ),
    "a predicate inverted": Mutation("device.cuh", "valid ? 16 : 0", "valid ? 0 : 16", BANDED_FP32, WRONG),
    "a copy from the generic address of its target": Mutation(
        "device.cuh",
        '::"r"(sharedAddress(shared)), "l"(global)',
        '::"r"(sharedAddress(shared)), "l"(shared)',
        BANDED_FP16,
        "access outside the buffers",
    ),
    "the result of ex2 as its source": Mutation(
        "device.cuh", "ex2.approx.ftz.f32 %0, %1;", "ex2.approx.ftz.f32 %0, %0;", BANDED_FP16, "undefined register"
    ),
    "halves of a pair exchanged": Mutation(
        "device.cuh", "__floats2half2_rn(low, high)", "__floats2half2_rn(high, low)", BANDED_FP16, WRONG
    ),
    "addresses that no row begins at": Mutation(
        "device.cuh",
        "__cvta_generic_to_shared(pointer)",
        "__cvta_generic_to_shared(pointer) + 8",
        BANDED_FP16,
        "unaligned|multiple",
    ),
    "a wrong byte in a swizzle": Mutation(
        "banded/tensor_core_tiles.cuh", "row & 7 :", "row & 8 :", BANDED_FP16, f"{RACE}|{IN_FLIGHT}|{WRONG}"
    ),
    "a swizzle of copies only": Mutation(
        "banded/tensor_core_tiles.cuh",
        "target(swizzled<kD>(row, column / kCHUNK))",
        "target(row * kD + column)",
        BANDED_BF16,
        WRONG,
    ),
    "a fragment of the wrong column": Mutation(
        TENSOR_CORES, "lane / 16 * 8, lane / 8 % 2);", "lane / 16 * 8, lane / 16);", BANDED_FP16, WRONG
    ),
    "rows of a padding that ldmatrix cannot read": Mutation(
        "global/tensor_cores.cuh",
        "return widthOf(headSize) + 8;",
        "return widthOf(headSize) + 4;",
        GLOBAL_FP16,
        "unaligned|multiple",
    ),
    "no barrier before weights are read": Mutation(
        "banded/fp32.cuh", "__syncwarp(); // the 8 threads of a query are in one warp", "", BANDED_FP32, RACE
    ),
    "a table that is not started": Mutation(
        "banded/block.cuh", "*numSlots = 0;", "", BANDED_FP16, "shared memory is read before it is written"
    ),
    "a barrier in one warp only": Mutation(
        "banded/block.cuh",
        "        markPadding();\n        __syncthreads();",
        "        markPadding();\n        if (threadIdx.x < 32) __syncthreads();",
        BANDED_FP32,
        "barrier|" + RACE,
    ),
}


def compile_mutant(mutation: Mutation, folder: Path) -> str:
    mutant = folder / "plugins"
    shutil.copytree(PLUGINS, mutant)
    text = (mutant / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1
    (mutant / mutation.file).write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    source = f'#include "{mutation.target.includes}"\ntemplate __global__ {mutation.target.kernel};\n'
    (mutant / "mutant.cu").write_text(source, encoding="utf-8")
    return ptx(mutant, "mutant.cu", COMPUTE_CAPABILITIES[0])


def finding(problem: Banded | Global, kernels: InterpretedKernels, wide: bool) -> str:
    """Why the interpreter refuses the kernels, or that their result is wrong, or nothing."""
    try:
        if isinstance(problem, Banded):
            check(problem, kernels, wide)
        else:
            check_global(problem, kernels)
    except PtxError as error:
        return str(error)
    except AssertionError:
        return WRONG
    return ""


@pytest.mark.parametrize("name", first_of_each(MUTATIONS, lambda name: MUTATIONS[name].file))
def test_the_interpreter_finds_a_mutation(
    emulated: InterpretedKernels, kernel_folder: KernelFolder, tmp_path: Path, name: str
) -> None:
    mutation = MUTATIONS[name]
    problem = mutation.target.problem()
    assert finding(problem, emulated, mutation.target.wide) == ""
    text = compile_mutant(mutation, tmp_path)
    names = re.findall(r"\.entry (\w+)\(", text)
    assert len(names) == 1
    assert set(names) <= set(emulated.interpreter.kernels())
    try:
        emulated.interpreter.load(text)
        reason = finding(problem, emulated, mutation.target.wide)
    finally:
        for original in kernel_folder(COMPUTE_CAPABILITIES[0]).glob("*.ptx"):
            emulated.interpreter.load(original.read_text(encoding="utf-8"))
    assert re.search(mutation.reason, reason), reason
