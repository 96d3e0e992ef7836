"""The machine code (SASS) and the resources of a library's kernels, read with NVIDIA's cuobjdump."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_PACKAGED = (str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/cuobjdump"))
TOOL = next(_PACKAGED, None) or shutil.which("cuobjdump")  # None if it is not installed
Kernel = tuple[str, str]  # architecture, such as sm_90, and the kernel's mangled name


def cuobjdump(option: str, library: Path) -> str:
    """Run cuobjdump, which must be installed."""
    assert TOOL is not None
    # It calls nvdisasm, which a package of its own puts in the same folder.
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(TOOL).parent), os.environ["PATH"]])}
    return subprocess.run([TOOL, option, library], check=True, capture_output=True, text=True, env=env).stdout


def machine_code(library: Path) -> dict[Kernel, str]:
    """Return the disassembly of each kernel."""
    return _by_kernel(cuobjdump("-sass", library), "Function : ")


def resources(library: Path) -> dict[Kernel, dict[str, int]]:
    """Return REG, STACK, SHARED and LOCAL of each kernel; dynamic shared memory is not counted."""
    parts = _by_kernel(cuobjdump("--dump-resource-usage", library), "Function ")
    return {
        key: {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        for key, text in parts.items()
    }


def _by_kernel(text: str, start: str) -> dict[Kernel, str]:
    """Split cuobjdump's output by kernel; `start` precedes each kernel's name."""
    sections = re.split(r"\n\s*arch = ", text)[1:]
    parts = ((section.split()[0], part) for section in sections for part in section.split(start)[1:])
    return {(arch, part.split()[0].rstrip(":")): part for arch, part in parts}


def straight_runs(code: str) -> list[list[str]]:
    """Split a disassembly at branches and branch targets; returns the opcodes, without suffix, of each straight run."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", code)
    starts = set()
    for address, name, operands in lines:
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands)) is not None:
            starts |= {int(address, 16) + 16, int(target[1], 16)}
    runs: list[list[str]] = [[]]
    for address, name, _ in lines:
        if int(address, 16) in starts:
            runs.append([])
        runs[-1].append(name.split(".")[0])
    return [run for run in runs if run]
