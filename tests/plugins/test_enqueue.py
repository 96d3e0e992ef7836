"""The plugin as TensorRT runs it, from creator to enqueue, over the kernels on the emulated machine."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.parity import Case
from scripts.bench.launch import Kernels
from tests.plugins.build import EMULATED, compiler
from tests.plugins.problems import DTYPES, Banded, Global, banded, enqueue_through_creator, global_
from tests.plugins.tensors import Guarded

pytestmark = pytest.mark.trt


@pytest.fixture(scope="session")
def helper(includes: list[str], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """enqueue.cpp."""
    path = tmp_path_factory.mktemp("enqueue") / "libenqueue.so"
    source = EMULATED / "enqueue.cpp"
    command = [compiler(), "-std=c++17", "-shared", "-fPIC", *includes, "-o", str(path), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


def run(helper: ctypes.CDLL, library: Path, problem: Banded | Global, workspace_bytes: int) -> Any:
    """Returns the step that failed, or 0, and the context."""
    guarded = {name: Guarded(array) for name, array in problem.inputs.items()}
    context = Guarded(np.full(problem.inputs["query"].shape, np.nan, DTYPES[problem.precision]))
    scratch = Guarded(np.full(max(workspace_bytes // 4, 1), np.nan, np.float32))
    addresses = {name: memory.address for name, memory in guarded.items()}
    workspace = (scratch.address, workspace_bytes)
    code = enqueue_through_creator(helper, str(library), problem, addresses, context.address, workspace, None)
    return code, context.array.astype(np.float64)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_enqueue_computes_the_dense_definition(helper: ctypes.CDLL, plugin_library: Path, precision: str) -> None:
    workspace = Kernels(plugin_library).workspace_bytes
    for case in (Case(1, 1), Case(2, 150, "scattered", "holes"), Case(3, 40, "ragged", "empty_row")):
        problems: list[Banded | Global] = [
            banded(case, 2, 64, 20, precision=precision),
            banded(case, 1, 32, 5, precision=precision, dilation=2, causal=1),
            global_(case, 3, 2, 64, precision=precision),
            global_(case, 12, 1, 256, precision=precision),
        ]
        for problem in problems:
            batch, rows, width = problem.inputs["query"].shape
            needed = workspace(batch, rows, problem.num_heads, width // problem.num_heads)
            code, context = run(helper, plugin_library, problem, needed if isinstance(problem, Global) else 0)
            assert code == 0
            assert np.abs(context - problem.dense()).max() <= problem.tolerance()


def test_shapes_that_do_not_fit_are_refused_by_name(
    helper: ctypes.CDLL, plugin_library: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    problem = banded(Case(2, 40, "first"), 2, 16, 8)
    problem.inputs["key"] = problem.inputs["key"][:, :30]
    assert run(helper, plugin_library, problem, 0)[0] == 5
    assert (
        "lfx::BandedAttention: the shapes do not fit together: query (2, 40, 32), key (2, 30, 32)"
        in capfd.readouterr().err
    )
    problem = banded(Case(1, 40, "first"), 2, 16, 8)
    problem.num_heads = 3
    assert run(helper, plugin_library, problem, 0)[0] == 5
    assert "query has width 32; it must be a multiple of num_heads 3" in capfd.readouterr().err


def test_a_plugin_with_wrong_attributes_is_not_created(
    helper: ctypes.CDLL, plugin_library: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    problem = banded(Case(1, 40, "first"), 2, 16, 8)
    problem.dilation = 0
    assert run(helper, plugin_library, problem, 0)[0] == 3
    assert "dilation 0 is out of range; it must be 1 or more" in capfd.readouterr().err


def test_a_too_small_workspace_is_detected(helper: ctypes.CDLL, plugin_library: Path) -> None:
    assert run(helper, plugin_library, global_(Case(1, 40), 3, 2, 16), 16)[0] == 6
