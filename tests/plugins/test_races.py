"""The kernels have no data races, and need each of their barriers and waits.

The kernels' own source runs on the emulated machine with a race detector (race_detector.h). Then each barrier, wait and
commit that the source has is left out, one at a time: the detector, a wrong result or the emulator must show it, or the
statement is redundant and is to be deleted.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lfx.parity import Case
from scripts.bench.launch import Kernels
from tests.marks import fast_where
from tests.plugins import races
from tests.plugins.build import ROOT, built_once, emulated_library
from tests.plugins.problems import Banded, Global, banded, global_
from tests.plugins.races import Outcome, RaceDetector, Statement, functions, in_a_fork

# BandedAttention's kernels: the precision, and the multiprocessors, which decide whether blocks have 128 queries or 64.
KERNELS = [(p, n) for p in ("fp32", "fp16", "bf16") for n in ("1000000", *(["0"] if p != "fp32" else []))]
# The kernels for bfloat16 are the templates of those for float16.
every_kernel = pytest.mark.parametrize(
    ("precision", "multiprocessors"), fast_where(KERNELS, lambda kernel: kernel[0] != "bf16")
)


def problems(precision: str) -> dict[str, Banded | Global]:
    """The cases that reach every barrier, and dilation, causal, and more global tokens than a tile holds."""
    result = races.cases(precision)
    case = Case(2, 130, "ragged", "right")
    result["dilation"] = banded(case, 2, 32, 20, precision=precision, dilation=3)
    result["causal"] = banded(case, 2, 64, 70, precision=precision, causal=1)
    result["all global"] = banded(Case(1, 100, "all", "left"), 1, 16, 4, precision=precision)
    many = banded(Case(1, 200, "none", "right"), 1, 16, 4, precision=precision)
    many.inputs["global_index"] = np.arange(0, 200, 2, dtype=np.int32)[None]
    rows = np.random.default_rng(0).standard_normal((1, 100, 16))
    many.inputs["global_context"] = rows.astype(many.inputs["query"].dtype)
    result["many global"] = many
    result["wide head"] = global_(Case(1, 40, "none", "holes"), 5, 1, 768, precision=precision)
    gaps = banded(case, 1, 32, 20, precision=precision), global_(case, 3, 2, 32, precision=precision)
    result |= {f"gaps in {name}": replace(p, layout="gaps") for name, p in zip(("band", "rows"), gaps, strict=True)}
    return result


@pytest.fixture(scope="module")
def race_library() -> Path:
    """The kernels with the race detector."""
    return built_once("races", races.race_library) / "liblfx_races.so"


@every_kernel
def test_the_kernels_have_no_races(
    race_library: Path, precision: str, multiprocessors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFX_MULTIPROCESSORS", multiprocessors)
    cases = problems(precision)
    outcome = RaceDetector(race_library).check(cases, {name: problem.dense() for name, problem in cases.items()})
    assert outcome.races == []
    assert outcome.wrong == []
    assert outcome.accesses > 1_000_000


STATEMENTS = races.statements()


@pytest.fixture(scope="module")
def without(race_library: Path) -> dict[Statement, Outcome]:
    """What the cases have shown without each statement."""
    command = [sys.executable, "-m", "tests.plugins.races", str(race_library)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # it forks
    env["LFX_MULTIPROCESSORS"] = "1000000"  # ptx/test_barriers.py has the blocks of 128 queries too
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    outcomes = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
    return dict(zip(STATEMENTS, outcomes, strict=True))


def test_every_kind_of_statement_is_found_in_the_source() -> None:
    kinds = {statement.text for statement in STATEMENTS}
    assert kinds >= {"__syncthreads", "__syncthreads_or", "__syncwarp", "waitForCopies<0>", "commitCopies"}
    files = {statement.file for statement in STATEMENTS}
    assert {"banded/tensor_cores.cuh", "banded/fp32.cuh", "global/tensor_cores.cuh", "global/combine.cuh"} <= files


@pytest.mark.parametrize("statement", STATEMENTS, ids=str)
def test_a_kernel_without_one_barrier_or_wait_is_found(statement: Statement, without: dict[Statement, Outcome]) -> None:
    assert without[statement].found, f"{statement} is redundant: delete it"


def test_a_race_is_described_by_kernel_and_lines(without: dict[Statement, Outcome]) -> None:
    statement = next(s for s in STATEMENTS if s.file == "global/combine.cuh")
    first = without[statement].races[0]
    assert first.startswith("write after read at shared + 128 in lfx::global::combineParts<lfx::Half>, block 0: ")
    assert first.count("global/combine.cuh:") == 2


READ, WRITE = "read after write", "write after read"
IN_FLIGHT = "access to the destination of a copy in flight"
# A kernel of race_examples.cu -> what the detector says of it. Threads run in ascending order: of two that exchange
# values, one writes first and the other reads first.
EXAMPLES = {
    "noBarrierBetweenWarps": {READ, WRITE},
    "barrierBetweenWarps": set(),
    "warpBarrierBetweenWarps": {READ},
    "warpBarrierInAWarp": set(),
    "shuffleInAWarp": {READ},
    "readBeforeWrite": {READ, WRITE},
    "sameValueByTwoThreads": {"write after write"},
    "atomicsByTwoThreads": set(),
    "atomicAndPlain": {WRITE},
    "copyWithoutWait": {IN_FLIGHT},
    "copyThatTheThreadItselfReads": set(),
    "copyThatAnotherThreadReads": {READ, WRITE},
    "copyOfThePendingGroup": {IN_FLIGHT},
    "writeByAllBlocks": {"write after write"},
    "writeByEachBlock": set(),
    "lastBlockReads": set(),
    "lastBlockReadsWithoutRelease": {READ},
    "lastBlockReadsWithoutAcquire": {READ},
    "readerWrites": set(),
    "readerWritesWithoutBarrier": {WRITE},
    "lastBlockWrites": set(),
    "lastBlockWritesUncounted": {WRITE},
    "atomicAfterRead": {WRITE},
}


@pytest.fixture(scope="module")
def examples() -> ctypes.CDLL:
    """race_examples.cu."""
    return functions(built_once("race_examples", races.example_library) / "liblfx_race_examples.so")


@pytest.mark.parametrize("name", EXAMPLES)
def test_races_of_small_kernels_are_found_and_order_is_understood(name: str, examples: ctypes.CDLL) -> None:
    memory = np.zeros(1024, np.int32)
    examples.lfxRaceReset()
    examples.lfxRaceWatch(b"memory", memory.ctypes.data, memory.nbytes)
    assert examples.lfxRaceExample(name.encode(), memory.ctypes.data_as(ctypes.c_void_p)) == 0
    reports = examples.lfxRaceReports().decode().splitlines()
    assert {line.split("|")[0] for line in reports} == EXAMPLES[name]


def test_a_process_that_is_stopped_leaves_its_message() -> None:
    def stops() -> str:
        os.write(2, b"the reason")
        os.kill(os.getpid(), signal.SIGKILL)
        return "unreachable"

    assert in_a_fork(stops) == ("", "the reason")
    assert in_a_fork(lambda: "result") == ("result", "")


@pytest.fixture
def turns() -> Iterator[Callable[[int], None]]:
    """turns(seed): blocks, warps and lanes take turns in a random order; turns(0): in ascending order."""
    library = built_once("emulated", emulated_library) / "liblfx_emulated.so"
    order = ctypes.CDLL(str(library)).lfxEmulatedOrder
    order.argtypes = [ctypes.c_uint64]
    yield order
    order(0)


@every_kernel
def test_the_order_of_blocks_and_warps_does_not_change_a_bit(
    emulated: Kernels,
    turns: Callable[[int], None],
    precision: str,
    multiprocessors: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LFX_MULTIPROCESSORS", multiprocessors)

    def outputs() -> dict[str, np.ndarray]:
        return {
            name: problem.run(emulated.banded, None)
            if isinstance(problem, Banded)
            else problem.run(emulated.global_, emulated.workspace_bytes)
            for name, problem in cases.items()
        }

    cases = problems(precision)
    cases["parts"] = global_(Case(1, 1000, "none", "right"), 2, 1, 16, precision=precision)
    turns(0)
    expected = outputs()
    for seed in (1, 2, 3):
        turns(seed)
        for name, actual in outputs().items():
            np.testing.assert_array_equal(actual, expected[name], err_msg=f"{name}, seed {seed}")


def test_a_race_changes_results_in_a_random_order(race_library: Path) -> None:
    """The test above would see a kernel that lacks a barrier: some order of the warps shows it."""
    problem = races.cases("fp32")["global fp32 140 tokens, head size 32"]
    detector = RaceDetector(race_library)
    statement = next(s for s in reversed(STATEMENTS) if s.file == "global/fp32.cuh")

    def results() -> str:
        detector.library.lfxRaceRemove(statement.file.encode(), statement.line)
        found = []
        for seed in range(4):
            detector.library.lfxEmulatedOrder(ctypes.c_uint64(seed))
            found.append(problem.run(detector.kernels.global_, detector.kernels.workspace_bytes).tobytes())
        return json.dumps([len(set(found))])

    output, _ = in_a_fork(results)
    assert json.loads(output)[0] > 1
