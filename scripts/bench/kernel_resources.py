"""Print the resources that BandedAttention takes, counted in its machine code, and the microseconds that they imply.

    python -m scripts.bench.kernel_resources [--library FILE] [--json]
    python -m scripts.bench.kernel_resources --budgets     # of a warp, for each architecture and head size
    python -m scripts.bench.kernel_resources --edges       # products that are computed in vain at the edges of the band

For each GPU it reads the machine code of the kernel for head size 64 in float16, finds its loops, and counts the
instructions on the path of a warp: once before and after the tiles, for each tile, for each group of keys that all its
queries see, for each other group, and for a group of at most 16 global tokens. The numbers of tiles and groups follow
from the case. Sums are taken to be rescaled for the first group of a warp only, as they are if no score is 2^8 times as
large as that group's. A resource's time is its total over all blocks, divided by the rate of the whole GPU: the kernel
takes at least the largest of them, and longer if the last wave of blocks is not full.

Needs cuobjdump, but no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfx.errors import LfxError
from lfx.runtime import plugin
from scripts.bench import sass
from scripts.bench.band_cases import NARROW, WIDE, Case, Tiling
from scripts.bench.sass import Block

KERNEL = "bandedAttentionTensorCoresI6__halfLi{head_size}ELi{row_tiles}E"
HEAD_SIZES = (32, 64, 128)
CASES = [Case(seqlen, 256, 1, batch, 12, "fp16") for batch in (1, 8) for seqlen in (4096, 16384)]


@dataclass(frozen=True)
class Gpu:
    """Published rates of a GPU.

    Attributes:
        tensor_flops: dense float16 products with float32 sums, per second.
        l2_bytes: that the L2 delivers per second; None if it is not published.
    """

    name: str
    multiprocessors: int
    clock: float
    tensor_flops: float
    l2_bytes: float | None


# Shared memory of a multiprocessor in KiB; a block takes 1 KiB more than it requests. Registers: 65,536, which
# warps take in units of 256. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_KB = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}


def resident_blocks(architecture: str, registers: int, threads: int, shared_bytes: int) -> int:
    """Return the number of blocks that a multiprocessor holds at a time."""
    by_registers = 65536 // (threads // 32 * (-(-registers * 32 // 256) * 256))
    return min(by_registers, SHARED_KB[architecture] * 1024 // (shared_bytes + 1024))


# A multiprocessor issues 4 instructions of a warp, computes 16 exponentials and reads 128 bytes of shared memory in a
# clock. Source: CUDA C++ Programming Guide, "Arithmetic Instructions" and "Technical Specifications per Compute
# Capability".
ISSUE, EXPONENTIALS, SHARED_BYTES = 4, 16, 128
GPUS = {
    # Source: NVIDIA A100 Tensor Core GPU Architecture (2020); its 5,120 bytes per clock of the L2 are from memory.
    "sm_80": Gpu("A100 SXM", 108, 1.41e9, 312e12, 5120 * 1.41e9),
    # Source: NVIDIA H100 datasheet (SXM). The clock follows from the peak rate: 4,096 operations per clock and
    # multiprocessor. NVIDIA does not publish the rate of the L2; the lower figure of plugins/README.md, which is from
    # memory of published microbenchmarks.
    "sm_90": Gpu("H100 SXM", 132, 1.83e9, 989.4e12, 5.5e12),
    # Source: NVIDIA RTX Blackwell GPU Architecture (2025), GeForce RTX 5090, dense with float32 sums: a quarter of the
    # 838 TFLOP/s that are advertised, with sparsity and float16 sums. The rate of its L2 is not published.
    "sm_120": Gpu("RTX 5090", 170, 2.407e9, 209.5e12, None),
}


@dataclass(frozen=True)
class WarpCosts:
    """Opcodes that a warp executes, by part of the kernel.

    Attributes:
        once: before and after the tiles, and the rescaling of sums.
        tile: the copies of a tile, and finding that no query sees its groups.
        whole, group: in addition, a group that all queries see, and one that they see in part.
        few: in addition, the group of a tile of few slots.
    """

    once: Counter[str]
    tile: Counter[str]
    whole: Counter[str]
    group: Counter[str]
    few: Counter[str]

    def total(self, work: Counter[str]) -> Counter[str]:
        """Return the opcodes of all warps together."""
        parts = [(self.once, "warps"), (self.tile, "tiles")]
        parts += [(self.whole, "whole"), (self.group, "groups"), (self.few, "few")]
        total: Counter[str] = Counter()
        for opcodes, number in parts:
            for name, count in opcodes.items():
                total[name] += count * work[number]
        return total


def warp_costs(code: str, case: Case, tiling: Tiling) -> WarpCosts:
    """Count the instructions of a warp in a disassembly."""
    blocks = sass.basic_blocks(code)
    products = {b.start for b in blocks.values() if b.count("HMMA")}
    with_products = [loop for loop in sass.loops(blocks) if any(loop[0] <= p <= loop[1] for p in products)]
    inner, outer = with_products[0], with_products[-1]  # over groups, over tiles
    scores, context = sorted(
        (start for start in products if inner[0] <= start <= inner[1]), key=lambda start: blocks[start].count("MUFU")
    )
    groups = {start: b for start, b in blocks.items() if inner[0] <= start <= inner[1]}
    mask = max(groups.values(), key=lambda b: b.count("FSEL")).start
    rescaling = max(groups.values(), key=lambda b: b.count("FMUL")).start
    around = sass.path(groups, [scores, context, scores])[1:]  # a group that all queries see
    masked = sass.path(groups, [scores, mask, context, scores])[1:]
    rescaled = sass.path(groups, [scores, rescaling, context, scores])[1:]
    none = sass.path({start: b for start, b in groups.items() if start not in products}, [inner[0], inner[0]])[1:]

    body = {start: b for start, b in blocks.items() if outer[0] <= start <= outer[1] and start not in products}
    band_copy = max((b for b in body.values() if b.count("LDGSTS")), key=lambda b: b.count("LDGSTS")).start
    without = {start: b for start, b in body.items() if start == band_copy or not b.count("LDGSTS")}
    tile = _opcodes(sass.path(without, [outer[0], band_copy, inner[0], outer[1]]))
    tile.update(_opcodes(none * (tiling.tile_keys // tiling.group_keys - 1)))
    few: Counter[str] = Counter()
    if tiling.few_keys:
        few.update(_few(blocks, without, outer, inner, band_copy))
        few.subtract(tile)
    once = _once(blocks, outer, case, tiling)
    once.update(_difference(rescaled, around))
    return WarpCosts(once, tile, _difference(around, none), _difference(masked, none), few)


def _few(
    blocks: dict[int, Block],
    body: dict[int, Block],
    outer: tuple[int, int],
    inner: tuple[int, int],
    band_copy: int,
) -> Counter[str]:
    """Count a tile of few slots, which is followed by one of the band; `body` has the blocks without products."""
    outside = {start: b for start, b in blocks.items() if outer[0] <= start <= outer[1]}
    outside = {start: b for start, b in outside.items() if not inner[0] <= start <= inner[1]}
    products = {start: b for start, b in outside.items() if b.count("HMMA")}
    allowed = {start: b for start, b in body.items() if start in outside} | products
    scores, context = sorted(products, key=lambda start: products[start].count("MUFU"))
    return _opcodes(sass.path(allowed, [outer[0], band_copy, scores, context, outer[1]]))


def _difference(longer: Iterable[Block], shorter: Iterable[Block]) -> Counter[str]:
    """Opcodes of one path less those of another, which may leave a negative number of some."""
    result = _opcodes(longer)
    result.subtract(_opcodes(shorter))
    return result


def _once(blocks: dict[int, Block], outer: tuple[int, int], case: Case, tiling: Tiling) -> Counter[str]:
    """Count what comes before and after the tiles: tables, copies of queries and first tile; and the output."""
    before = {start: b for start, b in blocks.items() if start <= outer[0]}
    votes = sorted(b.start for b in before.values() if b.count("VOTE"))
    first_copy = max(before.values(), key=lambda b: b.count("LDGSTS")).start
    first = sass.path(before, [0, *votes, first_copy, outer[0]])[:-1]
    inside = {start: b for start, b in blocks.items() if outer[0] <= start <= outer[1]}
    leaving = max(start for start, b in inside.items() if any(t > outer[1] for t in b.following))
    after = {start: b for start, b in blocks.items() if start > outer[1] or start == leaving}
    stores = next(b for b in after.values() if any(re.match(r"STG\b.*\.128", name) for name in b.opcodes))
    staged = max(after.values(), key=lambda b: b.count("STS"))
    end = next(b.start for b in sorted(after.values(), key=lambda b: b.start) if b.opcodes[-1] == "EXIT")
    last = sass.path(after, [leaving, staged.start, stores.start, end])[1:]
    rounds = tiling.warp_queries * case.head_size // 8 // 32  # of 16-byte stores of a warp
    again = sass.path(after, [stores.start, stores.start])[1:]
    result = _opcodes([*first, *last])
    for name, count in _opcodes(again).items():
        result[name] += count * (rounds - 1)
    return result


def _opcodes(blocks: Iterable[Block]) -> Counter[str]:
    return Counter(name for block in blocks for name in block.opcodes)


def _shared_passes(opcodes: Counter[str]) -> int:
    """Return the accesses of 128 bytes of shared memory that the instructions of a warp take, without conflicts."""
    passes = 0
    for name, count in opcodes.items():
        opcode, *suffixes = name.split(".")
        if opcode == "LDSM":
            passes += 4 * count  # four matrices of 8 rows of 16 bytes
        elif opcode in ("LDGSTS", "LDS", "STS"):
            passes += count * (4 if "128" in suffixes else 2 if "64" in suffixes else 1)
    return passes


def row(architecture: str, code: str, registers: int, case: Case, tiling: Tiling) -> dict[str, Any]:
    """Return the resources of a case on a GPU: totals over all blocks, and the microseconds that they imply."""
    gpu = GPUS[architecture]
    opcodes = warp_costs(code, case, tiling).total(tiling.work(case))
    heads = case.batch * case.heads
    blocks = heads * -(-case.seqlen // tiling.block_queries)
    resident = resident_blocks(architecture, registers, tiling.threads, tiling.shared_bytes(case))
    totals = {
        "instructions": heads * opcodes.total(),
        "shared_bytes": heads * _shared_passes(opcodes) * SHARED_BYTES,
        "l2_bytes": heads * tiling.l2_bytes(case),
        "tensor_flops": heads * _count(opcodes, "HMMA") * 2 * 16 * 8 * 16,
        "exponentials": heads * _count(opcodes, "MUFU") * 32,
    }
    rates = {
        "instructions": gpu.multiprocessors * ISSUE * gpu.clock,
        "shared_bytes": gpu.multiprocessors * SHARED_BYTES * gpu.clock,
        "l2_bytes": gpu.l2_bytes,
        "tensor_flops": gpu.tensor_flops,
        "exponentials": gpu.multiprocessors * EXPONENTIALS * gpu.clock,
    }
    return {
        "gpu": gpu.name,
        "queries": tiling.block_queries,
        "batch": case.batch,
        "tokens": case.seqlen,
        "registers": registers,
        "blocks": blocks,
        "blocks_per_wave": resident * gpu.multiprocessors,
        "waves": blocks / (resident * gpu.multiprocessors),
        "per_block": {name: total / blocks for name, total in totals.items()},
        "us": {name: 1e6 * total / rate for name, total in totals.items() if (rate := rates[name]) is not None},
    }


def _count(opcodes: Counter[str], opcode: str) -> int:
    return sum(count for name, count in opcodes.items() if name.split(".")[0] == opcode)


def report(library: Path) -> list[dict[str, Any]]:
    """Return the rows of all GPUs, cases and tilings, for head size 64."""
    resources = sass.resources(library)
    codes = {architecture: sass.machine_code(library, architecture) for architecture in GPUS}
    return [row for architecture in GPUS for row in rows_of(architecture, codes[architecture], resources)]


def rows_of(
    architecture: str, codes: dict[sass.Kernel, str], resources: dict[sass.Kernel, dict[str, int]]
) -> list[dict[str, Any]]:
    """Return the rows of one architecture's GPU; the arguments are those of `budgets`."""
    rows = []
    for tiling in (WIDE, NARROW):
        key = _find(codes, 64, tiling)
        if key is not None:
            rows += [row(architecture, codes[key], resources[key]["REG"], case, tiling) for case in CASES]
    return rows


