"""Greedy search, sampling and beam search over an encoder and a decoder with a cache; numpy only.

The tokens are those of `transformers.generation` 5: `GenerationMixin._sample` and `_beam_search`. A row that has ended
leaves the batch, so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LfxError
from lfx.runtime.generation.model import Cache, Float32, Int64, TextGenerator
from lfx.runtime.generation.rules import Rule, choose, choose_different, log_softmax, rules
from lfx.runtime.generation.settings import GenerationSettings
from lfx.runtime.inputs import Feeds

_NEVER = np.float32(-1e9)  # the score of a beam that is not a candidate, Hugging Face's number


def generate(
    model: TextGenerator, sequences: Sequence[Feeds], settings: GenerationSettings, indices: Sequence[int] | None = None
) -> Int64:
    """Generate text for one batch.

    Args:
        sequences: prepared sequences; see `lfx.runtime.inputs.prepare`.
        indices: of the sequences in the whole call, which decide their random numbers. Default: 0, 1, …
    Returns:
        (batch * num_return_sequences, tokens) from the start token on, padded on the right with the pad token to the
        longest row. The rows of one sequence are neighbours, for beams the best first.
    Raises:
        InputError: the options leave no token to sample from.
        LfxError: the logits are not finite, or the backend failed.
    """
    if settings.num_beams > 1:
        return _BeamSearch(model, sequences, settings, indices).run()
    rows = len(sequences) * settings.num_return_sequences
    start = np.full(rows, settings.decoder_start_token_id, np.int64)
    return np.stack([start, *stream(model, sequences, settings, indices)], axis=1)


def stream(
    model: TextGenerator, sequences: Sequence[Feeds], settings: GenerationSettings, indices: Sequence[int] | None = None
) -> Iterator[Int64]:
    """Greedy search and sampling, token by token; see `generate`.

    Yields:
        (batch * num_return_sequences,) the next token of each row; the pad token for a row that has ended.
    """
    copies = settings.num_return_sequences
    count = len(sequences) * copies
    chosen_rules = rules(settings, _encoder_ids(sequences))
    generators = _generators(settings, range(len(sequences)) if indices is None else indices, copies)
    cache = model.encode(sequences, copies)
    rows = np.arange(count)  # of the rows that have not ended, the index in the batch
    tokens = np.full((count, 1), settings.decoder_start_token_id, np.int64)
    while True:
        scores = _scores(cache, tokens)
        _apply(chosen_rules, scores, tokens, rows // copies)
        if settings.do_sample:
            _check_choice(scores, tokens.shape[1])
            next_tokens = choose(scores, np.array([generators[row].random() for row in rows]))
        else:
            next_tokens = scores.argmax(axis=1)
        column = np.full(count, settings.fill_token_id, np.int64)
        column[rows] = next_tokens
        tokens = np.concatenate([tokens, next_tokens[:, None]], axis=1)
        goes_on = ~np.isin(next_tokens, settings.eos_token_ids)
        is_last = tokens.shape[1] >= settings.max_length or not goes_on.any()
        if not is_last and not goes_on.all():
            kept = np.flatnonzero(goes_on)
            cache.select(kept)
            rows, tokens = rows[kept], tokens[kept]
        yield column
        if is_last:
            return


def _encoder_ids(sequences: Sequence[Feeds]) -> list[Int64]:
    return [feeds["input_ids"][0] for feeds in sequences]


def _generators(settings: GenerationSettings, indices: Sequence[int], copies: int) -> list[np.random.Generator]:
    """A generator for each row, so that its tokens do not depend on other rows: that of [seed, index of the row].

    Args:
        copies: number of rows of each sequence that draw on their own.
    """
    if not settings.do_sample:
        return []
    seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if settings.seed is None else settings.seed
    return [np.random.default_rng([seed, index * copies + i]) for index in indices for i in range(copies)]


def _scores(cache: Cache, tokens: Int64) -> Float32:
    """The logits of the next token of each row, as an array that may be changed."""
    logits = np.array(cache.step(tokens[:, -1:]), np.float32)
    # Minus infinity is a ban of the token by final_logits_bias.
    if not np.isfinite(logits.max(axis=1)).all():
        raise LfxError(
            f"the decoder's logits are not finite at token {tokens.shape[1]}; export the model in fp32, or check its "
            "weights"
        )
    return logits


def _apply(chosen_rules: list[Rule], scores: Float32, tokens: Int64, sources: Int64) -> None:
    for rule in chosen_rules:
        rule(scores, tokens, sources)


def _check_choice(scores: Float32, length: int) -> None:
    if np.isneginf(scores).all(axis=1).any():
        raise InputError(f"the options leave no token to choose at token {length}; allow more tokens")


def top(values: Float32, count: int) -> tuple[Float32, Int64]:
    """The `count` largest values of each row in falling order, and their indices; of equal values the first."""
    picked = []
    for row in values:
        lowest = np.partition(row, len(row) - count)[len(row) - count]
        above = np.flatnonzero(row > lowest)
        indices = np.concatenate([above, np.flatnonzero(row == lowest)[: count - len(above)]])
        picked.append(indices[np.argsort(-row[indices], kind="stable")])
    indices = np.stack(picked)
    return np.take_along_axis(values, indices, axis=1), indices


def _unless(allowed: Any) -> Float32:
    """What is added to scores: 0 where they are allowed."""
    return np.asarray(np.where(allowed, np.float32(0), _NEVER), np.float32)


# The attributes of a beam search with an axis of sequences.
_STATE = (
    "sequences",
    "running",
    "running_scores",
    "ended",
    "ended_scores",
    "ended_lengths",
    "has_ended",
    "may_improve",
)


class _BeamSearch:
    """Beam search over one batch, of the best candidates or of sampled ones. Arrays: (sequences that go on, beams)."""

    def __init__(
        self,
        model: TextGenerator,
        sequences: Sequence[Feeds],
        settings: GenerationSettings,
        indices: Sequence[int] | None,
    ) -> None:
        self.settings = settings
        batch, beams = len(sequences), settings.num_beams
        self.generators = _generators(settings, range(batch) if indices is None else indices, copies=1)
        self.cache = model.encode(sequences, beams)
        self.rules = rules(settings, _encoder_ids(sequences))
        self.sequences = np.arange(batch)  # index in the batch of each sequence that goes on
        self.running = np.full((batch, beams, settings.max_length), settings.fill_token_id, np.int64)
        self.running[:, :, 0] = settings.decoder_start_token_id
        self.running_scores = np.zeros((batch, beams), np.float32)
        self.running_scores[:, 1:] = _NEVER  # all beams are equal at first, so only one may be continued
        self.ended = self.running.copy()
        self.ended_scores = np.full((batch, beams), _NEVER, np.float32)
        self.ended_lengths = np.zeros((batch, beams), np.int64)
        self.has_ended = np.zeros((batch, beams), bool)
        self.may_improve = np.ones(batch, bool)
        self.results: dict[int, tuple[Int64, Int64]] = {}  # sequence -> its rows and their lengths

    def run(self) -> Int64:
        """Search, and return the best rows of each sequence."""
        length = 1
        while len(self.sequences) > 0:
            self._step(length)
            length += 1
            self._remove_finished(length)
        rows = np.concatenate([self.results[i][0] for i in sorted(self.results)])
        longest = max(int(lengths.max()) for _, lengths in self.results.values())
        return rows[:, : max(longest, 1)]

    def _step(self, length: int) -> None:
        """Continue the beams, which have `length` tokens, by one token."""
        settings, beams = self.settings, self.settings.num_beams
        batch = len(self.sequences)
        tokens = self.running[:, :, :length].reshape(batch * beams, length)
        scores = log_softmax(_scores(self.cache, tokens))
        _apply(self.rules, scores, tokens, np.repeat(self.sequences, beams))
        vocab_size = scores.shape[1]
        totals = (scores.reshape(batch, beams, vocab_size) + self.running_scores[:, :, None]).reshape(batch, -1)
        # One beam more for each end token, so that `beams` candidates are left that have not ended.
        kept = max(2, 1 + len(settings.eos_token_ids)) * beams
        candidate_scores, indices = self._sample(totals, kept, length) if settings.do_sample else top(totals, kept)
        parents, next_tokens = indices // vocab_size, indices % vocab_size
        candidates = np.take_along_axis(self.running, parents[:, :, None], axis=1)
        candidates[:, :, length] = next_tokens
        ends = np.isin(next_tokens, settings.eos_token_ids) | (length + 1 >= settings.max_length)
        self._add_ended(candidates, candidate_scores, ends, length)
        running_scores = candidate_scores + _unless(~ends)
        self.running_scores, order = top(running_scores, beams)
        self.running = np.take_along_axis(candidates, order[:, :, None], axis=1)
        parents = np.take_along_axis(parents, order, axis=1)
        self._parents = parents

    def _sample(self, totals: Float32, count: int, length: int) -> tuple[Float32, Int64]:
        """Sample candidates of each sequence without replacement, in the order of the draws."""
        _check_choice(totals, length)
        draws = [self.generators[sequence].random(count) for sequence in self.sequences.tolist()]
        indices = np.stack([choose_different(row, drawn) for row, drawn in zip(totals, draws, strict=True)])
        return np.take_along_axis(totals, indices, axis=1), indices

    def _add_ended(self, candidates: Int64, scores: Float32, ends: NDArray[np.bool_], length: int) -> None:
        """Keep the best ended rows; of the candidates only the first `num_beams` count."""
        settings, beams = self.settings, self.settings.num_beams
        just_ended = ends.copy()
        just_ended[:, beams:] = False
        scores = scores / np.float32(length**settings.length_penalty)
        if settings.early_stopping is True:
            scores = scores + _unless(~self.has_ended.all(axis=1, keepdims=True))
        scores = scores + _unless(self.may_improve[:, None])
        scores = scores + _unless(just_ended)
        lengths = np.full(scores.shape, length + 1, np.int64)
        self.ended_scores, order = top(np.concatenate([self.ended_scores, scores], axis=1), beams)
        self.ended = np.take_along_axis(np.concatenate([self.ended, candidates], axis=1), order[:, :, None], axis=1)
        self.ended_lengths = np.take_along_axis(np.concatenate([self.ended_lengths, lengths], axis=1), order, axis=1)
        self.has_ended = np.take_along_axis(np.concatenate([self.has_ended, just_ended], axis=1), order, axis=1)

    def _remove_finished(self, length: int) -> None:
        """Take the sequences out of the batch whose result cannot change, and order the cache for the others."""
        settings, beams = self.settings, self.settings.num_beams
        best_length = length - 1
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            best_length = settings.max_length - 1
        best = self.running_scores[:, :1] / np.float32(best_length**settings.length_penalty)
        worst = np.where(self.has_ended, self.ended_scores.min(axis=1, keepdims=True), _NEVER)
        self.may_improve &= (best > worst).any(axis=1)
        finished = ~self.may_improve | (length >= settings.max_length)
        if settings.early_stopping is True:
            finished |= self.has_ended.all(axis=1)
        count = settings.num_return_sequences
        for i in np.flatnonzero(finished):
            self.results[int(self.sequences[i])] = (self.ended[i, :count], self.ended_lengths[i, :count])
        left = np.flatnonzero(~finished)
        if len(left) > 0:
            self.cache.select((left[:, None] * beams + self._parents[left]).reshape(-1))
        if len(left) < len(finished):
            for name in _STATE:
                setattr(self, name, getattr(self, name)[left])
