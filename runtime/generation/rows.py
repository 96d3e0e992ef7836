"""Generates text for sequences of different lengths, in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lfx.errors import ArtifactError, LfxError
from lfx.runtime.batching import batches
from lfx.runtime.generation.model import Int64, TextGenerator
from lfx.runtime.generation.search import generate
from lfx.runtime.generation.settings import GenerationSettings
from lfx.runtime.inputs import Feeds, seqlen_of


def generate_rows(
    model: TextGenerator,
    sequences: Sequence[Feeds | LfxError],
    settings: GenerationSettings,
    token_budget: int,
    supports_shape: Callable[[int, int], bool],
    *,
    pad: bool,
    keep_errors: bool,
    indices: Sequence[int] | None = None,
) -> list[Int64 | LfxError]:
    """Generate text for prepared sequences, in batches of similar lengths.

    Args:
        sequences: an error among them is returned at its index.
        token_budget, supports_shape, pad: see `lfx.runtime.batching.batches`; of the encoder.
        keep_errors: return the error of a batch that fails for each of its sequences; do not raise it.
        indices: as for `generate`.
    Returns:
        For each sequence: (num_return_sequences, tokens) from the start token on, padded to the longest of its batch;
        or its error.
    Raises:
        LfxError: what `generate` raises.
    """
    rows: list[Any] = list(sequences)
    valid = [i for i, item in enumerate(sequences) if not isinstance(item, LfxError)]
    lengths = [seqlen_of(rows[i]) for i in valid]
    for group in batches(lengths, token_budget, supports_shape, pad=pad):
        chosen = [valid[i] for i in group]
        numbers = chosen if indices is None else [indices[i] for i in chosen]
        try:
            tokens = generate(model, [rows[i] for i in chosen], settings, numbers)
            results: list[Any] = np.split(tokens, len(chosen))
        except ArtifactError:
            raise
        except LfxError as error:
            if not keep_errors:
                raise
            results = [error] * len(chosen)
        for i, result in zip(chosen, results, strict=True):
            rows[i] = result
    return rows


def join_rows(rows: Sequence[Int64], fill: int) -> Int64:
    """Put the rows of several batches into one array (rows, tokens), padded on the right with `fill`."""
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=fill) for row in rows]
    return np.concatenate(padded)


def without_padding(tokens: Int64, settings: GenerationSettings) -> Int64:
    """One row from the start token to its end token, without the padding after it."""
    ends = np.flatnonzero(np.isin(tokens[1:], settings.eos_token_ids))
    return tokens[: 2 + int(ends[0])] if len(ends) else tokens
