"""Converts text to ids and back with the tokenizer of a bundle."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lfx.checks import file_path, whole_number
from lfx.errors import ArtifactError, InputError, LengthError, LfxError, one_line
from lfx.files import is_same
from lfx.runtime.text_files import (
    CONFIG,
    PROMPTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    json_object,
    listed_files,
    read_listed,
    text_files,
)
from lfx.signature import SENTENCE_EMBEDDING, TASKS, Signature

END_TO_END = 0  # stride of windows without overlap: each begins at the end of the one before it
MAX_CHARACTERS = 5_000_000  # of a text and its pair; the tokenizers library takes 200 bytes of memory for each
_MAX_ID = 2**32 - 1  # of the tokenizers library
# What transformers replaces in a text if `clean_up_tokenization_spaces` is set, one after the other.
_CLEANED_UP = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")},
}


@dataclass(frozen=True)
class Encoded:
    """A tokenized text.

    Attributes:
        ids: ids of the tokens, special tokens included.
        pieces: the vocabulary entry of each token; of a token that is unknown to a Unigram tokenizer, its characters.
        document: positions in `ids` of the document's tokens, which are those of the pair if there is one; None if it
            is not known.
        text: the document, or the whole document of a window.
        offsets: first character and character past the end in `text` of each document token; empty for tasks that
            take no pair.
    """

    ids: list[int]
    pieces: list[str]
    document: range | None = None
    text: str = ""
    offsets: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class TokenText:
    """A token, and its characters in the text.

    Attributes:
        before: the characters between the previous token and this one, such as a space.
        text: the token's characters; empty if the previous token has them already. For a special token, its entry in
            the vocabulary.
        special: whether it is a special token.
    """

    before: str
    text: str
    special: bool


def encode_ids(
    ids: Sequence[int], attention_mask: Sequence[int] | None = None
) -> tuple[Encoded, NDArray[np.int64] | None]:
    """Make the encoding of ids whose text is not known; its pieces are the ids.

    Returns:
        The encoding of the real tokens, and their positions in `ids`; None instead of the positions if all are real.
    """
    real = range(len(ids)) if attention_mask is None else [i for i, bit in enumerate(attention_mask) if bit == 1]
    kept = [int(ids[i]) for i in real]
    return Encoded(kept, [str(i) for i in kept]), None if len(real) == len(ids) else np.array(real, np.int64)


class Windows(Sequence[Encoded]):
    """A lazy sequence of windows: slices of one long document between the same first and last tokens.

    Args:
        encoded: the whole text: special tokens and question, the document, special tokens. The document has more than
            `size` tokens.
        size: number of document tokens in a window.
        stride: number of tokens from the start of a window to the start of the next, 1 to `size`.
    """

    def __init__(self, encoded: Encoded, size: int, stride: int) -> None:
        assert encoded.document is not None
        document = encoded.document
        count = 1 + -(-(len(document) - size) // stride)
        self._encoded, self._document, self._size = encoded, document, size
        self._starts = range(document.start, document.start + count * stride, stride)

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
        stop = min(start + self._size, last)
        whole = self._encoded
        return Encoded(
            whole.ids[:first] + whole.ids[start:stop] + whole.ids[last:],
            whole.pieces[:first] + whole.pieces[start:stop] + whole.pieces[last:],
            range(first, first + stop - start),
            whole.text,
            whole.offsets[start - first : stop - first],
        )


class Tokenizer:
    """The tokenizer of a bundle. Thread-safe: nothing changes it after it is loaded.

    Args:
        folder: a bundle that `lfx export` wrote, or another folder with a tokenizer.json.
        signature: signature of the model that takes the ids.
        unlisted: whether to read the files of a bundle even if its lfx.json does not list them. Default: False.
        config_folder: folder of the config.json that has the labels, and of config_sentence_transformers.json. Default:
            `folder`.
        listed: the files of the bundle in `config_folder` that an Engine has opened, from its manifest: a bundle that
            has replaced it is refused. Default: those that the lfx.json in the folder lists now.
    Attributes:
        folder, signature, config_folder: the arguments.
        config, tokenizer_config: content of config.json and of tokenizer_config.json; None if there is no such file.
        prompt: is put before a text for sentence embeddings: the default prompt of sentence-transformers, or empty.
        lets_threads_run: whether other threads run while a text is tokenized. tokenizers then warns in a process that
            forks later, unless TOKENIZERS_PARALLELISM is set. Default: False.
        sha256: one digest of the files that decide ids and answers: tokenizer.json, config.json, tokenizer_config.json
            and, for sentence embeddings, config_sentence_transformers.json.
    Raises:
        ArtifactError: the folder has no tokenizer, the tokenizer is broken, or a folder is a bundle with a file of
            these that its lfx.json does not list or that was changed after the export.
        InputError: `signature` is no Signature.
    """

    _cleans_up = False
    lets_threads_run = False

    def __init__(
        self,
        folder: Path,
        signature: Signature,
        *,
        unlisted: bool = False,
        config_folder: Path | None = None,
        listed: Mapping[str, Any] | None = None,
    ) -> None:
        from tokenizers import Tokenizer

        check_signature(signature)
        self.folder = file_path(folder, "the tokenizer's folder", ArtifactError)
        self.config_folder = self.folder
        if config_folder is not None:
            self.config_folder = file_path(config_folder, "config_folder", ArtifactError)
        listed_configs = listed_texts = None
        if config_folder is not None or not unlisted:
            listed_configs = listed if listed is not None else listed_files(self.config_folder)
        if not unlisted:
            listed_texts = listed_configs if config_folder is None else listed_files(self.folder)
        path = self.folder / TOKENIZER
        data = read_listed(path, listed_texts)
        if data is None:
            if self.folder.is_file():
                raise ArtifactError(f"{self.folder} is a file; give the folder that has its {TOKENIZER}")
            raise ArtifactError(
                f"{self.folder} has no {TOKENIZER}, since its checkpoint had no tokenizer; give ids to Engine.run "
                "instead, name a folder that has one with --tokenizer, or export a checkpoint that has one"
            )
        with failing(ArtifactError, f"{path} cannot be read", "export the model again"):
            self._tokenizer = Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if getattr(self._tokenizer.model, "dropout", None):  # it would give a text other ids at each call
                self._tokenizer.model.dropout = None
            # An added token that takes the spaces beside it, such as RoBERTa's <mask>, has them in `Encoding.tokens`.
            self._added = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.config = config = read_listed(self.config_folder / CONFIG, listed_configs)
        self.tokenizer_config = tokenizer_config = read_listed(self.folder / TOKENIZER_CONFIG, listed_texts)
        self._splits = _splits_special_tokens(tokenizer_config, self.folder / TOKENIZER_CONFIG)
        self._tokenizer.encode_special_tokens = self._splits
        self._keeps_end = _keeps_end(tokenizer_config, self.folder / TOKENIZER_CONFIG)
        self._cleans_up = _cleans_up(tokenizer_config, self.folder / TOKENIZER_CONFIG, self._tokenizer.model)
        self.prompt, files = "", [data, config, tokenizer_config]
        if signature.task == SENTENCE_EMBEDDING:
            path = self.config_folder / PROMPTS
            files.append(read_listed(path, listed_configs))
            self.prompt = _default_prompt(files[-1], path)
        self.sha256 = _digest(*files)
        self.signature = signature

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = self._splits  # the library's pickles and copies do not keep it

    def encode(self, text: str, pair: str | None = None, *, prompt: str | None = None) -> Encoded:
        """Tokenize a text, or a pair of texts, with the model's special tokens.

        Args:
            text: any text; the question, for question-answering.
            pair: the second text, such as the document of a question. Default: none.
            prompt: is put before the text. Default: the attribute `prompt`.
        Returns:
            The ids and pieces, 1 to max_seqlen tokens; a longer text is an error and is never truncated.
        Raises:
            InputError: an argument is no text, the tokenizer fails on it or has no tokens for it, it has more tokens
                than the model takes, or more than 5,000,000 characters.
        """
        encoded = self._tokenize(text, pair, prompt)
        limit = self.signature.max_seqlen
        if limit is not None and len(encoded.ids) > limit:
            raise LengthError(
                f"the text has {len(encoded.ids)} tokens, above the model's maximum {limit}; shorten or split it "
                "(lfx run --stride cuts the documents of a .jsonl file)"
            )
        return encoded

    def windows(self, text: str, pair: str | None, stride: int, *, prompt: str | None = None) -> Sequence[Encoded]:
        """Tokenize a text of any length into windows of at most max_seqlen tokens.

        Args:
            text: the document, or the question if there is a pair.
            pair: the document of a question, every window of which begins with the question; or a choice, with which
                every window of the text ends.
            stride: number of tokens from the start of a window to the start of the next, 1 or more; END_TO_END for
                windows without overlap.
            prompt: is put before the document, so that the first window begins with it. Default: the attribute
                `prompt`.
        Returns:
            The windows in order, one for a short text. They are slices of one encoding, each made when it is indexed.
        Raises:
            InputError: the stride is above the window's number of document tokens, the question leaves no room for the
                document, or `encode` refuses the text for another reason than its length.
        """
        stride = whole_number(stride, "stride", END_TO_END)
        encoded = self._tokenize(text, pair, prompt)
        limit = self.signature.max_seqlen
        if limit is None or len(encoded.ids) <= limit:
            return [encoded]
        fixed = len(encoded.ids) - len(encoded.document or ())
        size = limit - fixed
        if size < 1:
            kept, cut = ("choice", "text before it") if self.signature.has_choices else ("question", "document")
            raise InputError(
                f"the {kept} and the special tokens have {fixed} tokens, which leave no room for the {cut} in the "
                f"model's maximum {limit}; shorten the {kept}"
            )
        stride = size if stride == END_TO_END else stride
        if stride > size:
            raise InputError(
                f"stride {stride} does not fit: a window has room for {size} tokens of the document, so give 1 to "
                f"{size}"
            )
        return Windows(encoded, size, stride)

    def truncate(self, text: str, pair: str | None = None, *, prompt: str | None = None) -> Encoded:
        """Encode a text or a pair; of a document with more tokens than the model takes, keep the beginning.

        For multiple choice `pair` is a choice, which is kept whole, and the document is `text`.
        If the truncation_side of tokenizer_config.json is "left", keep its end, as transformers does.

        Raises:
            InputError: what `windows` raises.
        """
        if self._keeps_end:
            return self.windows(text, pair, 1, prompt=prompt)[-1]
        return self.windows(text, pair, END_TO_END, prompt=prompt)[0]

    def _tokenize(self, text: str, pair: str | None, prompt: str | None) -> Encoded:
        """Tokenize a text of any length."""
        _check_text(text, pair)
        if not isinstance(prompt, str | None):
            raise InputError(f"prompt is {type(prompt).__name__}; give a string, or leave it out")
        if prompt := self.prompt if prompt is None else prompt:
            text = prompt + text  # not an f-string, which would format an Enum of strings by its name
            _check_text(text, pair)
        with failing(InputError, "the tokenizer fails on this text", "use the tokenizer that belongs to this model"):
            encoding = self._encode(text, pair)
            ids, sequences = list(encoding.ids), list(encoding.sequence_ids)
            pieces = [
                piece if self._added.get(i) != piece.strip() else piece.strip()
                for i, piece in zip(ids, encoding.tokens, strict=True)
            ]
            offsets = encoding.offsets if TASKS[self.signature.task].needs_pair else []
            special = self._tokenizer.num_special_tokens_to_add(pair is not None)
        if not ids:
            raise InputError("the tokenizer has no tokens for this text; leave it out")
        if sequences.count(None) != special:
            raise InputError(
                "the tokenizer's post-processor repeats the text, which no model here is trained for; use the "
                "tokenizer that belongs to this model"
            )
        index, source = (0, text) if pair is None or self.signature.has_choices else (1, pair)
        first = sequences.index(index) if index in sequences else 0
        document = range(first, first + sequences.count(index))
        return Encoded(ids, pieces, document, source, offsets[document.start : document.stop])

    def _encode(self, text: str, pair: str | None) -> Any:
        if self.lets_threads_run:
            return self._tokenizer.encode_batch([text if pair is None else (text, pair)])[0]
        return self._tokenizer.encode(text, pair)

    def token_texts(self, text: str, pair: str | None = None) -> list[TokenText]:
        """The tokens of `encode` for a text or a pair, each with its characters; raises the errors of `encode`."""
        encoded, prompted = self.encode(text, pair), self.prompt + text
        with failing(InputError, "the tokenizer fails on this text", "use the tokenizer that belongs to this model"):
            encoding = self._tokenizer.encode(prompted, pair)
            offsets, sequences = list(encoding.offsets), list(encoding.sequence_ids)
        sources, ends = (prompted, pair or ""), [0, 0]
        texts = []
        for piece, (start, end), sequence in zip(encoded.pieces, offsets, sequences, strict=True):
            if sequence is None:
                texts.append(TokenText("", piece, special=True))
                continue
            source, last = sources[sequence], ends[sequence]
            texts.append(TokenText(source[last:start], source[max(start, last) : end], special=False))
            ends[sequence] = max(end, last)
        return texts

    def decode(self, ids: Iterable[int], *, clean_up: bool = True) -> str:
        """Convert ids to text as transformers does, without special tokens and surrounding white space.

        Args:
            clean_up: remove the spaces that transformers removes; otherwise the text only grows with its ids.
        Raises:
            InputError: `ids` are no ids, or one is not in the vocabulary.
        """
        with failing(InputError, "the tokenizer fails on these ids", "use the tokenizer that belongs to this model"):
            tokens = [whole_number(token, "id", 0, _MAX_ID) for token in ids]
            for token in tokens:
                if self._tokenizer.id_to_token(token) is None:
                    raise InputError(
                        f"id {token} is not in the tokenizer's vocabulary; use the tokenizer that belongs to this model"
                    )
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        for spaced, cleaned in _CLEANED_UP.items() if clean_up and self._cleans_up else ():
            text = text.replace(spaced, cleaned)
        return text.strip()

    def piece(self, token: int) -> str:
        """The vocabulary entry of an id; empty if the vocabulary does not have it.

        Raises:
            InputError: `token` is no id.
        """
        return self._tokenizer.id_to_token(whole_number(token, "id", 0, _MAX_ID)) or ""

    def is_special(self, token: int) -> bool:
        """Whether an id is a special token, which `decode` leaves out; raises the error of `piece`."""
        added = self._tokenizer.get_added_tokens_decoder().get(whole_number(token, "id", 0, _MAX_ID))
        return added is not None and bool(added.special)

    def ends(self) -> tuple[list[int], list[int]]:
        """The special tokens that `encode` puts before a text, and after it."""
        with failing(InputError, "the tokenizer fails on a letter", "use the tokenizer that belongs to this model"):
            encoding = self._tokenizer.encode("a")
            ids, sequences = list(encoding.ids), list(encoding.sequence_ids)
        if 0 not in sequences:
            return [], []
        return ids[: sequences.index(0)], ids[len(ids) - sequences[::-1].index(0) :]

    def has_id(self, token: int) -> bool:
        """Whether an id is in the vocabulary; raises the error of `piece`."""
        return self._tokenizer.id_to_token(whole_number(token, "id", 0, _MAX_ID)) is not None

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None if the vocabulary does not have it."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index


def check_signature(signature: Any) -> None:
    """Check an argument that must be a Signature.

    Raises:
        InputError: it is not.
    """
    if not isinstance(signature, Signature):
        raise InputError(f"signature is {type(signature).__name__}; give the signature of an Engine")


def _check_text(text: Any, pair: Any) -> None:
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise InputError(f"text and pair are {type(text).__name__} and {type(pair).__name__}; give strings")
    if (length := len(text) + len(pair or "")) > MAX_CHARACTERS:
        raise InputError(
            f"the text has {length:,} characters, above the {MAX_CHARACTERS:,} that are tokenized at a time; split it"
        )
    if not (is_utf8(text) and is_utf8(pair or "")):
        raise InputError("the text is not UTF-8; convert it first")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode a string: it has no lone surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _splits_special_tokens(data: bytes | None, path: Path) -> bool:
    """Whether special tokens in a text are tokenized as text; transformers keeps this in the tokenizer's config."""
    split = json_object(data, path).get("split_special_tokens")
    if not isinstance(split, bool | None):
        raise ArtifactError(
            f"{path}: split_special_tokens must be true, false or null; correct it, or export the model again"
        )
    return bool(split)


