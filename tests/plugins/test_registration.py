"""The plugins register themselves when the library is loaded by plain dlopen, as Triton's TensorRT backend loads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugins.build import EMULATED, ROOT, compiler

pytestmark = pytest.mark.trt

BOTH = "BandedAttention GlobalAttention"
# Creators of the namespace lfx in the registry of TensorRT-RTX.
REGISTRY = """
import ctypes, sys
import tensorrt_rtx
registry = tensorrt_rtx.get_plugin_registry()
def names():
    return " ".join(sorted(c.name for c in registry.all_creators if c.plugin_namespace == "lfx"))
"""
# The creators of the fake TensorRT. ctypes loads libraries with RTLD_LOCAL, as Triton does.
FAKE = """
import ctypes, sys
fake = ctypes.CDLL(sys.argv[2])
fake.creatorName.restype = ctypes.c_char_p
def names():
    return " ".join(sorted(fake.creatorName(i).decode() for i in range(fake.numCreators())))
"""
LOAD = "ctypes.CDLL(sys.argv[1])\nprint(names())\n"


def python(code: str, *arguments: object, preload: str = "") -> tuple[str, str]:
    """Run code in a process of its own; returns stdout and stderr."""
    environment = os.environ | ({"LD_PRELOAD": preload} if preload else {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
    return run.stdout.strip(), run.stderr.strip()


@pytest.fixture(scope="session")
def fake_tensorrt(includes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a fake TensorRT that reports a version; default: that of its headers."""
    folder = tmp_path_factory.mktemp("fake")

    def build(version: int | None = None) -> Path:
        path = folder / f"libfake_{version}.so"
        flags = [] if version is None else [f"-DVERSION={version}"]
        source = EMULATED / "fake_tensorrt.cpp"
        command = [compiler(), "-std=c++17", "-shared", "-fPIC", *includes, *flags, "-o", str(path), str(source)]
        if not path.exists():
            subprocess.run(command, check=True)
        return path

    return build


def test_without_tensorrt_the_library_loads_quietly(plugin_library: Path) -> None:
    assert python("import ctypes, sys; ctypes.CDLL(sys.argv[1])", plugin_library) == ("", "")


def test_tensorrt_rtx_has_the_plugins_after_plain_dlopen(plugin_library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert python(REGISTRY + LOAD, plugin_library) == (BOTH, "")


def test_the_library_that_pip_built_registers_itself(library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert python(REGISTRY + LOAD, library) == (BOTH, "")


def test_load_library_registers_and_unregisters_as_before(plugin_library: Path) -> None:
    # A registration while loadLibrary() loads the library would make it refuse its own.
    pytest.importorskip("tensorrt_rtx")
    code = "handle = registry.load_library(sys.argv[1])\nprint(handle is not None, names())\n"
    code += "registry.deregister_library(handle)\nprint(names())\n"
    assert python(REGISTRY + code, plugin_library) == (f"True {BOTH}", "")


def test_plugins_that_are_registered_are_not_registered_again(plugin_library: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    copy = shutil.copy(plugin_library, tmp_path / "copy.so")
    assert python(REGISTRY + LOAD + LOAD.replace("1", "2"), plugin_library, copy) == (
        f"{BOTH}\n{BOTH}",
        "",
    )


def test_registered_plugins_stay_loaded(plugin_library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    code = "import _ctypes\nlibrary = ctypes.CDLL(sys.argv[1])\n_ctypes.dlclose(library._handle)\nprint(names())\n"
    code += "print(sys.argv[1] in open('/proc/self/maps').read())\n"
    assert python(REGISTRY + code, plugin_library) == (f"{BOTH}\nTrue", "")


def test_ld_preload_works_with_tensorrt_behind_it_and_does_nothing_alone(plugin_library: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    tensorrt = Path(rtx.__file__).parents[1] / "tensorrt_rtx_libs" / "libtensorrt_rtx.so.1"
    library = plugin_library
    if " " in f"{library}{tensorrt}":
        pytest.skip("LD_PRELOAD takes no path with a space")
    assert python(REGISTRY + "print(names())", preload=f"{library}:{tensorrt}") == (BOTH, "")
    assert python(REGISTRY + "print(names())", preload=library) == ("", "")


# TensorRT's lean runtimes have a registry, and load without a GPU. The index of getCreator and loadLibrary in the
# registry's virtual table is that of their version's headers.
LEAN = """
import ctypes, sys
lean = ctypes.CDLL(sys.argv[2])
lean.getPluginRegistry.restype = ctypes.c_void_p
registry = lean.getPluginRegistry()
get, load = {10: (14, 10), 11: (10, 6)}[lean.getInferLibVersion() // 10000]
table = ctypes.cast(ctypes.cast(registry, ctypes.POINTER(ctypes.c_void_p))[0], ctypes.POINTER(ctypes.c_void_p))
get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_char_p] * 3)(table[get])
load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(table[load])
def names():
    both = ("BandedAttention", "GlobalAttention")
    return " ".join(name for name in both if get(registry, name.encode(), b"1", b"lfx"))
"""
LEAN_PACKAGES = {10: "tensorrt-lean-cu12-libs==10.16.1.11", 11: "tensorrt-lean-cu13-libs==11.4.0.106"}


@pytest.mark.parametrize("major", LEAN_PACKAGES)
def test_tensorrts_lean_runtimes_have_the_plugins(major: int, plugin_library: Path) -> None:
    folder = ROOT / "build" / f"tensorrt-lean-{major}"
    runtimes = list(folder.rglob("libnvinfer_lean.so.*"))
    if not runtimes:
        pytest.skip(f"no lean runtime; pip install --no-deps --target {folder} {LEAN_PACKAGES[major]}")
    assert python(LEAN + LOAD, plugin_library, runtimes[0]) == (BOTH, "")
    loaded = "print(load(registry, sys.argv[1].encode()) is not None, names())\n"
    assert python(LEAN + loaded, plugin_library, runtimes[0]) == (f"True {BOTH}", "")


def test_the_registry_of_the_headers_has_the_plugins(plugin_library: Path, fake_tensorrt: Callable[..., Path]) -> None:
    # TensorRT 10 and 11 have different virtual tables; the headers are those of one of them.
    assert python(FAKE + LOAD, plugin_library, fake_tensorrt()) == (BOTH, "")


@pytest.mark.parametrize("version", [8601, 10500, 120000])
def test_an_unknown_tensorrt_is_not_called(
    version: int, plugin_library: Path, fake_tensorrt: Callable[..., Path]
) -> None:
    names, error = python(FAKE + LOAD, plugin_library, fake_tensorrt(version))
    assert names == ""
    assert f"TensorRT's version is {version}" in error
