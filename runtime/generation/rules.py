"""The rules that change logits before a token is chosen, in Hugging Face's order (`transformers.generation`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lfx.runtime.generation.model import Float32, Int64
from lfx.runtime.generation.settings import GenerationSettings

# Changes scores (rows, vocab_size) in place. tokens: (rows, length), all so far. sources: (rows,), the sequence of the
# batch that each row belongs to.
Rule = Callable[[Float32, Int64, Int64], None]


def rules(settings: GenerationSettings, encoder_ids: Sequence[Int64]) -> list[Rule]:
    """The rules of these settings.

    Args:
        encoder_ids: (seqlen,) ids that the encoder gets for each sequence.
    """
    chosen: list[Rule] = []
    if settings.repetition_penalty != 1.0:
        chosen.append(_repetition_penalty(settings.repetition_penalty))
    if settings.no_repeat_ngram_size > 0:
        chosen.append(_no_repeat_ngram(settings.no_repeat_ngram_size))
    if settings.encoder_no_repeat_ngram_size > 0:
        chosen.append(_encoder_no_repeat_ngram(settings.encoder_no_repeat_ngram_size, encoder_ids))
    words = [word for word in settings.bad_words_ids if len(word) > 1 or word[0] not in settings.eos_token_ids]
    if words:
        chosen.append(_bad_words(words))
    if settings.min_length > 0 and settings.eos_token_ids:
        chosen.append(_min_length(settings.min_length, settings.eos_token_ids))
    if settings.forced_bos_token_id is not None:
        chosen.append(_forced((settings.forced_bos_token_id,), 1))
    if settings.forced_eos_token_ids:
        chosen.append(_forced(settings.forced_eos_token_ids, settings.max_length - 1))
    if settings.do_sample:
        chosen += _sampling_rules(settings)
    return chosen


def _repetition_penalty(penalty: float) -> Rule:
    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        values = np.take_along_axis(scores, tokens, axis=1)
        values = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
        np.put_along_axis(scores, tokens, values, axis=1)

    return apply


def _no_repeat_ngram(size: int) -> Rule:
    """No n-gram of a row appears twice in it."""

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        length = tokens.shape[1]
        if length < size:
            return
        _ban_continuations(scores, tokens[:, length + 1 - size :], tokens, range(len(tokens)), size)

    return apply


def _encoder_no_repeat_ngram(size: int, encoder_ids: Sequence[Int64]) -> Rule:
    """No n-gram of the encoder's ids appears in a row."""

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        length = tokens.shape[1]
        if length + 1 < size:
            return
        _ban_continuations(scores, tokens[:, length + 1 - size :], encoder_ids, sources.tolist(), size)

    return apply


def _ban_continuations(
    scores: Float32, prefixes: Int64, texts: Sequence[Int64] | Int64, text_of_row: Sequence[int], size: int
) -> None:
    """For each row, ban the tokens that follow its prefix in a text.

    Args:
        prefixes: (rows, size - 1), the last tokens of each row.
        texts: (length,) ids of each text.
        text_of_row: index of the text of each row.
    """
    for row, text in enumerate(text_of_row):
        if len(texts[text]) < size:
            continue
        windows = sliding_window_view(texts[text], size)
        follows = (windows[:, :-1] == prefixes[row]).all(axis=1)
        scores[row, windows[follows, -1]] = -np.inf


def _bad_words(words: Sequence[tuple[int, ...]]) -> Rule:
    """No row has any of the sequences of ids."""
    single = np.array(sorted({word[0] for word in words if len(word) == 1}), np.int64)
    longer = [(np.array(word[:-1], np.int64), word[-1]) for word in words if len(word) > 1]

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        scores[:, single] = -np.inf
        for prefix, last in longer:
            if len(prefix) <= tokens.shape[1]:
                scores[(tokens[:, -len(prefix) :] == prefix).all(axis=1), last] = -np.inf

    return apply


