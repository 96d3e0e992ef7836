"""Each barrier, wait and commit in the kernels' PTX is needed: without it, the interpreter refuses the kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lfx.parity import Case
from tests.plugins.problems import Banded, Global, banded, global_
from tests.plugins.ptx.build import COMPUTE_CAPABILITIES
from tests.plugins.ptx.conftest import KernelFolder
from tests.plugins.ptx.interpreter import InterpretedKernels
from tests.plugins.ptx.test_mutations import finding

SYNCHRONIZES = re.compile(r"\b(bar\.sync|bar\.warp\.sync|cp\.async\.commit_group|cp\.async\.wait_group)\b")


def banded_problems(head_size: int, precision: str) -> list[Banded]:
    """Global tokens before the band; one tile; only global tokens."""
    cases = (Case(1, 150, "scattered", "holes"), Case(1, 50), Case(1, 150, "all"))
    return [banded(case, 1, head_size, 20, precision=precision) for case in cases]


def global_problems(head_size: int, precision: str) -> list[Global]:
    """Two tiles in a part; one."""
    many_blocks = global_(Case(1, 140 if head_size <= 128 else 70), 1, 270, head_size, precision=precision)
    return [global_(Case(1, 140, "none", "holes"), 3, 1, head_size, precision=precision), many_blocks]


# Part of a kernel's name -> problems that launch it. Kernels for bfloat16 differ from those for float16 in types only.
KERNELS: dict[str, Callable[[], list[Banded] | list[Global]]] = {
    "bandedAttentionFp32ILi64E": lambda: banded_problems(64, "fp32"),
    "bandedAttentionTensorCoresI6__halfLi32ELi1E": lambda: banded_problems(32, "fp16"),
    "bandedAttentionTensorCoresI6__halfLi64ELi1E": lambda: banded_problems(64, "fp16"),
    "bandedAttentionTensorCoresI6__halfLi64ELi2E": lambda: banded_problems(64, "fp16"),
    "bandedAttentionTensorCoresI6__halfLi128ELi2E": lambda: banded_problems(128, "fp16"),
    "globalAttentionFp32E": lambda: global_problems(8, "fp32"),
    "globalAttentionTensorCoresI6__halfLi128E": lambda: global_problems(8, "fp16"),
    "globalAttentionTensorCoresI6__halfLi1024E": lambda: global_problems(136, "fp16"),
    "combinePartsI6__halfE": lambda: [global_(Case(1, 700, "none", "left"), 3, 1, 64, precision="fp16")],
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_barrier_is_needed(
    emulated: InterpretedKernels, kernel_folder: KernelFolder, tmp_path: Path, kernel: str
) -> None:
    folder = kernel_folder(COMPUTE_CAPABILITIES[0])
    modules = [path.read_text(encoding="utf-8") for path in folder.glob("*.ptx")]
    module = next(text for text in modules if kernel in text)
    header = re.split(r"(?:\.visible )?\.entry", module, maxsplit=1)[0]
    (body,) = re.findall(rf"\.entry \w*{kernel}\w*\(.*?^\}}$", module, re.DOTALL | re.MULTILINE)
    lines = body.splitlines()
    needed = [i for i, line in enumerate(lines) if (found := SYNCHRONIZES.search(line)) and is_needed(kernel, found[0])]
    assert needed
    problems = KERNELS[kernel]()
    try:
        for i in needed:
            emulated.interpreter.load(header + "\n".join([*lines[:i], *lines[i + 1 :]]))
            assert any(finding(problem, emulated, kernel.endswith("ELi2E")) for problem in problems), lines[i]
    finally:
        emulated.interpreter.load(module)


def is_needed(kernel: str, opcode: str) -> bool:
    """GlobalAttention in float32 has barriers of a warp that the same source for narrower weights needs."""
    return "globalAttentionFp32" not in kernel or opcode != "bar.warp.sync"
