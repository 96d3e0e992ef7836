"""Shared memory without bank conflicts: the layout of the tiles, and the addresses that the emulated kernels use.

bank_conflicts.h has the rules of the hardware.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from lfx.parity import Case
from tests.marks import first_of_each
from tests.plugins import races
from tests.plugins.build import EMULATED, PLUGINS, built_once, compiler
from tests.plugins.problems import banded, global_
from tests.plugins.races import Problem, RaceDetector

# Functions that may have conflicts, and the passes for each phase: atomic operations on any words; and scores of mma(),
# whose 32 lanes write every other word, which takes two passes in any layout.
ALLOWED = {"lfx::banded::Block::markGlobalTokens": 32.0, "lfx::global::computeScores": 2.0}
PRECISIONS = ("fp16", "bf16", "fp32")


def tiles_library(folder: Path, plugins: Path = PLUGINS) -> Path:
    """Compiles tiles.cu."""
    library = folder / "libtiles.so"
    command = [compiler(), "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DLFX_EMULATED", f"-I{plugins}", f"-I{EMULATED}", "-x", "c++", str(EMULATED / "tiles.cu")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def tiles() -> ctypes.CDLL:
    """tiles.cu."""
    return ctypes.CDLL(str(built_once("tiles", tiles_library) / "libtiles.so"))


@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_the_permutation_of_a_tile_is_a_bijection_without_conflicts(head_size: int, tiles: ctypes.CDLL) -> None:
    check_layout(head_size, tiles)


def check_layout(head_size: int, tiles: ctypes.CDLL) -> None:
    """Check the permutation of a tile by enumeration."""
    chunks = head_size // 8
    offset = np.array([[tiles.lfxSwizzled(head_size, row, chunk) for chunk in range(chunks)] for row in range(64)])
    assert sorted(offset.ravel().tolist()) == list(range(0, 64 * head_size, 8))
    assert (offset // head_size == np.arange(64)[:, None]).all()  # a chunk stays in its row
    banks = offset // 8 % 8  # groups of 4 banks, 16 bytes
    for first in range(0, 64, 8):  # a matrix of ldmatrix: one chunk of 8 neighbouring rows
        for chunk in range(chunks):
            assert len(set(banks[first : first + 8, chunk])) == 8
    for thread in range(0, 128, 8):  # a phase of 16-byte copies: 8 neighbouring threads, chunk after chunk
        threads = np.arange(thread, thread + 8)
        assert len(set(banks[threads // chunks, threads % chunks])) == 8


@pytest.fixture(scope="module")
def race_library() -> Path:
    """The kernels with the race detector."""
    return built_once("races", races.race_library) / "liblfx_races.so"


# Broken layouts: what the line of `permutation` in tensor_core_tiles.cuh is replaced by.
BROKEN = {
    "no permutation": "int32_t const permutation = 0;",
    "four rows instead of eight": "int32_t const permutation = kD >= 64 ? row & 3 : (row >> 1) & 3;",
    "every row instead of every second": "int32_t const permutation = kD >= 64 ? row & 7 : row & 3;",
    "out of the row": "int32_t const permutation = row & 15;",
}


@pytest.mark.parametrize("name", first_of_each(BROKEN))
def test_a_broken_layout_is_found(name: str, tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGINS, plugins)
    file = plugins / "banded" / "tensor_core_tiles.cuh"
    text, count = re.subn(r"int32_t const permutation = .*;", BROKEN[name], file.read_text(encoding="utf-8"))
    assert count == 1
    file.write_text(text, encoding="utf-8")
    tiles = ctypes.CDLL(str(tiles_library(tmp_path, plugins)))
    found = []
    for head_size in (32, 64, 128):
        with contextlib.suppress(AssertionError):
            check_layout(head_size, tiles)
            continue
        found.append(head_size)
    assert found


def conflicts(detector: RaceDetector, problems: Iterable[Problem]) -> list[str]:
    """The instructions with more passes than allowed; there must be some instructions at all."""
    found = []
    for problem in problems:
        counts = detector.banks(problem)
        assert sum(count.phases for count in counts) > 100
        for count in counts:
            allowed = ALLOWED.get(count.function.split("<")[0], 1.0)
            if count.passes > allowed * count.phases:
                found.append(f"{count.passes} passes for {count.phases} phases: {count.function} {count.lines}")
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_banded_attention_has_no_bank_conflicts(precision: str, race_library: Path) -> None:
    case = Case(1, 70, "first", "holes")
    sizes = range(8, 129, 8) if precision != "bf16" else (32, 64, 128)
    problems = [banded(case, 1, head_size, 20, precision=precision) for head_size in sizes]
    assert conflicts(RaceDetector(race_library), problems) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_global_attention_has_no_bank_conflicts(precision: str, race_library: Path) -> None:
    sizes = (*range(8, 137, 16), 256, 512, 768, 1024) if precision == "fp16" else (32, 64, 136, 768)
    problems = [global_(Case(1, 40), 2, 1, head_size, precision=precision) for head_size in sizes]
    assert conflicts(RaceDetector(race_library), problems) == []


@pytest.mark.parametrize(("stride", "passes"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1), (0, 1)])
def test_the_passes_of_a_warp_follow_its_stride(stride: int, passes: int) -> None:
    examples = races.functions(built_once("race_examples", races.example_library) / "liblfx_race_examples.so")
    memory = np.array([stride, 0], np.int32)
    examples.lfxBankCount()
    examples.lfxRaceExample(b"readWithStride", memory.ctypes.data_as(ctypes.c_void_p))
    (line,) = examples.lfxBankCounts().decode().splitlines()
    assert line.split("|")[1:] == ["4", "8", str(8 * passes)]  # 4 blocks of 2 warps