def _min_length(min_length: int, eos_token_ids: Sequence[int]) -> Rule:
    """No row ends before it has `min_length` tokens."""
    ends = np.array(eos_token_ids, np.int64)

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        if tokens.shape[1] < min_length:
            scores[:, ends] = -np.inf

    return apply


def _forced(ids: Sequence[int], length: int) -> Rule:
    """After `length` tokens comes one of these."""
    forced = np.array(ids, np.int64)

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        if tokens.shape[1] == length:
            scores[...] = -np.inf
            scores[:, forced] = 0.0

    return apply


def _sampling_rules(settings: GenerationSettings) -> list[Rule]:
    chosen: list[Rule] = []
    if settings.temperature != 1.0:
        chosen.append(_temperature(settings.temperature))
    # A beam keeps one token more than there are end tokens, so that it can go on.
    least = max(2, 1 + len(settings.eos_token_ids)) if settings.num_beams > 1 else 1
    if settings.top_k > 0:
        chosen.append(_top_k(max(settings.top_k, least)))
    if settings.top_p < 1.0:
        chosen.append(_top_p(settings.top_p, least))
    return chosen


def _temperature(temperature: float) -> Rule:
    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        scores /= np.float32(temperature)

    return apply


def _top_k(count: int) -> Rule:
    """Only the `count` likeliest tokens remain, and those with the score of the last of them."""

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        kept = min(count, scores.shape[1])
        lowest = np.partition(scores, scores.shape[1] - kept, axis=1)[:, -kept]
        scores[scores < lowest[:, None]] = -np.inf

    return apply


def _top_p(mass: float, least: int) -> Rule:
    """Only the likeliest tokens remain whose probabilities add up to `mass`, and at least `least` of them."""

    def apply(scores: Float32, tokens: Int64, sources: Int64) -> None:
        order = np.argsort(scores, axis=1, kind="stable")
        cumulative = np.cumsum(softmax(np.take_along_axis(scores, order, axis=1)), axis=1)
        removed = cumulative <= np.float32(1 - mass)
        removed[:, -least:] = False
        rows, places = np.nonzero(removed)
        scores[rows, order[rows, places]] = -np.inf

    return apply


def softmax(scores: Float32) -> Float32:
    """Softmax of each row, in the dtype of the scores; NaN where all scores of a row are -inf."""
    with np.errstate(invalid="ignore"):
        exponentials: Float32 = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), scores.dtype)


def log_softmax(scores: Float32) -> Float32:
    """Logarithm of the softmax of each row."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), scores.dtype)


def choose(scores: Float32, draws: NDArray[np.float64]) -> Int64:
    """Sample a token of each row from the softmax of its scores.

    Args:
        draws: (rows,) uniform random numbers in [0, 1).
    Returns:
        (rows,) the first token whose cumulative probability, computed in float64 in the order of the ids, is above the
        draw.
    """
    cumulative = np.cumsum(softmax(scores.astype(np.float64)), axis=1)
    targets = draws * cumulative[:, -1]  # the sum of the rounded probabilities is not 1
    return np.asarray((cumulative <= targets[:, None]).sum(axis=1), np.int64)


def choose_different(scores: Float32, draws: NDArray[np.float64]) -> Int64:
    """Sample different candidates from the softmax of their scores, one after the other.

    Args:
        scores: (candidates,), at least one of them finite.
        draws: (count,) uniform random numbers in [0, 1), one for each candidate to choose.
    Returns:
        (count,) indices in the order of the draws. Each is `choose` of the candidates that are left. Where all that are
        left have the probability 0, those of the highest scores come next.
    """
    probabilities = np.exp(scores.astype(np.float64) - scores.max())
    possible = np.flatnonzero(probabilities)
    left = probabilities[possible]
    chosen = []
    for draw in draws[: len(possible)]:
        cumulative = np.cumsum(left)
        i = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
        chosen.append(possible[i])
        left[i] = 0.0
    others = np.flatnonzero(probabilities == 0)
    others = others[np.argsort(-scores[others], kind="stable")[: len(draws) - len(chosen)]]
    return np.concatenate([np.array(chosen, np.int64), others])