def _cleans_up(data: bytes | None, path: Path, model: Any) -> bool:
    """Whether transformers removes spaces from decoded texts; of a BPE tokenizer it does so on a second request only.

    transformers 4 wrote the first key for most tokenizers.
    """
    settings, name = json_object(data, path), "clean_up_tokenization_spaces"
    forced = settings.get(f"{name}_for_bpe_even_though_it_will_corrupt_output")
    return bool(settings.get(name)) and (type(model).__name__ != "BPE" or bool(forced))


def _keeps_end(data: bytes | None, path: Path) -> bool:
    """Whether the end of a text that is too long is kept: truncation_side is "left" in the tokenizer's config."""
    side = json_object(data, path).get("truncation_side")
    if side not in ("left", "right", None):
        raise ArtifactError(f"{path}: truncation_side must be left or right; correct it, or export the model again")
    return bool(side == "left")


def _default_prompt(data: bytes | None, path: Path) -> str:
    """The prompt that sentence-transformers puts before a text by default; empty if there is none."""
    settings = json_object(data, path)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return ""
    # sentence-transformers defines these two prompts for every model; they are empty unless the checkpoint sets them.
    known = {"query": "", "document": "", **prompts} if isinstance(prompts, dict) else {}
    prompt = known.get(name) if isinstance(name, str) else None
    if not isinstance(prompt, str) or not is_utf8(prompt):
        raise ArtifactError(f"{path}: default_prompt_name names no prompt; correct it, or export the model again")
    return prompt


