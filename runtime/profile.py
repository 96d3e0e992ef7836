"""Optimization profiles: the ranges of shapes that a plan takes, and the shapes that it is tuned for."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lfx.checks import shown
from lfx.errors import BuildError
from lfx.signature import Signature, TensorSpec

# MIN, OPT and MAX of the choices axis of a multiple-choice model; no option sets it.
CHOICES = (1, 4, 16)
# Largest number of tokens of one call of a decoder. A search decodes one; `lfx parity` gives the first ones together.
STEP_TOKENS = 4
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Range:
    """Minimum, optimum and maximum size of an axis."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    @classmethod
    def parse(cls, text: str | int, name: str, lowest: int = 1) -> Range:
        """Parse MIN:OPT:MAX, or one number for all three.

        Args:
            name: name of the option, for messages.
            lowest: smallest MIN.
        Raises:
            BuildError: the text has another form, or its sizes are out of order or above 2^31 - 1.
        """
        if isinstance(text, numbers.Integral) and not isinstance(text, bool):
            text = str(text)
        parts = text.split(":") if isinstance(text, str) else []
        if len(parts) not in (1, 3) or not all(_is_size(part) for part in parts):
            raise BuildError(f"{name} {shown(text)} is not a size; give MIN:OPT:MAX or one number, such as 1:1:8 or 8")
        sizes = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
        if not lowest <= sizes[0] <= sizes[1] <= sizes[2] < 2**31:
            raise BuildError(f"{name} {text} is out of order; it must be {lowest} ≤ MIN ≤ OPT ≤ MAX < 2^31")
        return cls(*sizes)


def _is_size(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit() and len(text) < 20


@dataclass(frozen=True)
class Profile:
    """One range for each dynamic axis of the graph's inputs."""

    batch: Range
    seqlen: Range

    def __str__(self) -> str:
        return f"batch {self.batch}, seqlen {self.seqlen}"

    def shapes(self, tensor: TensorSpec) -> Shapes:
        """Minimum, optimum and maximum shape of an input."""
        return _shapes(tensor, {"batch": self.batch, "sequence": self.seqlen, "choices": Range(*CHOICES)})

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether a batch of this shape is within both ranges."""
        return batch in self.batch and seqlen in self.seqlen


@dataclass(frozen=True)
class DecoderProfile:
    """One range for each dynamic axis of the inputs of a decoder's graph; see `lfx.signature.Decoder`.

    Attributes:
        batch: rows that are decoded together: sequences, times the beams of each.
        tokens: tokens of a row that one call decodes.
        past: cached tokens of a row.
        seqlen: the encoder's tokens.
    """

    batch: Range
    tokens: Range
    past: Range
    seqlen: Range

    def __str__(self) -> str:
        return f"rows {self.batch}, tokens {self.tokens}, cached {self.past}, seqlen {self.seqlen}"

    def shapes(self, tensor: TensorSpec) -> Shapes:
        """Minimum, optimum and maximum shape of an input."""
        return _shapes(tensor, {"batch": self.batch, "tokens": self.tokens, "past": self.past, "sequence": self.seqlen})

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether so many rows, and so many tokens of the encoder, are within their ranges."""
        return batch in self.batch and seqlen in self.seqlen

    def supports_step(self, tokens: int, past: int) -> bool:
        """Whether a call that decodes `tokens` tokens after `past` cached ones is within the ranges."""
        return tokens in self.tokens and past in self.past


def _shapes(tensor: TensorSpec, axes: Mapping[str, Range]) -> Shapes:
    ranges = [axes[axis] if isinstance(axis, str) else Range(axis, axis, axis) for axis in tensor.shape]
    return tuple(r.min for r in ranges), tuple(r.opt for r in ranges), tuple(r.max for r in ranges)


def decoder_profile(encoder: Profile, max_new_tokens: int, num_beams: int) -> DecoderProfile:
    """The decoder's profile that goes with a profile of the encoder.

    Args:
        max_new_tokens: number of tokens that a text may have after its first one.
        num_beams: largest number of rows that are decoded for a sequence.
    """
    batch = Range(encoder.batch.min, encoder.batch.opt * num_beams, encoder.batch.max * num_beams)
    longest = max_new_tokens - 1  # the last token is not decoded
    return DecoderProfile(
        batch=batch,
        tokens=Range(1, 1, min(STEP_TOKENS, max_new_tokens)),
        past=Range(0, longest // 2, longest),
        seqlen=encoder.seqlen,
    )


def profiles(batch: Sequence[str | int], seqlen: Sequence[str | int], signature: Signature) -> tuple[Profile, ...]:
    """Parse the options --batch and --seqlen into profiles.

    Args:
        batch, seqlen: one MIN:OPT:MAX or number for each profile; a single entry is used for all profiles.
    Raises:
        BuildError: an argument is no list, the numbers of entries differ, or a seqlen is above the model's maximum.
    """
    batches, lengths = _ranges(batch, "--batch"), _ranges(seqlen, "--seqlen")
    if len(batches) != len(lengths) and 1 not in (len(batches), len(lengths)):
        raise BuildError(
            f"{len(batches)} --batch and {len(lengths)} --seqlen make no profiles; give the same number of "
            "each, or one of either"
        )
    limit = signature.max_seqlen
    for length in lengths:
        if limit is not None and length.max > limit:
            raise BuildError(f"--seqlen {length} is above the model's maximum {limit}; give at most {limit}")
    count = max(len(batches), len(lengths))
    pairs = zip(_repeat(batches, count), _repeat(lengths, count), strict=True)
    return tuple(Profile(*pair) for pair in pairs)


def _ranges(texts: Sequence[str | int], name: str) -> list[Range]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence) or not texts:
        raise BuildError(f"{name} is {shown(texts)}; give a list of MIN:OPT:MAX or numbers, one for each profile")
    return [Range.parse(text, name) for text in texts]


def _repeat(ranges: list[Range], count: int) -> Iterable[Range]:
    return ranges if len(ranges) == count else itertools.repeat(ranges[0], count)


def choose_profile(candidates: Sequence[Profile | DecoderProfile], batch: int, seqlen: int) -> int | None:
    """Index of the profile to run a shape with: the one with the nearest optimum; None if none takes the shape."""
    supporting = [i for i, profile in enumerate(candidates) if profile.supports_shape(batch, seqlen)]

    def distance(i: int) -> int:
        return abs(candidates[i].batch.opt * candidates[i].seqlen.opt - batch * seqlen)

    return min(supporting, key=distance, default=None)
