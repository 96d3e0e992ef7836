"""The libraries that the plugin's tests run."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils._pytree import tree_leaves

from lfx.errors import PluginError
from lfx.runtime import plugin as plugins
from lfx.torch import kernels
from scripts import record
from scripts.bench import timing
from scripts.bench.launch import Kernels
from tests.conftest import MakeOnce
from tests.plugins import build
from tests.plugins.build import ROOT, built_once, cpu_library, emulated_library, reference_library


@pytest.fixture(scope="session")
def host_reference() -> Any:
    """plugins/reference.cpp."""
    library = ctypes.CDLL(str(built_once("reference", reference_library) / "liblfx_reference.so"))
    for name in ("lfxBandedAttentionReference", "lfxGlobalAttentionReference"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p]
    return library


@pytest.fixture(scope="session")
def emulated_path() -> Path:
    """The library of the kernels' own source, compiled for the emulated machine."""
    return built_once("emulated", emulated_library) / "liblfx_emulated.so"


@pytest.fixture(scope="session")
def emulated(emulated_path: Path) -> Kernels:
    """Its launch functions."""
    return Kernels(emulated_path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes lfx.torch run the installed kernels for a GPU on CPU tensors too; names the parameters of each launch."""
    names: list[str] = []
    call = kernels.CudaKernels.call

    def counted(self: kernels.CudaKernels, function: Any, params: ctypes.Structure, device: Any) -> bool:
        is_supported = call(self, function, params, device)
        if is_supported:
            names.append(type(params).__name__)
        return is_supported

    monkeypatch.setattr(kernels.CudaKernels, "call", counted)
    monkeypatch.setattr(kernels, "kernels_for", lambda tensor: kernels._installed())
    return names


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts for a GPU run on the CPU: a graph is a function that is called again."""

    def capture(run: Callable[[Any], Any], sets: Iterable[Any]) -> tuple[Any, list[Any]]:
        sets = list(sets)
        outputs = [run(one) for one in sets]

        def replay() -> None:
            again = [run(one) for one in sets]
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                old.copy_(new)

        return SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(record, "gpu_environment", lambda torch: {"gpu": "NVIDIA H200, 1.0", "commit": "abc"})


@pytest.fixture(scope="session")
def cpu() -> Any:
    """The CPU kernels: cpu_calls.cpp."""
    library = ctypes.CDLL(str(built_once("cpu", cpu_library) / "liblfx_cpu.so"))
    for name in ("lfxBandedAttentionCpu", "lfxGlobalAttentionCpu"):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    library.lfxExp2Cpu.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return library


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin library that pip built."""
    try:
        return plugins.library()
    except PluginError as error:
        pytest.skip(f"no plugin library: {error}")


@pytest.fixture(scope="session")
def includes() -> list[str]:
    """TensorRT's headers, as the Makefile fetches them, and CUDA's."""
    tensorrt = ROOT / "build" / "headers" / "tensorrt"
    nvcc = shutil.which("nvcc")
    if not tensorrt.is_dir() or nvcc is None:
        pytest.skip("needs TensorRT's headers (make install fetches them) and CUDA's")
    verbose = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    (top,) = [line.partition("TOP=")[2].strip() for line in verbose.splitlines() if "TOP=" in line]
    return [f"-isystem{tensorrt}", f"-isystem{Path(top) / 'include'}"]


@pytest.fixture(scope="session")
def plugin_library(includes: list[str], made_once: MakeOnce) -> Path:
    """The plugins over the emulated kernels."""
    return made_once("plugin", lambda folder: build.plugin_library(folder, includes)) / "liblfx_plugin.so"