def open_tokenizer(model: Path, manifest: Any, signature: Signature, given: Path | None = None) -> Tokenizer:
    """Open the tokenizer in the folder `given`, or the model's own; labels are those of the model's config, if any.

    Args:
        model: the bundle, the .onnx file or the plan.
        manifest, signature: `text_source` and `signature` of an Engine that opened it.
        given: folder of a tokenizer that replaces the model's; None = the model's.
    Raises:
        ArtifactError: there is no tokenizer, or it is broken.
    """
    folder, listed = text_files(model, manifest)
    if given is None:
        return Tokenizer(folder, signature, listed=listed)
    has_config = (folder / CONFIG).exists() and not is_same(folder, given)
    return Tokenizer(given, signature, unlisted=True, config_folder=folder if has_config else None, listed=listed)


def _digest(*files: bytes | None) -> str:
    """One digest of several files' contents; None is a file that does not exist."""
    parts = (hashlib.sha256(data).hexdigest() if data is not None else "none" for data in files)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def failing(error: type[LfxError], failure: str, cure: str) -> Iterator[None]:
    """Convert an exception of the tokenizers library to an LfxError.

    The library's Rust code may panic, and its PanicException is a BaseException.

    Args:
        error: the type of LfxError to raise.
        failure: what failed, for the message.
        cure: what to do, for the message.
    """
    try:
        yield
    except (LfxError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as problem:
        raise error(f"{failure}: {one_line(problem)}; {cure}") from problem
