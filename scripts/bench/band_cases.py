"""The cases of the GPU benchmarks: shapes, the work of each, and lower bounds on its time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.checkpoints import HEADS, HIDDEN, INTERMEDIATE, LAYERS, WINDOW

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Peaks:
    """Published peak rates of a GPU, per second: 16-bit tensor FLOP, memory bytes, exponentials, shared bytes."""

    flops: float
    bytes: float
    exponentials: float
    shared_bytes: float


# Source: NVIDIA's H100 and H200 datasheets (SXM, dense: half of the figure with sparsity); exponentials: Shah et al.
# 2024, arXiv:2407.08608, section 3.1; shared memory: 32 banks of 4 bytes per clock (CUDA programming guide), at the
# 1.83 GHz and 132 multiprocessors from which the exponentials' figure follows.
MULTIPROCESSORS = 132  # of an H100 SXM
HOPPER = {"exponentials": 3.9e12, "shared_bytes": MULTIPROCESSORS * 128 * 1.83e9}
PEAKS = {
    "NVIDIA H100 80GB HBM3": Peaks(989.4e12, 3.35e12, **HOPPER),
    "NVIDIA H200": Peaks(989.4e12, 4.8e12, **HOPPER),
}


@dataclass(frozen=True)
class Case:
    """One shape: the first `globals` tokens of each row are global; `window` is one-sided, in tokens."""

    seqlen: int
    window: int
    globals: int
    batch: int
    heads: int
    precision: str
    head_size: int = 64

    @property
    def required(self) -> bool:
        """Whether a claim includes the case."""
        return self.seqlen >= 4096 and self.window == 256 and self.globals == 1

    def __str__(self) -> str:
        return f"{self.precision} {self.batch}x{self.heads}x{self.seqlen} window {self.window} globals {self.globals}"


def cases(quick: bool = False) -> list[Case]:
    """Return all cases, those of the claims first; in each part fp16 of the base model, then bf16, then 16 heads."""
    all_cases = [
        Case(seqlen, window, globals_, batch, heads, precision)
        for heads, precision, batch, globals_, window, seqlen in itertools.product(
            (12, 16), ("fp16", "bf16"), (8, 1), (1, 0, 64), (256, 64), LENGTHS
        )
    ]
    return [c for c in all_cases if c.required] + [c for c in all_cases if not c.required and not quick]


def band_or_global(window: int, globals_: int) -> Callable[..., Any]:
    """Return FlexAttention's mask function: keys at most `window` tokens away, and the first `globals_` keys."""
    if globals_ == 0:
        return lambda batch, head, query, key: (query - key).abs() <= window
    return lambda batch, head, query, key: ((query - key).abs() <= window) | (key < globals_)


def useful_pairs(case: Case) -> int:
    """Return the number of unmasked (local query, key) pairs of one head and one batch row."""
    query = np.arange(case.globals, case.seqlen)
    first = np.maximum(query - case.window, case.globals)
    last = np.minimum(query + case.window, case.seqlen - 1)
    return int((case.globals + last - first + 1).sum())


def useful_flops(case: Case) -> int:
    """Return the floating-point operations of both matrix products over the useful pairs."""
    return 4 * case.head_size * useful_pairs(case) * case.heads * case.batch


def base_model_flops(seqlen: int, globals_: int, batch: int = 1) -> tuple[int, int]:
    """Return the floating-point operations of the base model's linear layers, and of its attention's useful pairs."""
    linear = 2 * LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * INTERMEDIATE) * seqlen * batch
    return linear, LAYERS * useful_flops(Case(seqlen, WINDOW, globals_, batch, HEADS, "fp16"))


def least_bytes(case: Case) -> int:
    """Return the device memory traffic if each input is read once and the context is written once."""
    row = 2 * case.heads * case.head_size
    slots = max(case.globals, 1)
    return case.batch * (4 * case.seqlen * row + 4 * case.seqlen + slots * (4 + row))


