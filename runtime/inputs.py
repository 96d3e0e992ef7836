"""What a caller may give as ids and masks, checked and padded into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.config import Signature
from lfx.errors import InputError, one_line

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Graph inputs.

    Attributes:
        feeds: input name -> (batch, seqlen) int64, for multiple choice (batch, choices, seqlen).
        lengths: the length of each sequence, where they differ; None for a rectangle.
    """

    feeds: dict[str, Int64]
    lengths: tuple[int, ...] | None


def prepare(ids: Any, attention_mask: Any, global_attention_mask: Any, signature: Signature) -> Batch:
    """Check and pad; see `Engine.run` for what may come and what is refused."""
    rows = _as_rows(ids, "input_ids", signature)
    lengths = [row.shape[-1] for row in rows]
    _check_ids(rows, lengths, signature)
    ragged = len(set(lengths)) > 1
    width = max(lengths)
    input_ids = _stack(rows, width, signature.pad_token_id)

    given_mask = _mask_rows(attention_mask, "attention_mask", rows, signature)
    mask_rows = given_mask if given_mask is not None else [np.ones_like(row) for row in rows]
    mask = _stack(mask_rows, width, 0)
    given_global = _mask_rows(global_attention_mask, "global_attention_mask", rows, signature)
    feeds = {"input_ids": input_ids, "attention_mask": mask}
    names = {spec.name for spec in signature.inputs}
    if "global_attention_mask" in names:
        marks = _stack(given_global, width, 0) if given_global is not None else default_global(input_ids, signature)
        _check_globals(marks * mask, signature)
        feeds["global_attention_mask"] = marks
    elif given_global is not None:
        raise InputError(
            f"this model has its global attention fixed ({signature.global_attention}) and takes no "
            "global_attention_mask; leave it out, or export again with --global-attention mask"
        )
    if "attention_mask" not in names and not mask.all():
        raise InputError("this model takes no attention_mask, so no token can be masked; give sequences of one length")
    return Batch({name: feeds[name] for name in feeds if name in names}, tuple(lengths) if ragged else None)


def join(requests: Sequence[Batch], pad_token_id: int) -> tuple[dict[str, Int64], list[int]]:
    """Prepared sequences, one a request, as the rows of one batch; and their lengths.

    Args:
        requests: each with feeds (1, seqlen), or (1, choices, seqlen) of as many choices each.
    """
    lengths = [request.feeds["input_ids"].shape[-1] for request in requests]
    feeds = {
        name: _stack([r.feeds[name][0] for r in requests], max(lengths), pad_token_id if name == "input_ids" else 0)
        for name in requests[0].feeds
    }
    return feeds, lengths


def default_global(input_ids: Int64, signature: Signature) -> Int64:
    """The global tokens that Hugging Face gives this task when the caller names none.

    Raises:
        InputError: the rule needs three separator tokens in every row, and a row has another number.
    """
    marks = np.zeros_like(input_ids)
    if signature.default_global == "required":
        raise InputError(
            "this model marks its global tokens by a rule of its own when it gets no global_attention_mask; give one"
        )
    if signature.default_global == "first":
        marks[..., 0] = 1
    elif signature.default_global in ("question", "after_question"):
        is_separator = input_ids == signature.sep_token_id
        counts = is_separator.sum(axis=-1)
        if (counts != 3).any():
            raise InputError(
                f"{signature.task} takes its global tokens from three separators (id {signature.sep_token_id}) in "
                f"every sequence, and one has {int(counts[counts != 3].flat[0])}; encode question and text as a "
                "pair, or give global_attention_mask"
            )
        first = is_separator.argmax(axis=-1)[..., None]
        position = np.arange(input_ids.shape[-1])
        marks[...] = position < first if signature.default_global == "question" else position > first + 1
    return marks


def _as_rows(value: Any, name: str, signature: Signature) -> list[NDArray[Any]]:
    """A list of sequences: 1-D integer arrays, or (choices, seqlen) for multiple choice."""
    rank = 2 if signature.task == "multiple-choice" else 1
    if isinstance(value, (str, bytes, bytearray, memoryview)) or value is None:
        raise InputError(f"{name} is {type(value).__name__}; give token ids: a list of integers or an integer array")
    if hasattr(value, "__array__"):
        array = _array(value, name, signature)
        items = [array] if array.ndim == rank else list(array) if array.ndim == rank + 1 else None
        if items is None:
            raise InputError(f"{name} has shape {array.shape}; give {_shapes(signature)}")
    else:
        if not isinstance(value, Sequence):
            raise InputError(f"{name} is {type(value).__name__}; give {_shapes(signature)}")
        if len(value) == 0:
            raise InputError(f"{name} is empty; give at least one sequence of at least one token")
        items = [value] if _depth(value) == rank else list(value)
    if len(items) == 0:
        raise InputError(f"{name} is an empty batch; give at least one sequence of at least one token")
    return [_as_row(item, f"{name}[{i}]" if len(items) > 1 else name, rank, signature) for i, item in enumerate(items)]


