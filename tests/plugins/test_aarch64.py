"""The CPU kernels on aarch64: cross-compiled, and run in qemu's emulation of that CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.build import ROOT, aarch64_check

pytestmark = pytest.mark.slow

CROSS = "aarch64-linux-gnu-"
COMPILER = shutil.which(f"{CROSS}g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="apt-get install g++-aarch64-linux-gnu, as .ci/run does")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="apt-get install qemu-user, as .ci/run does")


@needs_compiler
@needs_qemu
def test_the_kernels_agree_with_the_reference(tmp_path: Path) -> None:
    assert COMPILER is not None
    assert QEMU is not None
    aarch64_check(tmp_path, COMPILER)
    program = tmp_path / "check"
    assert program.read_bytes()[18:20] == b"\xb7\x00"  # e_machine of ELF: EM_AARCH64
    done = subprocess.run([QEMU, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
def test_cmake_builds_the_custom_ops_for_the_compilers_machine(tmp_path: Path) -> None:
    """Without AVX, although CMake runs on x86-64."""
    cmake = shutil.which("cmake")
    assert cmake is not None
    assert COMPILER is not None
    compiler = {"CXX": COMPILER, "CUDACXX": "no-compiler"}
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_CUDA_COMPILER=CMAKE_CUDA_COMPILER-NOTFOUND"]
    subprocess.run(configure, check=True, capture_output=True, env={**os.environ, **compiler})
    subprocess.run([cmake, "--build", str(tmp_path), "--target", "lfx_onnxruntime"], check=True, capture_output=True)
    (library,) = tmp_path.glob("liblfx_onnxruntime.so")
    assert library.read_bytes()[18:20] == b"\xb7\x00"
    names = subprocess.run([f"{CROSS}nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    assert "RegisterCustomOps" in [line.split()[-1] for line in names.stdout.splitlines() if " T " in line]
