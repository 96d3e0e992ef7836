"""Builds the interpreter, and the kernels' launch code and PTX for it."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.plugins.build import KERNELS, PLUGINS, compiler

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# nvcc 13 has two compilers of device code, one for compute capabilities up to 9.0 and one for those above. The machine
# code in the library is made by both, and its PTX, which newer GPUs compile, by the second.
COMPUTE_CAPABILITIES = (80, 100)

# -ffp-contract=off: products and sums are rounded separately, as the instructions say.
COMPILE = ("-std=c++17", "-O1", "-ftree-vectorize", "-fPIC", "-Wall", "-Werror", "-ffp-contract=off")
# -Bsymbolic: a CUDA runtime that the process has loaded does not take the place of the interpreter's.
LINK = ("-shared", "-Wl,-Bsymbolic")


def interpreter_objects(folder: Path) -> None:
    """Compile the interpreter, whose headers are compiled beforehand, since most of the time goes to them."""
    headers = folder / "headers.h"
    headers.write_text("".join(f'#include "{path}"\n' for path in HEADERS), encoding="utf-8")
    subprocess.run([compiler(), *COMPILE, "-x", "c++-header", str(headers), "-o", f"{headers}.gch"], check=True)

    def compile_one(source: Path) -> None:
        command = [compiler(), *COMPILE, "-include", str(headers), "-c", str(source)]
        subprocess.run([*command, "-o", str(folder / f"{source.stem}.o")], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, SOURCES))
    Path(f"{headers}.gch").unlink()  # tens of megabytes


def link(objects: list[Path], library: Path) -> Path:
    """Link a shared library."""
    subprocess.run([compiler(), *LINK, "-o", str(library), *map(str, objects)], check=True)
    return library


def nvcc() -> str:
    """The CUDA compiler; skips the test where there is none."""
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not on the PATH")
    return path


def launch_code(folder: Path, compute_capability: int) -> None:
    """Compile the kernels' files for the host, to objects that call the CUDA runtime, and keep their PTX."""
    virtual = f"compute_{compute_capability}"
    options = ["-std=c++17", f"-I{PLUGINS}", "-Xcompiler", "-fPIC", "-gencode", f"arch={virtual},code={virtual}"]
    keep = ["--keep", "--keep-dir", str(folder)]

    def compile_one(source: str) -> None:
        command = [nvcc(), *options, *keep, "-c", str(PLUGINS / source), "-o", str(folder / f"{Path(source).stem}.o")]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, KERNELS))
    for leftover in folder.iterdir():
        if leftover.suffix not in (".o", ".ptx"):
            leftover.unlink()


def ptx(plugins: Path, source: str, compute_capability: int) -> str:
    """Compile a file of a copy of plugins/ to PTX."""
    command = [nvcc(), "-std=c++17", f"-I{plugins}", f"-arch=compute_{compute_capability}", "-ptx", "-o", "-"]
    done = subprocess.run([*command, str(plugins / source)], check=True, capture_output=True, text=True)
    return done.stdout
