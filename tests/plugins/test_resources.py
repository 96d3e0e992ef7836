"""The counts of scripts/bench/kernel_resources.py: paths through machine code, and the tiles that a kernel visits."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from scripts.bench import band_cases, global_join, kernel_resources, sass
from scripts.bench.band_cases import NARROW, WIDE, Tiling
from scripts.bench.global_join import Rows
from scripts.bench.kernel_resources import WarpCosts
from scripts.bench.launch import Kernels
from scripts.bench.sass import Block
from tests.plugins.build import PLUGINS


def disassembly(*lines: str) -> str:
    """Machine code as cuobjdump prints it, an instruction every 16 bytes."""
    return "".join(f"        /*{16 * i:04x}*/    {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))


CODE = disassembly(
    "MOV R1, R2",
    "BRA.DIV ~URZ, 0x90",  # 0x10: not taken
    "LDS R3, [R1]",  # 0x20: the loop
    "@P0 BRA 0x60",
    "HMMA.16816.F32 R0, R1, R2, R3",
    "CALL.REL.NOINC 0x90",  # 0x50: returns
    "@P4 CALL.REL.NOINC 0x80",  # 0x60: leaves the loop
    "BRA 0x20",
    "EXIT",  # 0x80
    "RET.REL.NODEC R2",  # 0x90: not reached
)


def test_basic_blocks_end_at_branches_and_targets() -> None:
    blocks = sass.basic_blocks(CODE)
    assert {start: block.opcodes for start, block in blocks.items()} == {
        0x0: ("MOV", "BRA.DIV"),
        0x20: ("LDS", "BRA"),
        0x40: ("HMMA.16816.F32", "CALL.REL.NOINC"),
        0x60: ("CALL.REL.NOINC",),
        0x70: ("BRA",),
        0x80: ("EXIT",),
    }
    assert blocks[0x20].following == (0x40, 0x60)
    assert blocks[0x60].following == (0x70, 0x80)
    assert blocks[0x80].following == ()
    assert blocks[0x40].count("HMMA") == 1
    assert sass.loops(blocks) == [(0x20, 0x70)]


def starts(path: list[Block]) -> list[int]:
    """The addresses of the blocks of a path."""
    return [block.start for block in path]


def test_a_path_is_the_shortest_one_through_its_stops() -> None:
    blocks = sass.basic_blocks(CODE)
    assert starts(sass.path(blocks, [0x0, 0x80])) == [0x0, 0x20, 0x60, 0x80]
    assert starts(sass.path(blocks, [0x0, 0x40, 0x80])) == [0x0, 0x20, 0x40, 0x60, 0x80]
    assert starts(sass.path(blocks, [0x40, 0x40])) == [0x40, 0x60, 0x70, 0x20, 0x40]  # around the loop
    with pytest.raises(ValueError, match="no path from 0x80 to 0x0"):
        sass.path(blocks, [0x80, 0x0])


@pytest.mark.parametrize("tiling", [WIDE, NARROW])
@pytest.mark.parametrize("seqlen", [64, 300, 1100, 4096])
@pytest.mark.parametrize("globals_", [0, 1, 20, 40, 70])
def test_groups_cover_the_band_of_each_warp(seqlen: int, globals_: int, tiling: Tiling) -> None:
    work = tiling.work(band_cases.Case(seqlen, 256, globals_, 1, 1, "fp16"))
    groups = whole = unseen = 0
    for first in range(0, seqlen, tiling.warp_queries):
        block = first // tiling.block_queries * tiling.block_queries
        end = min(min(block + tiling.block_queries, seqlen) + 256, seqlen)
        for group in range(max(block - 256, 0), end, 32):
            keys = [key for key in range(group, group + 32) if globals_ <= key < end]
            seen = [[abs(key - query) <= 256 for key in keys] for query in range(first, first + tiling.warp_queries)]
            groups += any(map(any, seen))
            whole += len(keys) == 32 and all(map(all, seen))
            for tile, half in product(range(0, tiling.warp_queries, 16), (group, group + 16)):
                columns = [at for at, key in enumerate(keys) if half <= key < half + 16]
                needed = any(row[at] for row in seen[tile : tile + 16] for at in columns)
                unseen += any(map(any, seen)) and not needed
        groups += -(-globals_ // 32)
    assert work["whole"] == whole
    assert work["whole"] + work["groups"] + work["few"] == groups
    assert work["few"] == (-(-seqlen // tiling.warp_queries) if tiling is WIDE and globals_ in (1, 70) else 0)
    assert work["unseen"] == unseen


@pytest.mark.parametrize(("tiling", "rows", "megabytes"), [(WIDE, 641, 595), (NARROW, 577, 992)])
def test_a_block_reads_the_rows_of_the_readme(tiling: Tiling, rows: int, megabytes: int) -> None:
    case = band_cases.Case(4096, 256, 1, 8, 12, "fp16")
    assert tiling.block_queries + 2 * case.window + case.globals == rows
    assert 8 * 12 * tiling.l2_bytes(case) == pytest.approx(megabytes * 1e6, rel=0.01)


@pytest.mark.parametrize(("tiling", "tiles"), [(WIDE, 10), (NARROW, 9)])
def test_a_warp_in_the_middle_computes_fifteen_groups_whole(tiling: Tiling, tiles: int) -> None:
    step = tiling.block_queries
    long, longer = (tiling.work(band_cases.Case(n, 256, 1, 1, 1, "fp16")) for n in (4096, 4096 + step))
    more = Counter(longer)
    more.subtract(long)  # a block of four warps in the middle
    assert more["warps"] == 4
    assert more["tiles"] == 4 * (tiles + 1)
    assert more["whole"] + more["groups"] + more["few"] == 4 * (17 + 1)  # 544 keys, and the global token
    assert more["whole"] == 4 * 15
    assert more["few"] == (4 if tiling is WIDE else 0)


def test_the_edges_of_the_band_cost_the_share_of_the_readme() -> None:
    header, rule, *lines = kernel_resources.edge_table().splitlines()
    assert lines[:3] == ["| 128 | 256 | 2.8% |", "| 128 | 128 | 5.2% |", "| 128 | 64 | 9.0% |"]
    assert len({line.count("|") for line in (header, rule, *lines)}) == 1


def test_totals_add_up_over_warps_tiles_and_groups() -> None:
    costs = WarpCosts(*(Counter({name: 1, "MOV": 1}) for name in ("once", "tile", "whole", "group", "few")))
    total = costs.total(Counter(warps=1, tiles=10, whole=100, groups=1000, few=10000))
    assert total == Counter(MOV=11111, once=1, tile=10, whole=100, group=1000, few=10000)


def test_shared_memory_serves_128_bytes_at_a_time() -> None:
    opcodes = Counter({"LDSM.16.M88.4": 1, "LDGSTS.E.BYPASS.128": 10, "LDS": 100, "STS.64": 1000, "LDG.E.128": 7})
    assert kernel_resources._shared_passes(opcodes) == 4 + 40 + 100 + 2000


def test_resident_blocks_follow_registers_and_shared_memory() -> None:
    assert kernel_resources.resident_blocks("sm_90", 128, 128, 41_292) == 4
    assert kernel_resources.resident_blocks("sm_90", 129, 128, 41_292) == 3
    assert kernel_resources.resident_blocks("sm_120", 128, 128, 41_292) == 2
    assert NARROW.shared_bytes(band_cases.Case(4096, 256, 1, 1, 12, "fp16")) == 41_292
    assert WIDE.shared_bytes(band_cases.Case(4096, 256, 1, 1, 12, "fp16")) == 49_748


def test_the_table_has_a_cell_for_each_resource_and_says_what_is_not_known() -> None:
    row = {
        "gpu": "RTX 5090",
        "queries": 64,
        "batch": 1,
        "tokens": 4096,
        "blocks": 768,
        "blocks_per_wave": 340,
        "waves": 768 / 340,
        "per_block": dict.fromkeys(kernel_resources.UNITS, 2e6),
        "us": {name: 1.25 for name in kernel_resources.UNITS if name != "l2_bytes"},
    }
    header, rule, line = kernel_resources.table([row]).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    assert "| RTX 5090 | 64 | 1 | 4,096 | 2,000,000 | 2,000 | 2,000 | 2 | 2,000 | 768 | 340 | 2.26 | 1.2 |" in line
    assert "not known" in line


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (Rows(1, 4096, 12, 1, 768), 128),  # tiles of 32 keys, one in each part
        (Rows(1, 16384, 12, 1, 768), 256),
        (Rows(8, 16384, 12, 1, 768), 32),
        (Rows(1, 4096, 64, 12, 64), 5),  # four blocks of queries for each head
        (Rows(1, 31, 1, 1, 768), 1),
        (Rows(264, 4096, 1, 1, 64), 1),
    ],
)
def test_the_parts_of_global_attention_are_those_of_the_kernel(rows: Rows, parts: int, emulated: Kernels) -> None:
    assert global_join.parts(rows) == parts
    sizes = (rows.batch, rows.queries, rows.heads, rows.head_size)
    assert parts * rows.batch * rows.heads * rows.queries * (rows.head_size + 2) * 4 <= emulated.workspace_bytes(*sizes)


def test_the_split_has_the_constants_of_the_kernel() -> None:
    source = (PLUGINS / "global" / "block.cuh").read_text(encoding="utf-8")
    assert f"kTARGET_BLOCKS = {global_join.TARGET_BLOCKS};" in source
    assert f"kQUERIES = {global_join.BLOCK_QUERIES};" in source
    assert f"kSMALL_HEAD_SIZE = {global_join.SMALL_HEAD_SIZE};" in source


def test_the_last_block_is_no_faster_than_the_second_kernel() -> None:
    for architecture in global_join.ARCHITECTURES:
        gpu = kernel_resources.GPUS[architecture]
        for rows in global_join.CASES:
            for levels in (1, 2):
                last = global_join.NODE_US + global_join.last_block_us(rows, gpu, levels)
                assert last >= 0.98 * global_join.second_kernel_us(rows, gpu)
    assert "| H100 SXM | 1 | 4,096 | 12 | 1 | 768 | 128 | 4,768 | 3.1 | 42.7 | 9.3 |" in global_join.table()


def test_the_benchmarks_choose_the_blocks_that_the_launch_chooses() -> None:
    source = (PLUGINS / "banded" / "banded_attention.cu").read_text(encoding="utf-8")
    assert f"kBLOCKS_TO_OCCUPY = {band_cases.BLOCKS_TO_OCCUPY};" in source
