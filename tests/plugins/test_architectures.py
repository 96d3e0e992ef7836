"""The GPUs that CMake builds the plugin library for, given what nvcc supports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.build import ROOT


@pytest.mark.parametrize(
    ("version", "supported", "architectures"),
    [
        (
            "13.0",
            [75, 80, 86, 87, 89, 90, 100, 110, 103, 120, 121],
            "80-real;86-real;89-real;90a-real;100-real;120-real;100-virtual",
        ),
        ("12.0", [50, 80, 86, 87, 89, 90], "80-real;86-real;89-real;90a-real;90-virtual"),
        ("11.8", [35, 50, 80, 86, 87, 89, 90], "80-real;86-real;89-real;90-real;90-virtual"),
        ("11.0", [50, 60, 70], ""),
    ],
    ids=["CUDA 13.0", "CUDA 12.0", "CUDA 11.8", "none of them"],
)
def test_architectures_that_nvcc_does_not_support_are_left_out(
    version: str, supported: list[int], architectures: str, tmp_path: Path
) -> None:
    # The environment of the tests has one, which need not be on the PATH.
    cmake = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert cmake is not None
    nvcc = tmp_path / "nvcc"
    listed = "".join(f"echo compute_{number}\n" for number in supported)
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release {version}, V"; exit; fi\n{listed}')
    nvcc.chmod(0o755)
    script = tmp_path / "script.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f'set(CMAKE_CUDA_COMPILER "{nvcc}")\n'
        f'include("{ROOT / "plugins" / "architectures.cmake"}")\n'
        "supported_architectures(found)\n"
        'file(WRITE "${CMAKE_CURRENT_LIST_DIR}/found" "${found}")\n'
    )
    subprocess.run([cmake, "-P", script], check=True, capture_output=True)
    assert (tmp_path / "found").read_text() == architectures
