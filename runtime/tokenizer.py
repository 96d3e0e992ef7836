"""Texts to ids, and back, with the tokenizer that a bundle carries."""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lfx.checks import file_path, whole_number
from lfx.errors import ArtifactError, InputError, LfxError, one_line
from lfx.signature import Signature

TOKENIZER, CONFIG, TOKENIZER_CONFIG = "tokenizer.json", "config.json", "tokenizer_config.json"
END_TO_END = 0  # a stride: each window begins where the one before it ends
LARGEST_FILE = 1 << 29  # bytes of a tokenizer or a config; the largest tokenizers known have a tenth of that


@dataclass(frozen=True)
class Encoded:
    """One text as the model sees it: ids, and for each token its piece of the text."""

    ids: list[int]
    pieces: list[str]


class Windows(Sequence[Encoded]):
    """Overlapping slices of one encoding, each between the same first and last tokens, made when it is asked for.

    Args:
        whole: special tokens and question, the document, special tokens.
        document: positions of the document's tokens in it; more than `room`.
        room: tokens of the document in a window.
        stride: tokens from the beginning of one window to that of the next, 1 to `room`.
    """

    def __init__(self, whole: Encoded, document: range, room: int, stride: int) -> None:
        number = 1 + -(-(len(document) - room) // stride)
        self._whole, self._document, self._room = whole, document, room
        self._starts = range(document.start, document.start + number * stride, stride)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self._window(start) for start in self._starts[index]]
        return self._window(self._starts[index])

    def _window(self, start: int) -> Encoded:
        first, last = self._document.start, self._document.stop
        stop = min(start + self._room, last)
        ids, pieces = self._whole.ids, self._whole.pieces
        return Encoded(ids[:first] + ids[start:stop] + ids[last:], pieces[:first] + pieces[start:stop] + pieces[last:])


