"""What a search needs from a model that generates text: an encoder that runs once, and a decoder with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfx.runtime.inputs import Feeds

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Cache(Protocol):
    """The keys and values of a batch while it is decoded: the encoder's, and those of the tokens so far.

    A cache belongs to one call of `Engine.generate` and is used by one thread.
    """

    def step(self, tokens: Int64) -> NDArray[Any]:
        """Decode the next token of each row.

        Args:
            tokens: (rows, 1), the last token of each row.
        Returns:
            (rows, vocab_size) floats: the logits of the token after it. The caller does not change them.
        """
        ...

    def select(self, rows: Int64) -> None:
        """Keep these rows in this order.

        Args:
            rows: indices of rows; one index may appear several times, as when a beam has several continuations.
        """
        ...


class TextGenerator(Protocol):
    """An encoder and a decoder."""

    def encode(self, sequences: Sequence[Feeds], copies: int) -> Cache:
        """Run the encoder over one batch.

        Args:
            sequences: prepared sequences; see `lfx.runtime.inputs.prepare`.
            copies: number of rows that are decoded for each sequence.
        Returns:
            A cache of len(sequences) * copies rows; the rows of one sequence are neighbours.
        """
        ...


@dataclass(frozen=True)
class StoppableGenerator:
    """A model that calls `on_step` before each step of its decoder; an error that it raises ends the search."""

    model: TextGenerator
    on_step: Callable[[], None]

    def encode(self, sequences: Sequence[Feeds], copies: int) -> Cache:
        """Run the encoder; see `TextGenerator`."""
        return _StoppableCache(self.model.encode(sequences, copies), self.on_step)


@dataclass(frozen=True)
class _StoppableCache:
    cache: Cache
    on_step: Callable[[], None]

    def step(self, tokens: Int64) -> NDArray[Any]:
        self.on_step()
        return self.cache.step(tokens)

    def select(self, rows: Int64) -> None:
        self.cache.select(rows)
