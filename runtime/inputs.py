"""Checks ids and masks from the caller, chooses the default global tokens, and pads sequences into batches."""

from __future__ import annotations

import contextlib
import itertools
import numbers
from collections import UserString
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LengthError, one_line
from lfx.signature import Signature

Int64 = NDArray[np.int64]
Feeds = dict[str, Int64]  # input name -> array


def prepare(ids: Any, attention_mask: Any, global_attention_mask: Any, signature: Signature) -> list[Feeds]:
    """Check one batch, and make the graph inputs of each sequence; see `Engine.run` for the arguments.

    Returns:
        For each sequence: input name -> (1, seqlen) int64, for multiple choice (1, choices, seqlen).
    Raises:
        InputError: the model cannot take a length, shape, dtype, mask value or token id.
    """
    rows = _as_rows(ids, "input_ids", _IDS, signature)
    if len({row.shape[:-1] for row in rows}) > 1:
        raise InputError(f"input_ids have different numbers of choices; give {_shapes(signature)}")
    masks = _mask_rows(attention_mask, "attention_mask", rows, signature)
    global_masks = _mask_rows(global_attention_mask, "global_attention_mask", rows, signature)
    names = {spec.name for spec in signature.inputs}
    if global_masks is not None and "global_attention_mask" not in names:
        raise InputError(
            f"this model has its global attention fixed ({signature.global_attention}) and takes no "
            "global_attention_mask; leave it out, or export again with --global-attention mask"
        )
    batch = []
    for i, row in enumerate(rows):
        feeds = {"input_ids": row[None], "attention_mask": (np.ones_like(row) if masks is None else masks[i])[None]}
        if "global_attention_mask" in names:
            marks = default_global(row, signature) if global_masks is None else global_masks[i]
            _check_globals(marks * feeds["attention_mask"], signature)
            feeds["global_attention_mask"] = marks[None]
        if "attention_mask" not in names and not feeds["attention_mask"].all():
            raise InputError("this model takes no attention_mask, so no token can be masked; leave padding out")
        batch.append({name: feeds[name] for name in feeds if name in names})
    return batch


def prepare_each(
    ids: Any, attention_mask: Any, global_attention_mask: Any, signature: Signature
) -> list[Feeds | InputError]:
    """Check each sequence alone: like `prepare`, but an InputError of a sequence is returned at its index.

    A list of whole numbers only is one sequence (for multiple choice, a list of lists of whole numbers only). In any
    other list each item is a sequence, or that sequence's error.

    Raises:
        InputError: an argument cannot be split into sequences, or a mask has another number of sequences than the ids.
    """
    sequences = _split_each(ids, "input_ids", signature)
    masks = _split_mask(attention_mask, "attention_mask", len(sequences), signature)
    global_masks = _split_mask(global_attention_mask, "global_attention_mask", len(sequences), signature)
    return [_prepare_one(*arguments, signature) for arguments in zip(sequences, masks, global_masks, strict=True)]


def _prepare_one(ids: Any, mask: Any, global_mask: Any, signature: Signature) -> Feeds | InputError:
    rank = 2 if signature.has_choices else 1
    try:
        with _readable("input_ids", signature):
            depth = _depth(ids, rank)
        if depth < rank:
            raise InputError(f"input_ids is {type(ids).__name__}; give {_shapes(signature)}")
        mask, global_mask = (None if value is None else [value] for value in (mask, global_mask))
        return prepare([ids], mask, global_mask, signature)[0]
    except InputError as error:
        return error


def _split_mask(value: Any, name: str, count: int, signature: Signature) -> Sequence[Any] | NDArray[Any]:
    """The rows of a mask for `count` sequences; None for each where there is no mask."""
    if value is None:
        return [None] * count
    rows = _split_each(value, name, signature)
    if len(rows) != count:
        raise _other_count(name, len(rows), count)
    return rows


def _other_count(name: str, found: int, count: int) -> InputError:
    return InputError(f"{name} has {found} sequences, and input_ids has {count}; make them equal")


