"""Libraries that the plugin's tests build with a C++ compiler: the host reference, and the kernels for the emulator."""

from __future__ import annotations

import functools
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.once import fill_once

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
EMULATED = ROOT / "tests" / "plugins"
BUILT = ROOT / "build" / "tests"
KEPT = 3  # newest builds of a name
KERNELS = ["banded/banded_attention.cu", "global/global_attention.cu", "limits.cpp"]
BASELINE_KERNELS = ["cpu/cpu_attention.cpp", "cpu/baseline.cpp", "limits.cpp"]
CPU_KERNELS = list(BASELINE_KERNELS)
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".py")
DIGITS = 16  # of the hash in a build's name
# The flags of sources that are compiled for an instruction set, as in CMakeLists.txt.
INSTRUCTION_SETS: dict[str, list[str]] = {}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["cpu/avx2.cpp"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["cpu/avx512.cpp"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
    CPU_KERNELS += INSTRUCTION_SETS


def compiler() -> str:
    """The C++ compiler that the README asks for."""
    path = shutil.which("c++") or shutil.which("g++")
    assert path is not None, "a C++ compiler is needed, as the README says"
    return path


def built_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that make(folder) has filled.

    It is made once for the sources and compilers as they are, whichever process and session of tests asks for it first.
    """

    def build(unfinished: Path) -> None:
        make(unfinished)
        builds = BUILT.glob(f"{name}-{'[0-9a-f]' * DIGITS}")
        for old in sorted(builds, key=lambda path: path.stat().st_mtime)[: 1 - KEPT]:  # this one is not among them yet
            shutil.rmtree(old)

    folder = BUILT / f"{name}-{_sources()}"
    if not folder.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        fill_once(folder, build, BUILT / name)
    return folder


@functools.cache
def _sources() -> str:
    """A hash of what builds depend on: the sources, the Python that builds them, and the compilers."""
    digest = hashlib.sha256(platform.machine().encode())
    for tool in filter(None, (compiler(), shutil.which("nvcc"))):
        digest.update(subprocess.run([tool, "--version"], check=True, capture_output=True).stdout)
    for path in sorted([*PLUGINS.rglob("*"), *EMULATED.rglob("*")]):
        if path.suffix in SUFFIXES and not path.name.startswith("test_"):
            digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:DIGITS]


def compile_objects(folder: Path, name: str, sources: Iterable[str], *flags: str) -> list[Path]:
    """Compile files of plugins/, or of an absolute path, to objects."""

    def compile_one(source: str) -> Path:
        language = ["-x", "c++"] if source.endswith(".cu") else []
        command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        command += [f"-I{PLUGINS}", *INSTRUCTION_SETS.get(source, []), *flags]
        target = folder / f"{name}-{source.replace('/', '-')}.o"
        subprocess.run([*command, *language, "-c", str(PLUGINS / source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def build_library(folder: Path, name: str, sources: list[str], *flags: str, objects: Iterable[Path] = ()) -> Path:
    """Compile files of plugins/, and link them and other objects into a shared library."""
    linked = [*objects, *compile_objects(folder, name, sources, *flags)]
    library = folder / f"lib{name}.so"
    subprocess.run([compiler(), "-shared", "-o", str(library), *map(str, linked), *flags], check=True)
    return library


def reference_library(folder: Path) -> Path:
    """The host reference."""
    return build_library(folder, "lfx_reference", ["reference.cpp", "limits.cpp"])


EMULATED_FLAGS = ["-DLFX_EMULATED", f"-I{EMULATED}"]


def emulated_objects() -> list[Path]:
    """The kernels' own source, compiled for the emulated machine, which several libraries have."""
    folder = built_once("kernels", lambda new: compile_objects(new, "kernels", KERNELS, *EMULATED_FLAGS))
    return sorted(folder.glob("*.o"))


def emulated_library(folder: Path) -> Path:
    """The kernels' own source, for the emulated machine."""
    return build_library(folder, "lfx_emulated", [], objects=emulated_objects())


def cpu_library(folder: Path) -> Path:
    """The CPU kernels as C functions."""
    sources = [*CPU_KERNELS, "cpu/calls.cpp", str(EMULATED / "cpu_calls.cpp")]
    return build_library(folder, "lfx_cpu", sources, "-O2", "-pthread")


def fake_cuda_library(folder: Path) -> Path:
    """The custom ops on CUDA over the kernels for the emulated machine, as fake_cuda.cpp registers them."""
    sources = ["op_traits.cpp", "onnxruntime/cuda_ops.cpp", "onnxruntime/registration.cpp"]
    launches = ("21launchBandedAttentionERKNS_12BandedParams", "21launchGlobalAttentionERKNS_12GlobalParams")
    flags = ["-DRegisterCustomOps=lfxRegisterCustomOps", *EMULATED_FLAGS]
    flags += [f"-Wl,--wrap=_ZN3lfx{launch}EP11CUstream_st" for launch in launches]
    sources.append(str(EMULATED / "fake_cuda.cpp"))
    return build_library(folder, "fake_cuda", sources, *flags, objects=emulated_objects())


def plugin_library(folder: Path, includes: list[str]) -> Path:
    """The TensorRT plugins over the kernels for the emulated machine."""
    sources = ["op_traits.cpp", *(f"tensorrt/{path.name}" for path in sorted((PLUGINS / "tensorrt").glob("*.cpp")))]
    return build_library(folder, "lfx_plugin", sources, *EMULATED_FLAGS, *includes, objects=emulated_objects())


def aarch64_check(folder: Path, cross_compiler: str) -> None:
    """The program that compares the CPU kernels with the host reference, for aarch64 and with its C library inside."""
    sources = [PLUGINS / source for source in (*BASELINE_KERNELS, "reference.cpp")] + [EMULATED / "cpu_check.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-static", "-pthread"]
    includes = [f"-I{PLUGINS}", f"-I{EMULATED}"]
    command = [cross_compiler, *flags, *includes, *map(str, sources), "-o", str(folder / "check")]
    subprocess.run(command, check=True)


def cpu_check(folder: Path) -> Path:
    """The program that compares the CPU kernels with the host reference, with sanitizers."""
    sources = [*CPU_KERNELS, "reference.cpp", str(EMULATED / "cpu_check.cpp")]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build_library(folder, "check", sources, *sanitizers, "-g", "-pthread")
    program = folder / "check"
    objects = [str(path) for path in folder.glob("check-*.o")]
    subprocess.run([compiler(), "-o", str(program), *objects, *sanitizers, "-pthread"], check=True)
    return program
