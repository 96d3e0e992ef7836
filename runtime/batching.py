"""Documents of mixed length: which of them run together, so that little is computed for padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Padded tokens of a batch: enough to fill two CPU threads many times over, 1 GB of activations in the base shape.
TOKEN_BUDGET = 8192
# What starting one more batch costs, in tokens' worth of computing.
BATCH_COST = 64


def batches(
    lengths: Sequence[int], budget: int, takes: Callable[[int, int], bool] = lambda batch, seqlen: True
) -> list[list[int]]:
    """Put sequences together so that the least is computed in all, padding and starts of batches included.

    Args:
        lengths: of the sequences, tokens.
        budget: most tokens of a batch, padding included; a sequence longer than that is a batch of its own.
        takes: whether the backend takes a batch of so many sequences of so many tokens.
    Returns:
        Indices into `lengths`, each once, the shortest sequences first. The same lengths give the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    # best[n]: the least cost of the n shortest sequences, and where the last batch of them begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for n in range(1, len(order) + 1):
        longest = lengths[order[n - 1]]
        candidates = []
        for first in range(n - 1, -1, -1):
            count = n - first
            if count > 1 and (count * longest > budget or not takes(count, longest)):
                break
            candidates.append((best[first][0] + BATCH_COST + count * longest, first))
        best.append(min(candidates))
    found: list[list[int]] = []
    end = len(order)
    while end > 0:
        first = best[end][1]
        found.append(order[first:end])
        end = first
    return found[::-1]
