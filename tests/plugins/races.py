"""The emulated kernels under the race detector (race_detector.cpp), and without one of their barriers or waits."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lfx.parity import Case
from scripts.bench.launch import GlobalParams, Kernels
from tests.plugins.build import EMULATED, KERNELS, PLUGINS, compiler
from tests.plugins.problems import DTYPES, Banded, Global, banded, global_

Problem = Banded | Global
SYNCHRONIZATION = (
    r"\b(__syncthreads\w*|__syncwarp|__threadfence\w*|waitForCopies<\d+>|commitCopies|publishCopies|beginProducts"
    r"|finishProducts<T>)\("
)


def race_library(folder: Path) -> Path:
    """Compile the kernels for the emulated machine with the race detector.

    GlobalAttention splits its keys as for a GPU of two multiprocessors, so that few blocks visit several tiles each.
    """
    plugins = folder / "plugins"
    shutil.copytree(PLUGINS, plugins)
    split = plugins / "global" / "block.cuh"
    text = split.read_text(encoding="utf-8")
    assert text.count("kTARGET_BLOCKS = 264;") == 1
    split.write_text(text.replace("kTARGET_BLOCKS = 264;", "kTARGET_BLOCKS = 4;"), encoding="utf-8")
    return _build(folder, "lfx_races", plugins, KERNELS)


def example_library(folder: Path) -> Path:
    """Compile race_examples.cu for the emulated machine with the race detector."""
    return _build(folder, "lfx_race_examples", EMULATED, ["race_examples.cu"])


def _build(folder: Path, name: str, source_folder: Path, sources: list[str]) -> Path:
    # The sanitizer instruments the kernels only, and its runtime is not linked: race_detector.cpp takes its place.
    kernel = ["-O1", "-g1", "-fsanitize=thread", "-DLFX_EMULATED", "-DLFX_DETECT_RACES", "-Wno-unknown-pragmas"]
    kernel += [f"-I{source_folder}", f"-I{EMULATED}", f"-I{PLUGINS}", "-x", "c++"]
    flags = {EMULATED / "race_detector.cpp": ["-O2"], **{source_folder / source: kernel for source in sources}}

    def compile_one(source: Path) -> str:
        command = [compiler(), "-std=c++17", "-fPIC", "-Wall", "-Werror", *flags[source], "-c", str(source)]
        target = str(folder / f"{source.name}.o")
        subprocess.run([*command, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, flags))
    library = folder / f"lib{name}.so"
    subprocess.run([compiler(), "-shared", "-o", str(library), *objects], check=True)
    return library


@dataclass(frozen=True)
class Statement:
    """A barrier, a wait, a commit or a fence in the kernels' source."""

    file: str  # within plugins/
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}-{self.text}"


def statements(folder: Path = PLUGINS) -> list[Statement]:
    """Find every barrier, wait, commit and fence of the kernels, one a line."""
    found = []
    for path in sorted(folder.rglob("*.cu*")):
        if path == folder / "device.cuh":  # defines them
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            matches = re.findall(SYNCHRONIZATION, line.split("//")[0])
            assert len(matches) <= 1, f"{path}:{number} has two; they can only be removed together"
            found += [Statement(str(path.relative_to(folder)), number, name) for name in matches]
    return found


@dataclass
class Outcome:
    """What one run of the cases has shown."""

    races: list[str] = field(default_factory=list)  # a description of each pair of instructions
    accesses: int = 0  # that were checked
    wrong: list[str] = field(default_factory=list)  # cases with an error above the tolerance
    stopped: str = ""  # the emulator's message

    @property
    def found(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.races or self.wrong or self.stopped)


@dataclass(frozen=True)
class Banks:
    """An instruction's accesses of shared memory; see bank_conflicts.h."""

    function: str
    lines: str
    bytes: int  # of a lane's access
    phases: int
    passes: int  # as many as phases, if there are no bank conflicts


def functions(path: Path) -> ctypes.CDLL:
    """Load a library with the detector; its functions for tests are described in race_detector.cpp."""
    library = ctypes.CDLL(str(path))
    library.lfxRaceWatch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    library.lfxRaceRemove.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.lfxRaceReports.restype = ctypes.c_char_p
    library.lfxRaceChecks.restype = ctypes.c_int64
    library.lfxBankCounts.restype = ctypes.c_char_p
    return library


