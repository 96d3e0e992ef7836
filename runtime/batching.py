"""Groups sequences of mixed length into batches with little padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Tokens of a batch, padding included: enough work for many CPU threads; 1 GB of activations of longformer-base.
TOKEN_BUDGET = 8192
# Fixed cost of one batch, as the number of tokens that take the same time.
BATCH_COST = 64


def batches(
    lengths: Sequence[int],
    budget: int,
    supports_shape: Callable[[int, int], bool] = lambda batch, seqlen: True,
    *,
    pad: bool = True,
) -> list[list[int]]:
    """Group sequences into batches at the lowest total cost: tokens, padding and the fixed cost of each batch.

    Args:
        lengths: number of tokens of each sequence, 1 or more.
        budget: largest number of tokens of a batch, padding included. A longer sequence is a batch of its own.
        supports_shape: (batch, seqlen) -> whether the backend takes that shape. Batch sizes are tried in ascending
            order up to the first one that it does not take.
        pad: whether sequences of different lengths may be in one batch.
    Returns:
        One list of indices into `lengths` for each batch, shortest sequences first; each index occurs once. The result
        depends on the arguments alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    # Dynamic programming over the sorted sequences. cost[n] is the lowest cost of the n shortest sequences; their last
    # batch begins at first[n].
    cost, first = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    max_size: dict[int, int] = {}  # length of the longest sequence -> largest batch size
    equal = 0  # number of sequences up to this one that have its length
    for n, longest in enumerate((lengths[i] for i in order), 1):
        equal = equal + 1 if n > 1 and lengths[order[n - 2]] == longest else 1
        if longest not in max_size:
            by_budget = max(min(budget // longest, len(order)), 1)
            max_size[longest] = next((m for m in range(1, by_budget) if not supports_shape(m + 1, longest)), by_budget)
        lowest = n - min(max_size[longest], n if pad else equal)
        costs = cost[lowest:n] + BATCH_COST + longest * np.arange(n - lowest, 0, -1)
        first[n] = lowest + int(costs.argmin())
        cost[n] = costs[first[n] - lowest]
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        groups.append(order[first[end] : end])
        end = int(first[end])
    return groups[::-1]
