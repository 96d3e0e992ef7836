"""Libraries that the plugin's tests build with a C++ compiler: the host reference, and the kernels for the emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
EMULATED = ROOT / "tests" / "plugins"
KERNELS = ["banded/banded_attention.cu", "global/global_attention.cu", "limits.cpp"]
BASELINE_KERNELS = ["cpu/cpu_attention.cpp", "cpu/baseline.cpp", "limits.cpp"]
CPU_KERNELS = list(BASELINE_KERNELS)
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


def build_library(folder: Path, name: str, sources: list[str], *flags: str) -> Path:
    """Compiles files of plugins/ into a shared library."""
    objects = []

    def compile_one(source: str) -> None:
        language = ["-x", "c++"] if source.endswith(".cu") else []
        command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        command += [f"-I{PLUGINS}", *INSTRUCTION_SETS.get(source, []), *flags]
        target = folder / f"{name}-{source.replace('/', '-')}.o"
        objects.append(target)
        subprocess.run([*command, *language, "-c", str(PLUGINS / source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    library = folder / f"lib{name}.so"
    subprocess.run([compiler(), "-shared", "-o", str(library), *map(str, objects), *flags], check=True)
    return library


def reference_library(folder: Path) -> Path:
    """The host reference."""
    return build_library(folder, "lfx_reference", ["reference.cpp", "limits.cpp"])


def emulated_library(folder: Path) -> Path:
    """The kernels' own source, for the emulated machine."""
    flags = ("-DLFX_EMULATED", f"-I{EMULATED}")
    return build_library(folder, "lfx_emulated", KERNELS, *flags)


def cpu_library(folder: Path) -> Path:
    """The CPU kernels as C functions."""
    sources = [*CPU_KERNELS, "cpu/calls.cpp", str(EMULATED / "cpu_calls.cpp")]
    return build_library(folder, "lfx_cpu", sources, "-O2", "-pthread")


def fake_cuda_library(folder: Path) -> Path:
    """The custom ops on CUDA over the kernels for the emulated machine, as fake_cuda.cpp registers them."""
    sources = [*KERNELS, "op_traits.cpp", "onnxruntime/cuda_ops.cpp", "onnxruntime/registration.cpp"]
    launches = ("21launchBandedAttentionERKNS_12BandedParams", "21launchGlobalAttentionERKNS_12GlobalParams")
    flags = ["-DRegisterCustomOps=lfxRegisterCustomOps", "-DLFX_EMULATED", f"-I{EMULATED}"]
    flags += [f"-Wl,--wrap=_ZN3lfx{launch}EP11CUstream_st" for launch in launches]
    return build_library(folder, "fake_cuda", [*sources, str(EMULATED / "fake_cuda.cpp")], *flags)


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