class Tokenizer:
    """The tokenizer of a bundle. Thread-safe: it is not changed after it is loaded.

    Args:
        folder: the bundle that `lfx export` wrote, or another folder with the files of a tokenizer.
        signature: of the model that the ids are for.
    Attributes:
        folder, signature: as given.
        sha256: of the files that decide ids and answers: the tokenizer and the two configs.
    Raises:
        ArtifactError: the folder has no tokenizer, or a broken one.
        InputError: `signature` is none.
    """

    def __init__(self, folder: Path, signature: Signature) -> None:
        from tokenizers import Tokenizer

        if not isinstance(signature, Signature):
            raise InputError(f"signature is {type(signature).__name__}; give the signature of an Engine")
        self.folder = file_path(folder, "the tokenizer's folder", ArtifactError)
        path = self.folder / TOKENIZER
        data = read_file(path)
        if data is None:
            raise ArtifactError(
                f"{self.folder} has no {TOKENIZER}, since its checkpoint had no tokenizer; give ids to Engine.run "
                "instead, name a folder that has one with --tokenizer, or export a checkpoint that has one"
            )
        with failing(ArtifactError, f"{path} cannot be read", "export the model again"):
            self._tokenizer = Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self.sha256 = _digest(data, *(read_file(self.folder / name) for name in (CONFIG, TOKENIZER_CONFIG)))
        self.signature = signature

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Tokenize, with the special tokens of the model.

        Raises:
            InputError: no text, a text that the tokenizer fails on or has no tokens for, or more tokens than the model
                takes; nothing is cut in silence.
        """
        encoded, _ = self._tokenize(text, pair)
        limit = self.signature.max_seqlen
        if limit is not None and len(encoded.ids) > limit:
            raise InputError(
                f"the text has {len(encoded.ids)} tokens, above the model's maximum {limit}; shorten or split it "
                "(lfx run --stride cuts the documents of a .jsonl file)"
            )
        return encoded

    def windows(self, text: str, pair: str | None, stride: int) -> Sequence[Encoded]:
        """Tokenize a text of any length into windows that the model takes.

        Args:
            pair: the document, where `text` is a question; then the question stands before every window of it.
            stride: tokens from the beginning of one window to that of the next; END_TO_END for as many as fit.
        Returns:
            The windows in order. Each is a slice of one encoding and is made when it is asked for.
        Raises:
            InputError: a stride with which tokens would be left out, a question that leaves no room, or a text that
                `encode` refuses for another reason than its length.
        """
        stride = whole_number(stride, "stride", END_TO_END)
        whole, document = self._tokenize(text, pair)
        limit = self.signature.max_seqlen
        if limit is None or len(whole.ids) <= limit:
            return [whole]
        fixed = len(whole.ids) - len(document)
        room = limit - fixed
        if room < 1:
            raise InputError(
                f"the question and the special tokens have {fixed} tokens, which leave no room for the document in the "
                f"model's maximum {limit}; shorten the question"
            )
        stride = room if stride == END_TO_END else stride
        if stride > room:
            raise InputError(
                f"stride {stride} does not fit: a window has room for {room} tokens of the document, so give 1 to "
                f"{room}"
            )
        return Windows(whole, document, room, stride)

    def _tokenize(self, text: str, pair: str | None) -> tuple[Encoded, range]:
        """The whole text, and the positions of the document's tokens in it: of `pair`, or of a `text` without one."""
        _check_text(text, pair)
        with failing(InputError, "the tokenizer fails on this text", "use the tokenizer that belongs to this model"):
            encoding = self._tokenizer.encode(text, pair)
            encoded = Encoded(list(encoding.ids), list(encoding.tokens))
            sequences = list(encoding.sequence_ids)
            special = self._tokenizer.num_special_tokens_to_add(pair is not None)
        if not encoded.ids:
            raise InputError("the tokenizer has no tokens for this text; leave it out")
        if sequences.count(None) != special:
            raise InputError(
                "the tokenizer's post-processor repeats the text, which no model here is trained for; use the "
                "tokenizer that belongs to this model"
            )
        index = 0 if pair is None else 1
        first = sequences.index(index) if index in sequences else 0
        return encoded, range(first, first + sequences.count(index))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids.

        Raises:
            InputError: no ids, or an id that the tokenizer does not have.
        """
        with failing(InputError, "the tokenizer fails on these ids", "use the tokenizer that belongs to this model"):
            tokens = [whole_number(token, "id", 0, 2**32 - 1) for token in ids]
            for token in tokens:
                if self._tokenizer.id_to_token(token) is None:
                    raise InputError(
                        f"id {token} is not in the tokenizer's vocabulary; use the tokenizer that belongs to this model"
                    )
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def token_id(self, token: str) -> int | None:
        """The id of a token, given as the vocabulary has it; None where it is not there."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found


def _check_text(text: Any, pair: Any) -> None:
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise InputError(f"text and pair are {type(text).__name__} and {type(pair).__name__}; give strings")
    if not all(is_utf8(given) for given in (text, pair or "")):
        raise InputError("the text is not UTF-8; convert it first")


def is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def read_file(path: Path) -> bytes | None:
    """A whole file; None where there is none.

    Raises:
        ArtifactError: it cannot be read, is no plain file, or is larger than any that belongs here.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} cannot be read: it is no file; export the model again")
        if status.st_size > LARGEST_FILE:
            raise ArtifactError(
                f"{path} has {status.st_size:,} bytes, above the {LARGEST_FILE:,} that lfx reads; export the "
                "model again"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {one_line(error)}; export the model again") from error


def _digest(*files: bytes | None) -> str:
    parts = (hashlib.sha256(data).hexdigest() if data is not None else "none" for data in files)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def failing(error: type[LfxError], what: str, cure: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into one of lfx's errors.

    Its Rust code may panic, and a panic is no Exception.
    """
    try:
        yield
    except (LfxError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as problem:
        raise error(f"{what}: {one_line(problem)}; {cure}") from problem
