"""The cases of the GPU benchmarks: shapes, the work of each, and lower bounds on its time."""

from __future__ import annotations

import itertools
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


def block_queries(case: Case) -> int:
    """Return the number of queries of a block on an H100; follows plugins/banded/banded_attention.cu."""
    return 128 if case.batch * case.heads * -(-case.seqlen // 128) >= 2 * MULTIPROCESSORS else 64


def kernel_costs(case: Case) -> dict[str, float]:
    """Return the costs of our kernel's tiling; follows the loops of the BandedAttention kernel in plugins/.

    Returns:
        computed_over_useful: number of pairs in the computed groups of 32 keys, over the useful pairs; the band skips
            groups of global tokens only.
        l2_bytes: bytes of the key, value, query and context rows that all blocks transfer.
        shared_bytes: bytes that ldmatrix reads and cp.async writes, on compute capability 9.0.
    """
    size, global_groups = case.head_size, -(-case.globals // 32)
    queries = block_queries(case)
    warp_queries = queries // 4
    first = np.arange(0, case.seqlen, queries)
    begin = np.maximum(first - case.window, 0)
    end = np.minimum(np.minimum(first + queries, case.seqlen) + case.window, case.seqlen)
    copied = 64 * -(-(end - begin) // 64) + 32 * global_groups
    warp = np.arange(0, case.seqlen, warp_queries)
    block = warp // queries
    start = np.maximum(np.maximum(warp - case.window, 0), case.globals) - begin[block]
    stop = np.minimum(np.minimum(warp + warp_queries, case.seqlen) + case.window, case.seqlen) - begin[block]
    groups = (np.maximum(-(-stop // 32) - start // 32, 0) + global_groups).sum()
    heads = case.batch * case.heads
    rows = 2 * ((end - begin).sum() + case.globals * len(first)) + 2 * case.seqlen
    # Columns of the queries that stay in registers.
    kept = min(size, 48 if queries == 128 else 64) if size <= 64 else 0
    loaded = 2 * 32 * size + warp_queries * (size - kept)  # numbers that a warp loads for a group
    return {
        "block_queries": queries,
        "computed_over_useful": float(groups) * 32 * warp_queries / useful_pairs(case),
        "l2_bytes": float(heads * rows * 2 * size),
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
