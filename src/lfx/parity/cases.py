"""The cases of a comparison, each an input shape and mask pattern, and their inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

GLOBALS = ("none", "first", "scattered", "adjacent", "all", "ragged")
PADDINGS = ("none", "right", "left", "holes", "empty_row")


@dataclass(frozen=True)
class Case:
    """One input shape and mask pattern.

    Attributes:
        batch: number of rows.
        seqlen: length of the rows with padding, tokens.
        globals: none, first, scattered (4 at random positions), adjacent (up to 5 in a row), all, or ragged (a
            different number in each row).
        padding: none, right, left, holes (random positions), or empty_row (the last row is all padding).
    """

    batch: int
    seqlen: int
    globals: str = "none"
    padding: str = "none"

    def __str__(self) -> str:
        return f"batch {self.batch}, length {self.seqlen}, globals {self.globals}, padding {self.padding}"


def quick_cases(window: int, max_seqlen: int | None, multiple_of: int = 1) -> list[Case]:
    """Return the five cases that validate each export, of about five windows of tokens in total.

    Args:
        window: widest one-sided window, tokens.
        max_seqlen: longest sequence, tokens; None = no limit.
        multiple_of: lengths are rounded up to a multiple, for a torch model that requires one.
    """
    cases = [
        Case(1, 1),
        Case(2, 7, "first", "empty_row"),
        Case(1, max(2, min(window - 1, 64)), "all", "left"),
        Case(2, window + 1, "ragged", "right"),
        Case(1, 2 * window + 4, "scattered", "holes"),
    ]
    return _fit(cases, max_seqlen, multiple_of)


def full_cases(window: int, max_seqlen: int | None, multiple_of: int = 1) -> list[Case]:
    """Return cases for all lengths around multiples of the window, each with all patterns of global tokens.

    Batch sizes and padding patterns alternate over the cases. The arguments are those of `quick_cases`.
    """
    total = 2 * window  # Hugging Face's attention_window, both sides
    lengths = sorted(
        {
            1,
            2,
            window - 1,
            window,
            window + 1,
            total - 1,
            total,
            total + 1,
            2 * total - 1,
            2 * total + 1,
            3 * total,
        }
        - {0}
    )
    paddings = itertools.cycle(PADDINGS)
    batches = itertools.cycle((1, 2, 3, 4, 2, 3))
    cases = [Case(next(batches), length, pattern, next(paddings)) for length in lengths for pattern in GLOBALS]
    return _fit(cases, max_seqlen, multiple_of)


def _fit(cases: Iterable[Case], max_seqlen: int | None, multiple_of: int) -> list[Case]:
    fitted = []
    for case in cases:
        seqlen = -(-case.seqlen // multiple_of) * multiple_of
        if max_seqlen is not None and seqlen > max_seqlen:
            seqlen = max_seqlen // multiple_of * multiple_of
        padding = "none" if case.batch == 1 and case.padding == "empty_row" else case.padding
        fitted.append(Case(case.batch, max(seqlen, 1), case.globals, padding))
    return list(dict.fromkeys(fitted))


def inputs_of(
    case: Case,
    *,
    vocab_size: int,
    pad_token_id: int,
    max_global: int | None = None,
    choices: int | None = None,
    seed: int = 0,
) -> Arrays:
    """Make random ids and the masks of a case.

    Args:
        vocab_size: ids are 0 to vocab_size - 1.
        pad_token_id: the id of padding; the only id if vocab_size is 1.
        max_global: largest number of global tokens in a row; None = no limit.
        choices: for multiple choice, the size of the second axis of all inputs.
        seed: seed of the ids and the positions.
    Returns:
        input_ids, attention_mask, global_attention_mask: (batch, seqlen) or (batch, choices, seqlen) int64.
    """
    rows = case.batch * (choices or 1)
    random = np.random.default_rng([seed, case.seqlen, rows, GLOBALS.index(case.globals)])
    ids = random.integers(0, max(vocab_size - 1, 1), (rows, case.seqlen))
    ids[ids >= pad_token_id] += vocab_size > 1  # skip the padding id
    mask = np.ones_like(ids)
    for row in range(rows):
        _pad_row(mask[row], case.padding, row, last=row == rows - 1, random=random)
    ids = np.where(mask == 1, ids, pad_token_id) if case.padding != "holes" else ids
    global_mask = np.zeros_like(ids)
    for row in range(rows):
        for position in _global_positions(case.globals, row, case.seqlen, random)[:max_global]:
            global_mask[row, position] = 1
    shape = (case.batch, choices, case.seqlen) if choices else (case.batch, case.seqlen)
    return {
        "input_ids": ids.reshape(shape).astype(np.int64),
        "attention_mask": mask.reshape(shape).astype(np.int64),
        "global_attention_mask": global_mask.reshape(shape).astype(np.int64),
    }


def _pad_row(mask: NDArray[Any], padding: str, row: int, *, last: bool, random: np.random.Generator) -> None:
    seqlen = len(mask)
    amount = min(seqlen - 1, seqlen * (1 + row % 3) // 4)
    if padding == "right" and amount:
        mask[-amount:] = 0
    elif padding == "left" and amount:
        mask[:amount] = 0
    elif padding == "holes":
        mask[random.random(seqlen) < 0.2] = 0
    elif padding == "empty_row" and last:
        mask[:] = 0


def _global_positions(pattern: str, row: int, seqlen: int, random: np.random.Generator) -> list[int]:
    if pattern == "none":
        return []
    if pattern == "first":
        return [0]
    if pattern == "all":
        return list(range(seqlen))
    if pattern == "adjacent":
        start = int(random.integers(0, max(seqlen - 4, 1)))
        return list(range(start, min(start + 5, seqlen)))
    count = min(4, seqlen) if pattern == "scattered" else min(3 * row, seqlen)
    return sorted(int(p) for p in random.choice(seqlen, count, replace=False))
