"""The machine code (SASS) and the resources of a library's kernels, read with NVIDIA's cuobjdump."""

from __future__ import annotations

import heapq
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PACKAGED = (str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/cuobjdump"))
TOOL = next(_PACKAGED, None) or shutil.which("cuobjdump")  # None if it is not installed
Kernel = tuple[str, str]  # architecture, such as sm_90, and the kernel's mangled name


def cuobjdump(library: Path, *options: str) -> str:
    """Run cuobjdump, which must be installed."""
    assert TOOL is not None
    # It calls nvdisasm, which a package of its own puts in the same folder.
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(TOOL).parent), os.environ["PATH"]])}
    return subprocess.run([TOOL, *options, library], check=True, capture_output=True, text=True, env=env).stdout


def machine_code(library: Path, architecture: str = "") -> dict[Kernel, str]:
    """Return the disassembly of each kernel, of one architecture such as sm_90 or of all."""
    only = ("-arch", architecture + "a" * (architecture == "sm_90")) if architecture else ()
    return _by_kernel(cuobjdump(library, "-sass", *only), "Function : ")


def resources(library: Path) -> dict[Kernel, dict[str, int]]:
    """Return REG, STACK, SHARED and LOCAL of each kernel; dynamic shared memory is not counted."""
    parts = _by_kernel(cuobjdump(library, "--dump-resource-usage"), "Function ")
    return {
        key: {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        for key, text in parts.items()
    }


def _by_kernel(text: str, start: str) -> dict[Kernel, str]:
    """Split cuobjdump's output by kernel; `start` precedes each kernel's name."""
    sections = re.split(r"\n\s*arch = ", text)[1:]
    parts = ((section.split()[0].rstrip("a"), part) for section in sections for part in section.split(start)[1:])
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


@dataclass(frozen=True)
class Block:
    """A basic block: straight code that only its last instruction may leave."""

    start: int  # address
    end: int  # address of the instruction after it
    opcodes: tuple[str, ...]  # with their suffixes
    following: tuple[int, ...]  # addresses of the blocks that may follow

    def count(self, opcode: str) -> int:
        """Return the number of instructions with an opcode, whatever their suffixes."""
        return sum(name.split(".")[0] == opcode for name in self.opcodes)


def basic_blocks(code: str) -> dict[int, Block]:
    """Return the basic blocks of a disassembly that can be reached, by address.

    Calls without a guard return. Warps have not diverged at collective instructions: BRA.CONV is taken, BRA.DIV not.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", code)
    instructions = [(int(address, 16), guard.strip(), name, operands) for address, guard, name, operands in lines]
    ends = {}  # address of each instruction that ends a block -> the blocks that may follow
    for address, guard, name, operands in instructions:
        target = re.findall(r"0x([0-9a-f]+)", operands)
        next_one = [address + 16]
        if name.startswith("BRA.DIV"):
            ends[address] = next_one
        elif name.startswith("BRA") or (name.startswith("CALL") and guard):
            # A branch may have a predicate among its operands instead of a guard. A call with a guard leaves a loop.
            conditional = guard or re.search(r"\bU?P\d", operands)
            ends[address] = [*([] if not conditional else next_one), int(target[-1], 16)]
        elif name.startswith(("EXIT", "RET")):
            ends[address] = next_one if guard else []
    starts = sorted({0} | {a + 16 for a in ends} | {t for following in ends.values() for t in following})
    known = {address for address, *_ in instructions}
    blocks = {}
    for start, stop in zip(starts, [*starts[1:], max(known) + 16], strict=True):
        names = tuple(name for address, _, name, _ in instructions if start <= address < stop)
        if names:
            blocks[start] = Block(start, stop, names, tuple(t for t in ends.get(stop - 16, [stop]) if t in known))
    reached: set[int] = set()
    open_ones = [0]
    while open_ones:
        if (address := open_ones.pop()) not in reached:
            reached.add(address)
            open_ones += blocks[address].following
    return {address: block for address, block in blocks.items() if address in reached}


def path(blocks: dict[int, Block], stops: Sequence[int]) -> list[Block]:
    """Return the path with the fewest instructions from the first of `stops` to the last, through all in their order.

    Args:
        blocks: those that the path may enter, by address.
        stops: addresses of blocks.
    Returns:
        The blocks on the path, both ends included.
    """
    result = [blocks[stops[0]]]
    for source, target in itertools.pairwise(stops):
        result += _shortest(blocks, source, target)
    return result


def _shortest(blocks: dict[int, Block], source: int, target: int) -> list[Block]:
    """Return the shortest path without its first block; from a block to itself it goes around a loop."""
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, source, ())]
    seen = set()
    while queue:
        cost, at, trail = heapq.heappop(queue)
        if at == target and trail:
            return [blocks[address] for address in trail]
        if at in seen and trail:
            continue
        seen.add(at)
        for address in blocks[at].following:
            if address in blocks:
                heapq.heappush(queue, (cost + len(blocks[address].opcodes), address, (*trail, address)))
    raise ValueError(f"no path from {source:#x} to {target:#x}")


def loops(blocks: dict[int, Block]) -> list[tuple[int, int]]:
    """Return the first and last block of each loop, inner loops first; a loop's code is contiguous."""
    ends = {
        target: b.start
        for b in sorted(blocks.values(), key=lambda b: b.start)
        for target in b.following
        if target <= b.start
    }
    return sorted(ends.items(), key=lambda loop: loop[1] - loop[0])
