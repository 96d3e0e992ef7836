"""Compares generated tokens; a difference is allowed only where two candidates are closer than rounding."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from lfx.runtime.generation import GenerationSettings
from lfx.runtime.generation.rules import log_softmax, rules

ROUNDING = 2e-4  # of scores of order 10 in float32, through two layers


def check_same(ours: Any, theirs: Any, model: Any, feeds: dict[str, Any], settings: GenerationSettings) -> bool:
    """Whether the tokens are equal. If they are not, assert that the scores of both in float64 are a tie."""
    if ours.shape == theirs.shape and (ours == theirs).all():
        return True
    assert ours.shape[0] == theirs.shape[0]
    exact = copy.deepcopy(model).double()
    copies = ours.shape[0] // len(feeds["input_ids"])
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        width = min(len(a), len(b))
        if (a[:width] == b[:width]).all() and (a[width:] == settings.pad_token_id).all():
            continue
        gap = _gap(exact, feeds, settings, row // copies, a, b)
        assert gap < ROUNDING, (
            f"row {row}: {a.tolist()} where Hugging Face has {b.tolist()}; their scores differ by {gap}"
        )
    return False


def _gap(exact: Any, feeds: dict[str, Any], settings: GenerationSettings, source: int, a: Any, b: Any) -> float:
    """Distance of the scores of two rows: for beams of the whole rows, otherwise of the first tokens that differ."""
    if settings.num_beams > 1:
        return abs(_score(exact, feeds, settings, source, a) - _score(exact, feeds, settings, source, b))
    first = int(np.flatnonzero(a[: len(b)] != b[: len(a)])[0])
    scores = _scores(exact, feeds, settings, source, a[:first])[-1]
    return float(abs(scores[a[first]] - scores[b[first]]))


def _score(exact: Any, feeds: dict[str, Any], settings: GenerationSettings, source: int, row: Any) -> float:
    """Score of a finished row, as beam search ranks it."""
    ends = np.flatnonzero(np.isin(row[1:], settings.eos_token_ids))
    row = row[: 2 + int(ends[0])] if len(ends) else row
    scores = _scores(exact, feeds, settings, source, row[:-1])
    total = sum(scores[i][token] for i, token in enumerate(row[1:]))
    return float(total / (len(row) - 1) ** settings.length_penalty)


def _scores(exact: Any, feeds: dict[str, Any], settings: GenerationSettings, source: int, row: Any) -> list[Any]:
    """The scores of the next token after each token of a row, in float64."""
    inputs = {name: torch.from_numpy(array[source : source + 1]) for name, array in feeds.items()}
    with torch.no_grad():
        logits = exact(**inputs, decoder_input_ids=torch.from_numpy(row[None])).logits[0].numpy()
    steps = []
    for i, values in enumerate(logits):
        scores = values[None].copy()
        scores = log_softmax(scores) if settings.num_beams > 1 else scores
        for rule in rules(settings, list(feeds["input_ids"])):
            rule(scores, row[None, : i + 1], np.array([source]))
        steps.append(scores[0])
    return steps