def stack(sequences: Sequence[Feeds], pad_token_id: int) -> Feeds:
    """Stack the prepared inputs of sequences into those of one batch, padded on the right to the longest.

    Returns:
        Input name -> (batch, seqlen) int64, for multiple choice (batch, choices, seqlen).
    Raises:
        InputError: the sequences have different numbers of choices.
    """
    shapes = {feeds["input_ids"].shape for feeds in sequences}
    if len({shape[:-1] for shape in shapes}) > 1:
        raise InputError("the sequences have different numbers of choices; run them one by one")
    width = max(shape[-1] for shape in shapes)
    return {
        name: _stack([feeds[name][0] for feeds in sequences], width, pad_token_id if name == "input_ids" else 0)
        for name in sequences[0]
    }


def pad_choices(choices: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Int64, Int64]:
    """Pad the ids of the choices of one example, on the right.

    Returns:
        The ids and the attention mask, both (choices, seqlen).
    """
    rows = [np.array(ids, np.int64) for ids in choices]
    width = max(map(len, rows))
    return _stack(rows, width, pad_token_id), _stack([np.ones_like(row) for row in rows], width, 0)


def seqlen_of(feeds: Feeds) -> int:
    """Number of tokens of a prepared sequence, or of each of its choices."""
    return int(feeds["input_ids"].shape[-1])


def default_global(input_ids: Int64, signature: Signature) -> Int64:
    """The global_attention_mask that Hugging Face's model of this task makes when the caller gives none.

    Raises:
        InputError: the model requires a global_attention_mask; or the rule needs three separator tokens in each
            sequence, and one has another number.
    """
    mask = np.zeros_like(input_ids)
    if signature.default_global == "required":
        raise InputError(
            "this model marks its global tokens by a rule of its own when it gets no global_attention_mask; give one"
        )
    if signature.default_global == "first":
        mask[..., 0] = 1
    elif signature.default_global in ("question", "after_question"):
        is_separator = input_ids == signature.sep_token_id
        counts = is_separator.sum(axis=-1)
        if (counts != 3).any():
            raise InputError(
                f"{signature.task} takes its global tokens from three separators (id {signature.sep_token_id}) in "
                f"every sequence, and one has {int(counts[counts != 3].flat[0])}; encode question and text as a "
                "pair, leave separators such as </s> out of both, give global_attention_mask, or, if the tokenizer "
                "puts one separator between two texts (BERT's), export with --global-attention none"
            )
        first = is_separator.argmax(axis=-1)[..., None]
        position = np.arange(input_ids.shape[-1])
        mask[...] = position < first if signature.default_global == "question" else position > first + 1
    return mask


@dataclass(frozen=True)
class _Values:
    """The values that an array of ids, or a mask, may have.

    Attributes:
        dtypes: numpy's letters (`dtype.kind`) of the allowed dtypes.
        rule: what the caller should give, for messages.
        check: raises InputError for a value that is not allowed.
    """

    dtypes: str
    rule: str
    check: Callable[[NDArray[Any], str, Signature], None]


def _as_rows(value: Any, name: str, values: _Values, signature: Signature, count: int | None = None) -> list[Int64]:
    """Read a batch into one int64 array for each sequence: (seqlen,), or (choices, seqlen) for multiple choice.

    Args:
        count: number of sequences that there must be; None = any.
    """
    items = _split(value, name, signature)
    if count is not None and len(items) != count:  # before they are read, of which there may be many
        raise _other_count(name, len(items), count)
    rank, several = 2 if signature.has_choices else 1, len(items) > 1
    with _readable(name, signature):
        return [
            _read(item, f"{name}[{i}]" if several else name, rank, values, signature) for i, item in enumerate(items)
        ]


def _split(value: Any, name: str, signature: Signature) -> Sequence[Any] | NDArray[Any]:
    """Split a batch into its sequences; one sequence is a batch of one."""
    if value is None or _is_text(value):
        raise InputError(f"{name} is {type(value).__name__}; give token ids: a list of integers or an integer array")
    with _readable(name, signature):
        return _sequences(value, name, signature)


def _split_each(value: Any, name: str, signature: Signature) -> Sequence[Any] | NDArray[Any]:
    """Like `_split`, but look at all items of a list, any of which may be wrong, and not at the first alone."""
    if _is_list(value) and not isinstance(value, range):  # a range is one sequence, and may be long
        with _readable(name, signature):
            items = itertools.islice(value, len(value) + 1)  # not copied: one sequence may be too long
            if not all(map(_are_numbers if signature.has_choices else _is_number, items)):
                return _items(value, name)
    return _split(value, name, signature)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not _is_text(value) and not hasattr(value, "__array__")