def _as_row(item: Any, name: str, rank: int, signature: Signature) -> NDArray[Any]:
    row = _array(item, name, signature)
    if row.size == 0:
        raise InputError(f"{name} is an empty sequence; give at least one token")
    if row.ndim != rank or row.dtype == object:
        raise InputError(f"{name} has shape {row.shape}; give {_shapes(signature)}")
    return row


def _array(value: Any, name: str, signature: Signature) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is ragged inside; give {_shapes(signature)}") from error
    except Exception as error:  # an object's own __array__ may raise anything: a tensor on a GPU, for one
        raise InputError(f"{name} cannot be read as an array ({one_line(error)}); give {_shapes(signature)}") from error


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        depth += 1
        if len(value) == 0:
            break
        value = value[0]
    return depth + int(np.ndim(value)) if hasattr(value, "__array__") and not np.isscalar(value) else depth


def _shapes(signature: Signature) -> str:
    if signature.task == "multiple-choice":
        return "an integer array (batch, choices, seqlen) or (choices, seqlen)"
    return "one sequence of integers, a list of sequences, or an integer array (batch, seqlen)"


def _check_ids(rows: list[NDArray[Any]], lengths: list[int], signature: Signature) -> None:
    for i, row in enumerate(rows):
        name = f"input_ids[{i}]" if len(rows) > 1 else "input_ids"
        if row.dtype.kind not in "iu":
            raise InputError(f"{name} has dtype {row.dtype}; give integers")
        if signature.max_seqlen is not None and lengths[i] > signature.max_seqlen:
            raise InputError(
                f"{name} has {lengths[i]} tokens, above the model's maximum {signature.max_seqlen}; cut or split it"
            )
        low, high = int(row.min()), int(row.max())
        if high > np.iinfo(np.int64).max:
            raise InputError(f"{name} has id {high}, which does not fit 64 bits")
        if low < 0:
            raise InputError(f"{name} has the negative id {low}; ids start at 0")
        if signature.vocab_size is not None and high >= signature.vocab_size:
            raise InputError(
                f"{name} has id {high}, outside the vocabulary of {signature.vocab_size}; "
                "use the tokenizer that belongs to this model"
            )
    if len({row.shape[:-1] for row in rows}) > 1:
        raise InputError(f"input_ids have different numbers of choices; give {_shapes(signature)}")


def _mask_rows(value: Any, name: str, rows: list[NDArray[Any]], signature: Signature) -> list[NDArray[Any]] | None:
    if value is None:
        return None
    masks = _as_rows(value, name, signature)
    if [m.shape for m in masks] != [r.shape for r in rows]:
        raise InputError(f"{name} has shape {_shape_of(masks)} where input_ids has {_shape_of(rows)}; make them equal")
    for mask in masks:
        if mask.dtype.kind not in "biuf":
            raise InputError(f"{name} has dtype {mask.dtype}; masks hold 0 and 1 only")
        if not np.isin(mask, (0, 1)).all():
            wrong = mask[~np.isin(mask, (0, 1))].flat[0]
            raise InputError(f"{name} has the value {wrong}; masks hold 0 and 1 only")
    return masks


def _shape_of(rows: list[NDArray[Any]]) -> str:
    shapes = [row.shape for row in rows]
    if len(set(shapes)) == 1:
        return str((len(rows), *shapes[0]))
    return f"lengths {[shape[-1] for shape in shapes]}"


def _check_globals(marks: Int64, signature: Signature) -> None:
    if signature.max_global is None:
        return
    most = int(marks.sum(axis=-1).max())
    if most > signature.max_global:
        raise InputError(
            f"global_attention_mask has {most} global tokens in a row, above this model's maximum "
            f"{signature.max_global}; mark fewer, or export again with --max-global {most}"
        )


def _stack(rows: list[NDArray[Any]], width: int, fill: int) -> Int64:
    out = np.full((len(rows), *rows[0].shape[:-1], width), fill, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[..., : row.shape[-1]] = row
    return out