class RaceDetector:
    """The library of `race_library`."""

    def __init__(self, path: Path) -> None:
        self.path, self.kernels = path, Kernels(path)
        self.library = functions(path)

    def check(
        self, problems: dict[str, Problem], expected: dict[str, np.ndarray], until_found: bool = False
    ) -> Outcome:
        """Run the problems and compare them with their results by the dense definition.

        Args:
            until_found: whether to end after the first problem that shows anything wrong.
        """
        outcome = Outcome()
        for name, problem in problems.items():
            self.library.lfxRaceReset()
            if isinstance(problem, Banded):
                actual = problem.run(self._watched(self.kernels.banded), None)
            else:
                actual = problem.run(self._watched(self.kernels.global_), self.kernels.workspace_bytes)
            outcome.races += describe(self.path, self.library.lfxRaceReports().decode())
            outcome.accesses += self.library.lfxRaceChecks()
            if not np.abs(actual - expected[name]).max() <= problem.tolerance():
                outcome.wrong.append(name)
            if until_found and outcome.found:
                break
        return outcome

    def without(self, statement: Statement, problems: dict[str, Problem], expected: dict[str, np.ndarray]) -> Outcome:
        """`check` without one statement, in a process of its own, which the emulator may stop."""
        op = "band" if statement.file.startswith("banded/") else "global"
        os.environ["LFX_COMPUTE_CAPABILITY"] = "90" if statement.file == "banded/warpgroup.cuh" else "80"
        reached = {name: problem for name, problem in problems.items() if name.startswith(op)}

        def run() -> str:
            self.library.lfxRaceRemove(statement.file.encode(), statement.line)
            return json.dumps(asdict(self.check(reached, expected, until_found=True)))

        output, message = in_a_fork(run)
        return Outcome(**json.loads(output)) if output else Outcome(stopped=message or "no message")

    def banks(self, problem: Problem) -> list[Banks]:
        """Return the bank conflicts of each instruction that accesses shared memory."""
        self.library.lfxRaceReset()
        self.library.lfxBankCount()
        problem.run(self.kernels.banded, None) if isinstance(problem, Banded) else problem.run(
            self.kernels.global_, self.kernels.workspace_bytes
        )
        result = []
        for line in self.library.lfxBankCounts().decode().splitlines():
            address, *numbers = line.split("|")
            result.append(Banks(*_place(self.path, int(address, 16) - 1), *map(int, numbers)))
        return result

    def _watched(self, function: Callable[..., int]) -> Callable[..., int]:
        """Let the detector check the memory that the kernels write."""

        def call(reference: Any, stream: Any) -> int:
            params = reference._obj
            is_global = isinstance(params, GlobalParams)
            rows = params.batch * (params.queries if is_global else params.seqlen)
            itemsize = list(DTYPES.values())[params.type].itemsize
            width = params.num_heads * params.head_size
            context_bytes = ((rows - 1) * params.context_stride + width) * itemsize
            self.library.lfxRaceWatch(b"context", params.context, context_bytes)
            if params.log_sum_exp is not None:
                sums_bytes = rows * params.num_heads * 4
                self.library.lfxRaceWatch(b"log-sum-exp", params.log_sum_exp, sums_bytes)
            if is_global:
                sizes = (params.batch, params.queries, params.num_heads, params.head_size)
                self.library.lfxRaceWatch(b"workspace", params.workspace, self.kernels.workspace_bytes(*sizes))
            return function(reference, stream)

        return call


def in_a_fork(run: Callable[[], str]) -> tuple[str, str]:
    """Run a function in a copy of this process; returns its result, empty if it was stopped, and its stderr."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            try:
                output.write(run())
                output.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        output.seek(0)
        errors.seek(0)
        return output.read(), errors.read().strip()


def describe(library: Path, reports: str) -> list[str]:
    """Make a sentence of each line of lfxRaceReports(), with kernels, files and lines in the place of addresses."""
    sentences = []
    for report in reports.splitlines():
        what, kernel, memory, offset, block, first, at, second, then = report.split("|")
        name, _ = _place(library, int(kernel, 16))
        # The address of a call is the one after it.
        places = [_place(library, int(address, 16) - 1)[1] for address in (at, then)]
        threads = f"thread {first} at {places[0]}, thread {second} at {places[1]}"
        sentences.append(f"{what} at {memory} + {offset} in {name}, block {block}: {threads}")
    return sentences


@functools.cache
def _place(library: Path, address: int) -> tuple[str, str]:
    """Return the function of an address, and its lines from the innermost inlined call outwards."""
    mapped = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(library)))
    offset = address - int(mapped.split("-")[0], 16)
    command = ["addr2line", "-Cfie", str(library), hex(offset)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    chain = [line.split("plugins/")[-1].split(" ")[0] for line in lines[1::2]]
    return lines[-2].split("(")[0].removeprefix("void "), " < ".join(chain)


def cases(precision: str) -> dict[str, Problem]:
    """Make small problems that reach every barrier and wait of the kernels for one type."""
    problems: dict[str, Problem] = {}
    # Tokens, head size and window. From head size 128 on each tile loads the queries again.
    for seqlen, head_size, window in ((40, 16, 40), (150, 16, 20), (70, 128, 20), (150, 64, 20)):
        case = Case(1, seqlen, "scattered", "holes")
        name = f"band {precision} {seqlen} tokens, head size {head_size}"
        problems[name] = banded(case, 1, head_size, window, precision=precision)
    # Tokens, queries, heads and head size: several parts; several tiles in a part; the tiles for heads above 128.
    for seqlen, queries, heads, head_size in ((200, 3, 1, 32), (140, 17, 2, 32), (70, 17, 2, 136)):
        case = Case(1, seqlen, "none", "right")
        name = f"global {precision} {seqlen} tokens, head size {head_size}"
        problems[name] = global_(case, queries, heads, head_size, precision=precision)
    return problems


def main(library: Path) -> None:
    """Print an outcome, as JSON, for each statement of `statements`, in its order, with that statement left out."""
    problems = cases("fp16") | cases("fp32")
    expected = {name: problem.dense() for name, problem in problems.items()}
    detector = RaceDetector(library)
    for statement in statements():
        print(json.dumps(asdict(detector.without(statement, problems, expected))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
