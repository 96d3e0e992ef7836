"""Documents of mixed length: which of them run together, so that little is computed for padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Padded tokens of a batch: enough to fill two CPU threads many times over, 1 GB of activations in the base shape.
TOKEN_BUDGET = 8192
# What starting one more batch costs, in tokens' worth of computing.
BATCH_COST = 64


def batches(
    lengths: Sequence[int],
    budget: int,
    supports_shape: Callable[[int, int], bool] = lambda batch, seqlen: True,
    *,
    pad: bool = True,
) -> list[list[int]]:
    """Put sequences together so that the least is computed in all, padding and starts of batches included.

    Args:
        lengths: of the sequences, tokens.
        budget: most tokens of a batch, padding included; a sequence longer than that is a batch of its own.
        supports_shape: whether the backend takes a batch of so many sequences of so many tokens; the first size that it
            does not take ends the search for larger ones.
        pad: whether sequences of different lengths may run together.
    Returns:
        Indices into `lengths`, each once, the shortest sequences first. The same lengths give the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    # cost[n]: the least cost of the n shortest sequences. first[n]: where the last batch of them begins.
    cost, first = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    most: dict[int, int] = {}  # sequences of a batch with this longest one
    equal = 0
    for n, longest in enumerate((lengths[i] for i in order), 1):
        equal = equal + 1 if n > 1 and lengths[order[n - 2]] == longest else 1
        if longest not in most:
            by_budget = max(min(budget // longest, len(order)), 1)
            most[longest] = next((m for m in range(1, by_budget) if not supports_shape(m + 1, longest)), by_budget)
        lowest = n - min(most[longest], n if pad else equal)
        costs = cost[lowest:n] + BATCH_COST + longest * np.arange(n - lowest, 0, -1)
        first[n] = lowest + int(costs.argmin())
        cost[n] = costs[first[n] - lowest]
    found: list[list[int]] = []
    end = len(order)
    while end > 0:
        found.append(order[first[end] : end])
        end = int(first[end])
    return found[::-1]
