"""A text that a model writes, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfx.errors import ArtifactError, InputError
from lfx.runtime.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # the decoder's character for bytes that are no whole character yet


@dataclass(frozen=True)
class WrittenToken:
    """A generated token.

    Attributes:
        text: the characters that it completes; a character whose bytes are in several tokens comes with the last one.
            Bytes before an end token that are no whole character are in the text's end alone, as U+FFFD. For a special
            token, its entry in the vocabulary, which is no part of the text. Spaces that `Tokenizer.decode` removes
            from the whole text are in the texts of tokens.
        special: whether it is a special token.
        last: whether it ends the text.
    """

    id: int
    text: str
    special: bool
    last: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The token as JSON types, in the form of text-generation-inference."""
        return {"id": self.id, "text": self.text, "logprob": None, "special": self.special}


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Attributes:
        ids: the generated tokens, without the start token.
        text: their text, without special tokens.
        tokens: number of tokens of the input.
        ended: whether it ends with an end token.
    """

    ids: list[int]
    text: str
    tokens: int
    ended: bool


class TokenTexts:
    """The characters that each token adds to a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text = ""

    def add(self, token: int, *, last: bool = False) -> WrittenToken:
        """Add the next token.

        Raises:
            ArtifactError: the tokenizer does not have the id.
        """
        self._ids.append(token)
        text = decoded(self._tokenizer, self._ids, clean_up=False)  # whose end would change after it was sent
        if self._tokenizer.is_special(token):
            return WrittenToken(token, self._tokenizer.piece(token), special=True, last=last)
        if not last:
            text = text.rstrip(_INCOMPLETE)
        added, self._text = text[_shared(self._text, text) :], text
        return WrittenToken(token, added, special=False, last=last)


def _shared(before: str, after: str) -> int:
    """Number of characters at the start that two texts share."""
    if after.startswith(before):
        return len(before)
    # A decoder may change the end of the text before, as those do that remove the space before a comma.
    return next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))


def decoded(tokenizer: Tokenizer, ids: list[int], *, clean_up: bool = True) -> str:
    """The text of generated ids; `clean_up` as for `Tokenizer.decode`.

    Raises:
        ArtifactError: the tokenizer does not have an id.
    """
    try:
        return tokenizer.decode(ids, clean_up=clean_up)
    except InputError as error:
        raise ArtifactError(str(error)) from error
