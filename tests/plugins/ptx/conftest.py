"""The interpreter, and the kernels that it runs."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugins.build import built_once
from tests.plugins.ptx.build import COMPUTE_CAPABILITIES, interpreter_objects, launch_code, link, nvcc
from tests.plugins.ptx.interpreter import InterpretedKernels, Interpreter

KernelFolder = Callable[[int], Path]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the fast part the first case of each kernel in each test that test_kernels.py has too, but long ones."""
    seen = set()
    for item in items:
        if isinstance(item, pytest.Function) and item.path.name == "test_kernels_in_ptx.py":
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            key = item.originalname, parameters.get("precision"), parameters.get("wide")
            if key in seen or "long_sequence" in item.name:
                item.add_marker(pytest.mark.slow)
            seen.add(key)


@pytest.fixture(scope="session")
def interpreter_folder() -> Path:
    """The interpreter's object files."""
    return built_once("ptx-interpreter", interpreter_objects)


@pytest.fixture(scope="session")
def interpreter(interpreter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """The interpreter alone; it needs no CUDA compiler."""
    objects = sorted(interpreter_folder.glob("*.o"))
    return Interpreter(link(objects, tmp_path_factory.mktemp("ptx") / "liblfx_ptx.so"))


@pytest.fixture(scope="session")
def kernel_folder() -> KernelFolder:
    """kernel_folder(compute capability) -> the kernels' launch code in object files, and their PTX."""

    @functools.cache
    def make(capability: int) -> Path:
        listed = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        if f"compute_{capability}" not in listed.split():
            pytest.skip(f"nvcc does not support compute capability {capability}")
        return built_once(f"ptx-kernels-{capability}", functools.partial(launch_code, compute_capability=capability))

    return make


@pytest.fixture(scope="session")
def interpreted(
    interpreter_folder: Path, kernel_folder: KernelFolder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], InterpretedKernels]:
    """interpreted(compute capability) -> the kernels in the interpreter."""

    @functools.cache
    def make(compute_capability: int) -> InterpretedKernels:
        folder = kernel_folder(compute_capability)
        objects = [*sorted(interpreter_folder.glob("*.o")), *sorted(folder.glob("*.o"))]
        kernels = InterpretedKernels(link(objects, tmp_path_factory.mktemp("ptx") / "liblfx_ptx_kernels.so"))
        for ptx in sorted(folder.glob("*.ptx")):
            kernels.interpreter.load(ptx.read_text(encoding="utf-8"))
        return kernels

    return make


@pytest.fixture(scope="session")
def emulated(interpreted: Callable[[int], InterpretedKernels]) -> InterpretedKernels:
    """The kernels in the interpreter. The tests of test_kernels.py, which run here too, ask for them by this name."""
    return interpreted(COMPUTE_CAPABILITIES[0])
