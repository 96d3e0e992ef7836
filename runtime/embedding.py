"""The texts of `Engine.embed`: their checks, and their ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lfx.checks import flag, is_iterable
from lfx.errors import ArtifactError, InputError
from lfx.runtime.tokenizer import Tokenizer
from lfx.signature import SENTENCE_EMBEDDING, Signature

SENTENCE_OUTPUT = "sentence_embedding"


def check_task(signature: Signature) -> None:
    """Raise InputError for a model of another task than sentence embeddings."""
    if signature.task != SENTENCE_EMBEDDING:
        raise InputError(
            f"embed needs a model of the task {SENTENCE_EMBEDDING}, and this one is for {signature.task}; export a "
            "checkpoint of sentence-transformers, or export with --pooling mean"
        )


def embedding_size(signature: Signature) -> int:
    """The number of values of a sentence embedding.

    Raises:
        ArtifactError: the model has no such output, or its shape is not (batch, size).
    """
    shape = next((spec.shape for spec in signature.outputs if spec.name == SENTENCE_OUTPUT), ())
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise ArtifactError(f"the model has no output {SENTENCE_OUTPUT} of (batch, size); export it again")
    return shape[1]


def encode_texts(texts: Any, tokenizer: Any, *, prompt: Any, truncate: Any) -> Iterator[list[int]]:
    """Yield the ids of each text; see `Engine.embed` for the arguments.

    Raises:
        InputError: at once for an argument of another type; while iterating for a text that cannot be encoded.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer is {type(tokenizer).__name__}; give a Tokenizer, or leave it out")
    if not isinstance(prompt, str | None):
        raise InputError(f"prompt is {type(prompt).__name__}; give a string, or leave it out")
    flag(truncate, "truncate")
    texts = [texts] if isinstance(texts, str) else texts  # first: a string of numpy has no axes
    is_table = getattr(texts, "ndim", 1) > 1  # iterating over one of pandas gives the names of its columns
    if isinstance(texts, bytes | bytearray | memoryview | Mapping) or not is_iterable(texts) or is_table:
        raise InputError(f"texts is {type(texts).__name__}; give a list of strings")
    return _encode(texts, tokenizer, prompt, truncate)


def _encode(texts: Iterable[Any], tokenizer: Tokenizer, prompt: str | None, truncate: bool) -> Iterator[list[int]]:
    for i, text in enumerate(texts):
        try:
            encoded = (tokenizer.truncate if truncate else tokenizer.encode)(text, prompt=prompt)
        except InputError as error:
            raise InputError(f"text {i}: {error}") from error
        yield encoded.ids
