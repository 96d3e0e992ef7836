"""The interpreter, and the kernels that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MakeOnce
from tests.plugins.ptx.build import interpreter_objects, launch_code, link, nvcc
from tests.plugins.ptx.interpreter import InterpretedKernels, Interpreter


@pytest.fixture(scope="session")
def interpreter_folder(made_once: MakeOnce) -> Path:
    """The interpreter's object files."""
    return made_once("ptx-interpreter", interpreter_objects)


@pytest.fixture(scope="session")
def interpreter(interpreter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """The interpreter alone; it needs no CUDA compiler."""
    objects = sorted(interpreter_folder.glob("*.o"))
    return Interpreter(link(objects, tmp_path_factory.mktemp("ptx") / "liblfx_ptx.so"))


@pytest.fixture(scope="session")
def kernels_folder(made_once: MakeOnce) -> Path:
    """The kernels' launch code in object files, and their PTX."""
    nvcc()
    return made_once("ptx-kernels", launch_code)


@pytest.fixture(scope="session")
def emulated(
    interpreter_folder: Path, kernels_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> InterpretedKernels:
    """The kernels in the interpreter. The tests of test_kernels.py, which run here too, ask for them by this name."""
    objects = [*sorted(interpreter_folder.glob("*.o")), *sorted(kernels_folder.glob("*.o"))]
    kernels = InterpretedKernels(link(objects, tmp_path_factory.mktemp("ptx") / "liblfx_ptx_kernels.so"))
    for ptx in sorted(kernels_folder.glob("*.ptx")):
        kernels.interpreter.load(ptx.read_text(encoding="utf-8"))
    return kernels
