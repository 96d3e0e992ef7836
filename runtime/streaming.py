"""`Engine.stream`: reads documents some at a time, and yields their outputs in the order given."""

from __future__ import annotations

import itertools
from collections import UserString
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lfx.errors import InputError, LfxError
from lfx.runtime.batch_runner import BatchRunner
from lfx.runtime.inputs import Feeds, prepare
from lfx.signature import Signature

# Number of sequences that `Engine.stream` reads and sorts by length at a time.
AHEAD = 256


def iterator_of(documents: Any) -> Iterator[Any]:
    """The iterator of an iterable of documents.

    Raises:
        InputError: `documents` is one text, bytes or a mapping, or not iterable.
    """
    problem = f"documents is {type(documents).__name__}; give an iterable of sequences of integers"
    if isinstance(documents, str | bytes | bytearray | memoryview | UserString | Mapping):
        raise InputError(problem)
    try:
        return iter(documents)
    except TypeError as error:
        raise InputError(problem) from error


def stream_rows(
    documents: Iterator[Any],
    ahead: int,
    signature: Signature,
    open_runner: Callable[[], BatchRunner],
    *,
    keep_errors: bool,
) -> Iterator[Any]:
    """Run documents; see `Engine.stream`.

    Args:
        open_runner: called for each `ahead` documents; raises an error if the model is closed by then.
    """
    indices = itertools.count()
    # A document is copied before the next one is read, which may be the same object with new content.
    while sequences := [
        _prepare_document(document, index, signature, keep_error=keep_errors)
        for document, index in zip(itertools.islice(documents, ahead), indices, strict=False)
    ]:
        yield from open_runner().run_rows(sequences, keep_errors=keep_errors)


def _prepare_document(document: Any, index: int, signature: Signature, *, keep_error: bool) -> Feeds | LfxError:
    try:
        try:
            sequences = prepare(document, None, None, signature)
        except InputError as error:
            raise InputError(f"document {index}: {error}") from error
        if len(sequences) != 1:
            raise InputError(f"document {index} has {len(sequences)} sequences; give each as a document of its own")
    except InputError as error:
        if keep_error:
            return error
        raise
    return sequences[0]
