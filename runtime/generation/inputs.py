"""The inputs of `Engine.generate`: ids, or texts and their ids."""

from __future__ import annotations

from collections import UserString
from collections.abc import Callable, Sequence
from typing import Any

from lfx.errors import InputError, LengthError, LfxError
from lfx.runtime.inputs import Feeds, prepare, prepare_each
from lfx.runtime.tokenizer import Tokenizer
from lfx.signature import Signature


def is_texts(inputs: Any) -> bool:
    """Whether the inputs are a text or a list of texts."""
    if isinstance(inputs, str | UserString):
        return True
    return isinstance(inputs, list | tuple) and len(inputs) > 0 and all(isinstance(item, str) for item in inputs)


def encode_texts(
    inputs: Any, masks: Sequence[Any], open_tokenizer: Callable[[], Tokenizer], *, truncate: bool, keep_errors: bool
) -> list[list[int] | LfxError]:
    """Tokenize texts; see `Engine.generate` for the arguments.

    Returns:
        The ids of each text; with `keep_errors` its error, if it cannot be encoded.
    Raises:
        InputError: masks are given, or a text cannot be encoded.
    """
    if any(mask is not None for mask in masks):
        raise InputError("masks are given with texts, whose tokens are not known; give ids, or leave the masks out")
    tokenizer = open_tokenizer()
    encode = tokenizer.truncate if truncate else tokenizer.encode
    encoded: list[list[int] | LfxError] = []
    for i, text in enumerate([str(inputs)] if isinstance(inputs, str | UserString) else inputs):
        try:
            encoded.append(encode(text).ids)
        except InputError as error:
            problem = type(error)(f"text {i}: {error}") if type(error) in (InputError, LengthError) else error
            if not keep_errors:
                raise problem from error
            encoded.append(problem)
    return encoded


def prepare_inputs(
    ids: Any, mask: Any, global_mask: Any, signature: Signature, *, keep_errors: bool
) -> list[Feeds | LfxError]:
    """`lfx.runtime.inputs.prepare`, or with `keep_errors` `prepare_each`."""
    if not keep_errors:
        return list(prepare(ids, mask, global_mask, signature))
    if not isinstance(ids, list) or not any(isinstance(item, LfxError) for item in ids):
        return list(prepare_each(ids, mask, global_mask, signature))
    return [item if isinstance(item, LfxError) else prepare_each([item], None, None, signature)[0] for item in ids]
