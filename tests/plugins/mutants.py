"""The emulated kernels with one change in their source, for the tests that find it.

A change is compiled in a second: without optimization, without the kernels of bfloat16 (those of float16 are the same
templates), with the emulator's header compiled beforehand, and only the op that has the changed file.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.plugins.build import EMULATED, KERNELS, PLUGINS, compiler

# GlobalAttention splits its keys as for a GPU of eight multiprocessors, so that few blocks visit several tiles each.
TARGET_BLOCKS = 16
HEADER = '#include "emulated_device.h"\n#define Bf16 Half\n'
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fno-gnu-unique", "-DLFX_EMULATED"]


def unchanged(folder: Path) -> None:
    """Compile the emulator's header, and the kernels before the change."""
    plugins = Path(shutil.copytree(PLUGINS, folder / "plugins"))
    replace(plugins / "global" / "block.cuh", "kTARGET_BLOCKS = 264;", f"kTARGET_BLOCKS = {TARGET_BLOCKS};")
    header = folder / "mutants.h"
    header.write_text(HEADER, encoding="utf-8")
    command = [compiler(), *FLAGS, f"-I{EMULATED}", "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(command, check=True)
    for source in KERNELS:
        _compile(folder, plugins, source, _object(folder, source))
    _link(folder / "libunchanged.so", [_object(folder, source) for source in KERNELS])


def mutant(folder: Path, unchanged: Path, file: str, before: str, after: str) -> Path:
    """Compile the kernels after a change.

    Args:
        unchanged: folder that `unchanged` has filled.
        file: path in plugins/ of the file in which `before` becomes `after`.
    """
    plugins = Path(shutil.copytree(unchanged / "plugins", folder / "plugins"))
    replace(plugins / file, before, after)
    objects = []
    for source in KERNELS:
        op, changed = Path(source).parent, Path(file).parent
        if changed in (Path(), op) and source.endswith(".cu"):
            objects.append(_object(folder, source))
            _compile(unchanged, plugins, source, objects[-1])
        else:
            objects.append(_object(unchanged, source))
    library = folder / "libmutant.so"
    _link(library, objects)
    return library


def replace(path: Path, before: str, after: str) -> None:
    """Replace a text that a file has once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")


def _object(folder: Path, source: str) -> Path:
    return folder / f"{Path(source).name}.o"


def _compile(header_folder: Path, plugins: Path, source: str, target: Path) -> None:
    command = [compiler(), *FLAGS, f"-I{header_folder}", f"-I{plugins}", f"-I{EMULATED}"]
    # The compiled header comes first in a file, or the compiler does not use it.
    kernel = ["-include", "mutants.h", "-x", "c++"] if source.endswith(".cu") else []
    subprocess.run([*command, *kernel, "-c", str(plugins / source), "-o", str(target)], check=True)


def _link(library: Path, objects: list[Path]) -> None:
    subprocess.run([compiler(), "-shared", "-o", str(library), *map(str, objects)], check=True)