def _find(codes: dict[sass.Kernel, str], head_size: int, tiling: Tiling) -> sass.Kernel | None:
    name = KERNEL.format(head_size=head_size, row_tiles=tiling.row_tiles)
    return next((key for key in codes if name in key[1]), None)


def budgets(codes: dict[sass.Kernel, str], resources: dict[sass.Kernel, dict[str, int]]) -> list[dict[str, Any]]:
    """Return for each architecture, head size and tiling what a thread, a warp and a block take.

    Args:
        codes, resources: of `sass.machine_code` and `sass.resources`.
    """
    rows = []
    for architecture in sorted({architecture for architecture, _ in codes}, key=lambda name: int(name[3:])):
        own = {key: code for key, code in codes.items() if key[0] == architecture}
        for head_size, tiling in itertools.product(HEAD_SIZES, (WIDE, NARROW)):
            key = _find(own, head_size, tiling)
            if key is None:
                continue
            used, case = resources[key], Case(4096, 256, 1, 1, 1, "fp16", head_size)
            costs = warp_costs(own[key], case, tiling)
            rows.append(
                {
                    "architecture": architecture,
                    "head_size": head_size,
                    "queries": tiling.block_queries,
                    "registers": used["REG"],
                    "local_bytes": used["LOCAL"] + used["STACK"],
                    "HMMA": _count(costs.whole, "HMMA"),
                    "LDSM": _count(costs.whole, "LDSM"),
                    "LDGSTS": _count(costs.tile, "LDGSTS"),
                    "tile": costs.tile.total(),
                    "whole": costs.whole.total(),
                    "group": costs.group.total(),
                    "few": costs.few.total(),
                    "once": costs.once.total(),
                    "resident_blocks": resident_blocks(
                        architecture, used["REG"], tiling.threads, tiling.shared_bytes(case)
                    ),
                }
            )
    return rows


