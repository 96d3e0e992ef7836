"""Compare ways to combine the parts of GlobalAttention: a second kernel, as it is, and the last block of each query.

    python -m scripts.bench.global_join

The keys are split over blocks, each of which writes a partial result: headSize + 2 numbers in float32 for each of its
queries. A second kernel reads all of them with blocks for each query and 32 columns, so the whole L2 delivers them, but
it has to be launched. The last block that finishes its part could read them instead (an atomic counter says which block
that is), without a launch, but then one multiprocessor reads the parts of up to 16 queries. In two levels, the last
block of each group of parts combines its group, and the last of these the groups.

A counter has to be zero before a launch. TensorRT's workspace is not: layers and contexts share it. So the last block
needs a memset before the kernel, and in a CUDA graph a memset is a node as a kernel is. A counter that the last block
sets back to zero needs memory of its own for each context and stream, which no host gives the kernels; the last column
of the table assumes it all the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

from scripts.bench.kernel_resources import GPUS, Gpu, markdown
from scripts.checkpoints import LAYERS

# Of plugins/global/block.cuh.
BLOCK_QUERIES, TARGET_BLOCKS, SMALL_HEAD_SIZE = 16, 264, 128
COMBINE_COLUMNS = 32  # of a block of the second kernel
SECTOR = 32  # bytes; the two statistics of a row are read as one
# Bytes that the L2 delivers to one multiprocessor in a clock. Source: from memory of published microbenchmarks of the
# V100 and A100; NVIDIA publishes the rate of the whole L2 only.
MULTIPROCESSOR_L2_BYTES = 64
# Of a node of a CUDA graph that depends on the one before. Source: from memory, about 1 to 2 µs.
NODE_US = 2.0
ARCHITECTURES = ("sm_80", "sm_90")  # whose L2 has a published rate


@dataclass(frozen=True)
class Rows:
    """A call of GlobalAttention: queries of one batch element, heads as wide as `head_size`."""

    batch: int
    seqlen: int
    queries: int
    heads: int
    head_size: int


CASES = [
    # longformer-base with one global token, whose projections are folded; with 64, whose projections are not.
    *(Rows(batch, seqlen, 12, 1, 768) for batch in (1, 8) for seqlen in (4096, 16384)),
    Rows(1, 4096, 64, 12, 64),
]


def parts(rows: Rows) -> int:
    """Return the number of parts of the keys, as `Split` of plugins/global/block.cuh does."""
    tiles = -(-rows.seqlen // (64 if rows.head_size <= SMALL_HEAD_SIZE else 32))
    unsplit = min(-(-rows.queries // BLOCK_QUERIES), TARGET_BLOCKS) * rows.batch * rows.heads
    most = 1 if unsplit >= TARGET_BLOCKS else min(tiles, TARGET_BLOCKS // unsplit)
    return -(-tiles // -(-tiles // most))


def block_bytes(rows: Rows, count: int) -> int:
    """Return the bytes of `count` partial results of the queries of one block."""
    return count * min(rows.queries, BLOCK_QUERIES) * (4 * rows.head_size + SECTOR)


def second_kernel_us(rows: Rows, gpu: Gpu) -> float:
    """Return a lower bound for the second kernel: its launch, and its reads at the rate of the whole L2."""
    assert gpu.l2_bytes is not None
    column_blocks = -(-rows.head_size // COMBINE_COLUMNS)
    read = parts(rows) * rows.batch * rows.heads * rows.queries * (4 * rows.head_size + column_blocks * SECTOR)
    return NODE_US + 1e6 * read / gpu.l2_bytes


def last_block_us(rows: Rows, gpu: Gpu, levels: int = 1) -> float:
    """Return a lower bound for the last block: its reads alone, at the most that one multiprocessor gets."""
    count = parts(rows)
    group = count if levels == 1 else math.isqrt(count)
    read = block_bytes(rows, group) + (0 if levels == 1 else block_bytes(rows, -(-count // group)))
    return 1e6 * read / (MULTIPROCESSOR_L2_BYTES * gpu.clock)


def table(cases: Iterable[Rows] = CASES) -> str:
    """Make a Markdown table of the lower bounds, and of what the faster last block saves in all layers."""
    header = ["GPU", "batch", "tokens", "queries", "heads", "head size", "parts", "KB of a block"]
    header += ["second kernel µs", "memset, last block µs", "memset, two levels µs"]
    header += [f"saved in {LAYERS} layers µs", "without the memset µs"]
    lines = []
    for architecture in ARCHITECTURES:
        gpu = GPUS[architecture]
        for rows in cases:
            bounds = [second_kernel_us(rows, gpu), *(NODE_US + last_block_us(rows, gpu, levels) for levels in (1, 2))]
            saved = bounds[0] - min(bounds[1:])
            line = [gpu.name, str(rows.batch), f"{rows.seqlen:,}", str(rows.queries), str(rows.heads)]
            line += [str(rows.head_size), str(parts(rows)), f"{block_bytes(rows, parts(rows)) / 1e3:,.0f}"]
            line += [f"{bound:.1f}" for bound in bounds]
            lines.append([*line, f"{LAYERS * saved:,.0f}", f"{LAYERS * (saved + NODE_US):,.0f}"])
    return markdown(header, lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table())