def _is_number(value: Any) -> bool:
    return isinstance(value, Integral | np.bool_) or (hasattr(value, "__array__") and np.ndim(value) == 0)


def _are_numbers(value: Any) -> bool:
    if hasattr(value, "__array__"):
        return bool(np.ndim(value) == 1)
    return isinstance(value, range) or (_is_list(value) and all(map(_is_number, value)))  # a range may be long


@contextlib.contextmanager
def _readable(name: str, signature: Signature) -> Iterator[None]:
    """Turn errors of the caller's object into InputError; it may raise any error, as a tensor on a GPU does."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} cannot be read as an array ({one_line(error)}); give {_shapes(signature)}") from error


def _sequences(value: Any, name: str, signature: Signature) -> Sequence[Any] | NDArray[Any]:
    rank = 2 if signature.has_choices else 1
    items: Sequence[Any] | NDArray[Any]
    if hasattr(value, "__array__"):
        array = _array(value, name)
        if array.ndim not in (rank, rank + 1):
            raise InputError(f"{name} has shape {array.shape}; give {_shapes(signature)}")
        items = [array] if array.ndim == rank else array
    elif not isinstance(value, Sequence):
        raise InputError(f"{name} is {type(value).__name__}; give {_shapes(signature)}")
    elif len(value) == 0:
        raise InputError(f"{name} is empty; give at least one sequence of at least one token")
    else:
        depth = _depth(value, rank + 2)
        if depth > rank + 1:
            raise InputError(f"{name} is nested too deeply; give {_shapes(signature)}")
        items = [value] if depth <= rank else _items(value, name)
    if len(items) == 0:
        raise InputError(f"{name} is an empty batch; give at least one sequence of at least one token")
    return items


def _read(value: Any, name: str, rank: int, values: _Values, signature: Signature) -> Int64:
    """Read one sequence, or its choices if `rank` is 2. The length is checked before anything is copied."""
    if hasattr(value, "__array__"):
        array = _array(value, name)
        if array.ndim != rank:
            raise InputError(f"{name} has shape {array.shape}; give {_shapes(signature)}")
        _check_length(array.shape[-1], name, signature)
    elif _is_text(value) or not isinstance(value, Sequence):
        raise InputError(f"{name} is {type(value).__name__}; give {_shapes(signature)}")
    elif rank == 2:
        if len(value) and _depth(value, 2) < 2:  # checked before its items are copied
            raise InputError(f"{name}[0] is {type(value[0]).__name__}; give {_shapes(signature)}")
        items = _items(value, name)
        choices = [_read(item, f"{name}[{i}]", 1, values, signature) for i, item in enumerate(items)]
        if len({len(choice) for choice in choices}) > 1:
            raise InputError(f"{name} is ragged inside; give {_shapes(signature)}")
        array = np.stack(choices) if choices else np.zeros(0)
    else:
        _check_length(len(value), name, signature)
        array = _array_of(_items(value, name), name, values, signature)
    if array.size == 0:
        raise InputError(f"{name} is an empty sequence; give at least one token")
    if array.dtype.kind not in values.dtypes:
        raise InputError(f"{name} has dtype {array.dtype}; {values.rule}")
    array = array.copy()  # copied before it is checked: another thread may change the caller's array
    values.check(array, name, signature)
    return array.astype(np.int64, copy=False)


def _depth(value: Any, limit: int) -> int:
    """Number of axes of nested sequences, by their first items, up to `limit`: a list may contain itself."""
    for depth in range(limit):
        if hasattr(value, "__array__"):
            return depth + int(np.ndim(value))
        if _is_text(value) or not isinstance(value, Sequence):
            return depth
        if len(value) == 0:
            return depth + 1
        value = value[0]
    return limit


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes | bytearray | memoryview | UserString)


def _items(value: Sequence[Any], name: str) -> list[Any]:
    """Copy the items of a sequence, and check their number: `__len__` of the caller's class may be wrong."""
    length = len(value)
    items = list(itertools.islice(value, length + 1))
    if len(items) != length:
        raise InputError(f"{name} has a length of {length}, but not that number of items; give a list")
    return items


def _array(value: Any, name: str) -> NDArray[Any]:
    """Convert an object with `__array__`; refuses numpy's masked arrays."""
    array = np.asanyarray(value)
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{name} is a masked array, whose mask would be lost; give its data, and what it masks as attention_mask"
        )
    return np.asarray(array)