UNITS = {"instructions": 1, "shared_bytes": 1e3, "l2_bytes": 1e3, "tensor_flops": 1e6, "exponentials": 1e3}
BUDGET_HEADER = ["architecture", "head size", "queries", "registers", "local bytes", "HMMA", "LDSM", "LDGSTS"]
BUDGET_HEADER += ["instructions of a tile", "of a whole group", "of another", "of a group of few slots", "once"]
BUDGET_HEADER += ["resident blocks"]
HEADER = [
    "GPU",
    "queries",
    "batch",
    "tokens",
    "instructions",
    "shared KB",
    "L2 KB",
    "MFLOP",
    "thousand exp",
    "blocks",
    "a wave",
]
HEADER += ["waves", "issue µs", "shared µs", "L2 µs", "tensor µs", "exp µs"]


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table: resources of a block, blocks, and microseconds."""
    lines = []
    for r in rows:
        line = [r["gpu"], str(r["queries"]), str(r["batch"]), f"{r['tokens']:,}"]
        line += [f"{r['per_block'][name] / unit:,.0f}" for name, unit in UNITS.items()]
        line += [f"{r['blocks']:,}", str(r["blocks_per_wave"]), f"{r['waves']:.2f}"]
        line += [f"{r['us'][name]:.1f}" if name in r["us"] else "not known" for name in UNITS]
        lines.append(line)
    return markdown(HEADER, lines)


def budget_table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table of the rows of `budgets`."""
    return markdown(BUDGET_HEADER, [list(map(str, row.values())) for row in rows])