@dataclass(frozen=True)
class Tiling:
    """How the kernel divides its work, in queries and keys."""

    row_tiles: int  # of 16 queries, in a warp
    tile_keys: int = 64
    group_keys: int = 32
    threads: int = 128

    @property
    def warp_queries(self) -> int:
        """Number of queries of a warp."""
        return 16 * self.row_tiles

    @property
    def block_queries(self) -> int:
        """Number of queries of a block."""
        return self.warp_queries * self.threads // 32

    def shared_bytes(self, case: Case) -> int:
        """Return the dynamic shared memory of a block: queries, two tiles of keys and values, and the tables."""
        reach = -(-min(self.block_queries + 2 * case.window, case.seqlen) // self.tile_keys) * self.tile_keys
        rows = self.block_queries + 4 * self.tile_keys
        return 2 * rows * case.head_size + 4 * (self.block_queries + 1 + reach // 32)

    def l2_bytes(self, case: Case) -> int:
        """Return the bytes of the rows that all blocks of one head read and write."""
        first = np.arange(0, case.seqlen, self.block_queries)
        begin = np.maximum(first - case.window, 0)
        end = np.minimum(np.minimum(first + self.block_queries, case.seqlen) + case.window, case.seqlen)
        rows = 2 * int((end - begin).sum() + case.globals * len(first)) + 2 * case.seqlen
        return rows * 2 * case.head_size

    def work(self, case: Case) -> Counter[str]:
        """Return over all warps of one head: warps, tiles, groups that all queries see, and the other groups."""
        total: Counter[str] = Counter()
        blocks = np.arange(0, case.seqlen, self.block_queries)
        begin = np.maximum(blocks - case.window, 0)
        end = np.minimum(np.minimum(blocks + self.block_queries, case.seqlen) + case.window, case.seqlen)
        tiles = -(-(end - begin) // self.tile_keys)
        warps = np.arange(0, case.seqlen, self.warp_queries)
        block = warps // self.block_queries
        total["warps"] = len(warps)
        total["tiles"] = int(tiles[block].sum()) + len(warps) * -(-case.globals // self.tile_keys)
        total["groups"] = len(warps) * -(-case.globals // self.group_keys)
        last = np.minimum(warps + self.warp_queries - 1 + case.window, end[block] - 1)
        for group in range(int(tiles.max()) * self.tile_keys // self.group_keys):
            first = begin[block] + group * self.group_keys
            visible = (first <= last) & (first + self.group_keys > np.maximum(warps - case.window, case.globals))
            distance = first - (warps - case.window)
            whole = (distance >= self.warp_queries - 1) & (distance + self.group_keys - 1 <= 2 * case.window)
            whole &= visible & (first >= case.globals) & (first + self.group_keys <= end[block])
            total["whole"] += int(whole.sum())
            total["groups"] += int((visible & ~whole).sum())
        return total


WIDE, NARROW = Tiling(2), Tiling(1)
BLOCKS_TO_OCCUPY = 2  # kBLOCKS_TO_OCCUPY of plugins/banded/banded_attention.cu


def tiling_of(case: Case) -> Tiling:
    """Return the tiling that an H100 gets; follows plugins/banded/banded_attention.cu."""
    blocks = case.batch * case.heads * -(-case.seqlen // WIDE.block_queries)
    return WIDE if blocks >= BLOCKS_TO_OCCUPY * MULTIPROCESSORS else NARROW


def kernel_costs(case: Case) -> dict[str, float]:
    """Return the costs of our kernel's tiling.

    Returns:
        block_queries: number of queries of a block.
        computed_over_useful: number of pairs in the computed groups of keys, over the useful pairs; the band skips
            groups of global tokens only.
        l2_bytes: bytes of the key, value, query and context rows that all blocks transfer.
        shared_bytes: bytes that ldmatrix reads and cp.async writes, on compute capability 9.0.
    """
    tiling, size = tiling_of(case), case.head_size
    work = tiling.work(case)
    groups = work["whole"] + work["groups"]
    first = np.arange(0, case.seqlen, tiling.block_queries)
    keys = np.minimum(first + tiling.block_queries + case.window, case.seqlen) - np.maximum(first - case.window, 0)
    copied = tiling.tile_keys * -(-keys // tiling.tile_keys) + tiling.group_keys * -(-case.globals // tiling.group_keys)
    # Columns of the queries that stay in registers.
    kept = min(size, 48 if tiling is WIDE else 64) if size <= 64 else 0
    loaded = 2 * tiling.group_keys * size + tiling.warp_queries * (size - kept)  # numbers that a warp loads for a group
    heads = case.batch * case.heads
    return {
        "block_queries": tiling.block_queries,
        "computed_over_useful": groups * tiling.group_keys * tiling.warp_queries / useful_pairs(case),
        "l2_bytes": float(heads * tiling.l2_bytes(case)),
        "shared_bytes": float(heads * (groups * 2 * loaded + copied.sum() * 4 * size)),
    }


def floors(case: Case, peaks: Peaks) -> dict[str, float]:
    """Return lower bounds in microseconds: three for any implementation, the last for our kernel's tiling."""
    pairs = useful_pairs(case) * case.heads * case.batch
    return {
        "arithmetic_us": 1e6 * useful_flops(case) / peaks.flops,
        "bytes_us": 1e6 * least_bytes(case) / peaks.bytes,
        "exponentials_us": 1e6 * pairs / peaks.exponentials,
        "shared_memory_us": 1e6 * kernel_costs(case)["shared_bytes"] / peaks.shared_bytes,
    }