def _array_of(items: list[Any], name: str, values: _Values, signature: Signature) -> NDArray[Any]:
    """Convert a list of numbers to a 1-D array."""
    if all(type(item) is int for item in items):
        try:
            return np.array(items, dtype=np.int64)
        except OverflowError as error:
            raise InputError(f"{name} has a number that does not fit 64 bits; {values.rule}") from error
    for i, item in enumerate(items):
        if isinstance(item, Sequence) and not _is_text(item):
            raise InputError(f"{name} is ragged inside; give {_shapes(signature)}")
        if hasattr(item, "__array__") and not isinstance(item, np.generic):
            items[i] = _array(item, f"{name}[{i}]")[()]  # an array without axes becomes a number
        if not isinstance(items[i], numbers.Number | np.generic):
            raise InputError(f"{name} holds {type(item).__name__}, not single integers; give {_shapes(signature)}")
        if isinstance(items[i], bool | np.bool_) and "b" not in values.dtypes:
            raise InputError(f"{name} has dtype bool at {i}; {values.rule}")
    # numpy converts a list of int64 and uint64 to float64, so integers are converted to int first.
    are_integers = all(isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in items)
    return _array_of([int(item) for item in items], name, values, signature) if are_integers else np.array(items)


def _shapes(signature: Signature) -> str:
    """The allowed forms of ids and masks, for messages."""
    if signature.has_choices:
        return "an integer array (batch, choices, seqlen) or (choices, seqlen)"
    return "one sequence of integers, a list of sequences, or an integer array (batch, seqlen)"


def _check_length(length: int, name: str, signature: Signature) -> None:
    if signature.max_seqlen is not None and length > signature.max_seqlen:
        raise LengthError(
            f"{name} has {length} tokens, above the model's maximum {signature.max_seqlen}; cut or split it"
        )


def _check_ids(ids: NDArray[Any], name: str, signature: Signature) -> None:
    low, high = int(ids.min()), int(ids.max())
    if high > np.iinfo(np.int64).max:
        raise InputError(f"{name} has id {high}, which does not fit 64 bits")
    if low < 0:
        raise InputError(f"{name} has the negative id {low}; ids start at 0")
    if signature.vocab_size is not None and high >= signature.vocab_size:
        raise InputError(
            f"{name} has id {high}, outside the vocabulary of {signature.vocab_size}; "
            "use the tokenizer that belongs to this model"
        )


def _check_mask(mask: NDArray[Any], name: str, signature: Signature) -> None:
    others = mask[(mask != 0) & (mask != 1)]
    if others.size > 0:
        raise InputError(f"{name} has the value {others.flat[0]}; masks hold 0 and 1 only")


_IDS = _Values("iu", "give integers", _check_ids)
_MASK = _Values("biuf", "masks hold 0 and 1 only", _check_mask)


def _mask_rows(value: Any, name: str, rows: list[Int64], signature: Signature) -> list[Int64] | None:
    """Read a mask whose shape must be that of the ids in `rows`; None stays None."""
    if value is None:
        return None
    masks = _as_rows(value, name, _MASK, signature, len(rows))
    if [m.shape for m in masks] != [r.shape for r in rows]:
        raise InputError(f"{name} has shape {_shape_of(masks)} where input_ids has {_shape_of(rows)}; make them equal")
    return masks


def _shape_of(rows: list[NDArray[Any]]) -> str:
    shapes = [row.shape for row in rows]
    if len(set(shapes)) == 1:
        return str((len(rows), *shapes[0]))
    return f"lengths {[shape[-1] for shape in shapes]}"


def _check_globals(global_mask: Int64, signature: Signature) -> None:
    if signature.max_global is None:
        return
    largest = int(global_mask.sum(axis=-1).max())
    if largest > signature.max_global:
        raise InputError(
            f"global_attention_mask has {largest} global tokens in a row, above this model's maximum "
            f"{signature.max_global}; mark fewer, or export again with --max-global {largest}"
        )


def _stack(rows: list[NDArray[Any]], width: int, fill: int) -> Int64:
    """Stack sequences into (batch, width) or (batch, choices, width), padded on the right with `fill`."""
    out = np.full((len(rows), *rows[0].shape[:-1], width), fill, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[..., : row.shape[-1]] = row
    return out
