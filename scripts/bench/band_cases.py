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
    """Return all cases, those of the claims first; in each part fp16 of the base model, then bf16, then 16 heads.

    Of the cases of the claims, the two lengths that the claims on the model have come first.
    """
    all_cases = [
        Case(seqlen, window, globals_, batch, heads, precision)
        for heads, precision, batch, globals_, window, seqlen in itertools.product(
            (12, 16), ("fp16", "bf16"), (8, 1), (1, 0, 64), (256, 64), LENGTHS
        )
    ]
    required = sorted((c for c in all_cases if c.required), key=lambda case: case.seqlen not in (4096, 16384))
    return required + [c for c in all_cases if not c.required and not quick]


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
    def few_keys(self) -> int:
        """Number of global tokens of a tile up to which they are a group of their own."""
        return 16 if self.row_tiles > 1 else 0

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
        """Return the bytes of the rows, and of the key mask, that all blocks of one head read and write."""
        first = np.arange(0, case.seqlen, self.block_queries)
        begin = np.maximum(first - case.window, 0)
        end = np.minimum(np.minimum(first + self.block_queries, case.seqlen) + case.window, case.seqlen)
        keys = int((end - begin).sum())
        rows = 2 * (keys + case.globals * len(first)) + 2 * case.seqlen
        return rows * 2 * case.head_size + 4 * (keys + case.seqlen)

    def work(self, case: Case) -> Counter[str]:
        """Return over all warps of one head: warps, tiles, whole groups, other groups, and groups of few slots.

        All queries of the warp see a whole group. A group of few slots has `few_keys` keys. "unseen" is the number of
        products of 16 queries and 16 keys in the groups of the band that no query of the 16 sees.
        """
        total: Counter[str] = Counter()
        blocks = np.arange(0, case.seqlen, self.block_queries)
        begin = np.maximum(blocks - case.window, 0)
        end = np.minimum(np.minimum(blocks + self.block_queries, case.seqlen) + case.window, case.seqlen)
        tiles = -(-(end - begin) // self.tile_keys)
        warps = np.arange(0, case.seqlen, self.warp_queries)
        block = warps // self.block_queries
        total["warps"] = len(warps)
        total["tiles"] = int(tiles[block].sum()) + len(warps) * -(-case.globals // self.tile_keys)
        few = 0 < case.globals % self.tile_keys <= self.few_keys
        total["few"] = len(warps) * few
        total["groups"] = len(warps) * (-(-case.globals // self.group_keys) - few)
        for group in range(int(tiles.max()) * self.tile_keys // self.group_keys):
            first = begin[block] + group * self.group_keys
            visible = _is_seen(case, warps, self.warp_queries, first, self.group_keys, end[block])
            distance = first - (warps - case.window)
            whole = (distance >= self.warp_queries - 1) & (distance + self.group_keys - 1 <= 2 * case.window)
            whole &= visible & (first >= case.globals) & (first + self.group_keys <= end[block])
            total["whole"] += int(whole.sum())
            total["groups"] += int((visible & ~whole).sum())
            # The operands of mma are 16 queries and, in pairs, 16 keys.
            for query, key in itertools.product(range(0, self.warp_queries, 16), range(0, self.group_keys, 16)):
                needed = _is_seen(case, warps + query, 16, first + key, 16, end[block])
                total["unseen"] += int((visible & ~needed).sum())
        return total

    def unseen(self, case: Case) -> float:
        """Return the share of the products of 16 queries and 16 keys of the band that no query of the 16 sees."""
        work = self.work(case)
        products = (work["whole"] + work["groups"]) * self.row_tiles * self.group_keys // 16
        return work["unseen"] / (products + work["few"] * self.row_tiles)


def _is_seen(case: Case, query: Any, queries: int, key: Any, keys: int, end: Any) -> Any:
    """Return whether one of `queries` queries sees one of `keys` local keys, both from the given ones on."""
    last = np.minimum(query + queries - 1 + case.window, end - 1)
    return (key <= last) & (key + keys > np.maximum(query - case.window, case.globals))


WIDE, NARROW = Tiling(2), Tiling(1)
BLOCKS_TO_OCCUPY = 2  # kBLOCKS_TO_OCCUPY of plugins/banded/banded_attention.cu


def tiling_of(case: Case) -> Tiling:
    """Return the tiling of the kernel for warps on an H100; follows plugins/banded/banded_attention.cu."""
    blocks = case.batch * case.heads * -(-case.seqlen // WIDE.block_queries)
    return WIDE if blocks >= BLOCKS_TO_OCCUPY * MULTIPROCESSORS else NARROW


def kernel_costs(case: Case) -> dict[str, float]:
    """Return the costs of our kernel's tiling.

    Returns:
        block_queries: number of queries of a block.
        computed_over_useful: number of pairs in the computed groups of keys, over the useful pairs; the band skips
            groups of global tokens only.
        l2_bytes: bytes of the key, value, query and context rows, and of the key mask, that all blocks transfer.
        shared_bytes: bytes that ldmatrix reads and cp.async writes, on compute capability 9.0.
    """
    tiling, size = tiling_of(case), case.head_size
    work = tiling.work(case)
    groups = work["whole"] + work["groups"]
    columns = groups * tiling.group_keys + work["few"] * tiling.few_keys
    first = np.arange(0, case.seqlen, tiling.block_queries)
    keys = np.minimum(first + tiling.block_queries + case.window, case.seqlen) - np.maximum(first - case.window, 0)
    copied = tiling.tile_keys * -(-keys // tiling.tile_keys) + tiling.group_keys * -(-case.globals // tiling.group_keys)
    # Columns of the queries that stay in registers.
    kept = min(size, 48 if tiling is WIDE else 64) if size <= 64 else 0
    again = (groups + work["few"]) * tiling.warp_queries * (size - kept)  # numbers of queries that warps load
    heads = case.batch * case.heads
    return {
        "block_queries": tiling.block_queries,
        "computed_over_useful": columns * tiling.warp_queries / useful_pairs(case),
        "l2_bytes": float(heads * tiling.l2_bytes(case)),
        "shared_bytes": float(heads * (2 * (2 * columns * size + again) + copied.sum() * 4 * size)),
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