def edge_table() -> str:
    """Make a Markdown table of the share of the products that no query sees, at 4,096 tokens, one of them global."""
    lines = []
    for tiling, window in itertools.product((WIDE, NARROW), (256, 128, 64)):
        share = tiling.unseen(Case(4096, window, 1, 1, 1, "fp16"))
        lines.append([str(tiling.block_queries), str(window), f"{share:.1%}"])
    return markdown(["queries", "window", "products of 16 queries and 16 keys that no query sees"], lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Make a Markdown table."""
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *lines])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="default: the installed plugin's")
    parser.add_argument("--budgets", action="store_true", help="print what a warp takes, for each architecture")
    parser.add_argument("--edges", action="store_true", help="print what is computed in vain; needs no library")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    options = parser.parse_args()
    if options.edges:
        print(edge_table(), end="")
        return
    if sass.TOOL is None:
        parser.exit(1, "cuobjdump is not installed; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm\n")
    try:
        library = options.library or plugin.library()
    except LfxError as error:
        parser.exit(1, f"{error}\n")
    if options.budgets:
        rows = budgets(sass.machine_code(library), sass.resources(library))
    else:
        rows = report(library)
    as_table = budget_table if options.budgets else table
    print("\n".join(map(json.dumps, rows)) if options.json else as_table(rows), end="")


if __name__ == "__main__":
    main()
