"""Text in and answers out, with the tokenizer and labels that a bundle carries."""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lfx.checks import file_path, parse_json, whole_number
from lfx.errors import ArtifactError, InputError, LfxError, one_line
from lfx.signature import Signature, is_multi_label

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


class Text:
    """The tokenizer and the labels of a bundle. Thread-safe: the tokenizer is not changed after it is loaded.

    Args:
        bundle: the folder that `lfx export` wrote.
    Attributes:
        sha256: of the files that decide ids and answers: the tokenizer and the two configs.
    Raises:
        ArtifactError: the bundle has no tokenizer, or a broken one, or a broken config.
    """

    def __init__(self, bundle: Path, signature: Signature) -> None:
        from tokenizers import Tokenizer

        if not isinstance(signature, Signature):
            raise InputError(f"signature is {type(signature).__name__}; give the signature of an Engine")
        bundle = file_path(bundle, "the tokenizer's folder", ArtifactError)
        path = bundle / TOKENIZER
        data = _read(path)
        if data is None:
            raise ArtifactError(
                f"{bundle} has no {TOKENIZER}, since its checkpoint had no tokenizer; give ids to Engine.run instead, "
                "name a folder that has one with --tokenizer, or export a checkpoint that has one"
            )
        with _failing(ArtifactError, f"{path} cannot be read", "export the model again"):
            self._tokenizer = Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self.sha256 = _digest(data, *(_read(bundle / name) for name in (CONFIG, TOKENIZER_CONFIG)))
        self._signature = signature
        self._labels, self._problem = _labels(bundle / CONFIG)
        mask = _mask_token(bundle / TOKENIZER_CONFIG)
        with _failing(ArtifactError, f"{bundle / TOKENIZER_CONFIG} has a broken mask_token", "export the model again"):
            self._mask_id: int | None = self._tokenizer.token_to_id(mask)

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Tokenize, with the special tokens of the model.

        Raises:
            InputError: no text, a text that the tokenizer fails on or has no tokens for, or more tokens than the model
                takes; nothing is cut in silence.
        """
        encoded, _ = self._tokenize(text, pair)
        limit = self._signature.max_seqlen
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
        limit = self._signature.max_seqlen
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
        with _failing(InputError, "the tokenizer fails on this text", "use the tokenizer that belongs to this model"):
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
        with _failing(InputError, "the tokenizer fails on these ids", "use the tokenizer that belongs to this model"):
            tokens = [whole_number(token, "id", 0, 2**32 - 1) for token in ids]
            for token in tokens:
                if self._tokenizer.id_to_token(token) is None:
                    raise InputError(
                        f"id {token} is not in the tokenizer's vocabulary; use the tokenizer that belongs to this model"
                    )
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def label(self, index: int) -> str:
        """The name of a class, from the checkpoint's config.

        Raises:
            InputError: no index.
        """
        index = whole_number(index, "index", 0)
        return self._labels.get(str(index), f"LABEL_{index}")

    def answers(self, encoded: Encoded, outputs: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """What the outputs of one sequence mean for the task, best first; empty where the task has no reading.

        Outputs with NaN have none either: no label or span is the best of them.

        Returns:
            text-classification: {label, score} of each class. token-classification: {token, label, score} of each
            token. fill-mask: {position, token, score} of the five best tokens of each mask. question-answering: the
            best {answer, score}. multiple-choice: {choice, score} of each choice.
        Raises:
            InputError: outputs of another text or task, or an answer with an id that the tokenizer does not have.
        """
        if not isinstance(encoded, Encoded):
            raise InputError(f"encoded is {type(encoded).__name__}; give what `encode` returned for this text")
        _check_outputs(outputs)
        if any(np.isnan(array).any() for array in outputs.values()):
            return []
        task = self._signature.task
        tokens = None if task in ("text-classification", "multiple-choice") else len(encoded.ids)
        if task == "question-answering":
            start, end = (_output(outputs, name, task, tokens) for name in ("start_logits", "end_logits"))
            return [self._best_span(encoded, start, end)]
        if task not in ("text-classification", "token-classification", "fill-mask", "multiple-choice"):
            return []
        logits = _output(outputs, "logits", task, tokens)
        if task == "fill-mask":
            return self._mask_fillers(encoded, logits)
        problem = self._problem
        if task == "text-classification" and (len(logits) == 1 or problem == "regression"):
            return [{"label": self.label(i), "score": float(value)} for i, value in enumerate(logits)]
        if is_multi_label(self._signature, problem):
            scores = 0.5 * (1.0 + np.tanh(0.5 * logits))  # the sigmoid, without overflow
        else:
            scores = _softmax(logits)
        if task == "text-classification":
            return [{"label": self.label(int(i)), "score": float(scores[i])} for i in np.argsort(-scores)]
        if task == "multiple-choice":
            return [{"choice": int(i), "score": float(scores[i])} for i in np.argsort(-scores)]
        best = scores.argmax(axis=-1)
        return [
            {"token": piece, "label": self.label(int(i)), "score": float(row[i])}
            for piece, i, row in zip(encoded.pieces, best, scores, strict=True)
        ]

    def _mask_fillers(self, encoded: Encoded, logits: NDArray[Any]) -> list[dict[str, Any]]:
        found = []
        for position in (i for i, token in enumerate(encoded.ids) if token == self._mask_id):
            scores = _softmax(logits[position])
            for token in np.argsort(-scores)[:5]:
                text = self.decode([int(token)])
                found.append({"position": position, "token": text, "score": float(scores[token])})
        return found

    def _best_span(self, encoded: Encoded, start: NDArray[Any], end: NDArray[Any], longest: int = 30) -> dict[str, Any]:
        separators = [i for i, token in enumerate(encoded.ids) if token == self._signature.sep_token_id]
        first = separators[1] + 1 if len(separators) > 1 else 0
        if len(start) - first < 2:
            return {"answer": "", "score": 0.0}
        begins, ends = _softmax(start[first:-1]), _softmax(end[first:-1])  # the last token is a separator
        best, score = (0, 0), -1.0
        for i in np.argsort(-begins)[:20]:
            window = ends[i : i + longest]
            j = int(window.argmax())
            if begins[i] * window[j] > score:
                best, score = (int(i), int(i) + j), float(begins[i] * window[j])
        ids = encoded.ids[first + best[0] : first + best[1] + 1]
        return {"answer": self.decode(ids), "score": score}


def _check_text(text: Any, pair: Any) -> None:
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise InputError(f"text and pair are {type(text).__name__} and {type(pair).__name__}; give strings")
    if not all(_is_utf8(given) for given in (text, pair or "")):
        raise InputError("the text is not UTF-8; convert it first")


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def settings(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ArtifactError: it cannot be read, or is no JSON object.
    """
    data = _read(path)
    if data is None:
        return {}
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({one_line(error)}); export the model again") from error
    if not isinstance(value, dict):
        raise ArtifactError(
            f"{path} holds a {type(value).__name__} where a JSON object belongs; export the model again"
        )
    return value


def _read(path: Path) -> bytes | None:
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


def _labels(path: Path) -> tuple[dict[str, str], str | None]:
    """The names of the classes, by index, and the problem type of a checkpoint's config."""
    config = settings(path)
    labels, problem = config.get("id2label", {}), config.get("problem_type")
    if not isinstance(labels, dict) or not all(isinstance(label, str) and _is_utf8(label) for label in labels.values()):
        raise ArtifactError(
            f"{path}: id2label must be an object of index and name; correct it, or export the model again"
        )
    if not isinstance(problem, str | None):
        raise ArtifactError(f"{path}: problem_type must be a string or null; correct it, or export the model again")
    return labels, problem


def _mask_token(path: Path) -> str:
    mask = settings(path).get("mask_token")
    if isinstance(mask, dict):
        mask = mask.get("content", mask)
    if not isinstance(mask, str | None):
        raise ArtifactError(
            f"{path}: mask_token must be a string, an object with the string content, or null; correct it, or export "
            "the model again"
        )
    return "<mask>" if mask is None else mask


@contextlib.contextmanager
def _failing(error: type[LfxError], what: str, cure: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into one of lfx's errors.

    Its Rust code may panic, and a panic is no Exception.
    """
    try:
        yield
    except (LfxError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as problem:
        raise error(f"{what}: {one_line(problem)}; {cure}") from problem


def _output(outputs: dict[str, NDArray[Any]], name: str, task: str, tokens: int | None) -> NDArray[Any]:
    """One output of one sequence; `tokens` is its length where it has one row a token."""
    if name not in outputs:
        raise InputError(f"{task} is read from the output {name}, and the outputs are {', '.join(outputs) or 'none'}")
    array: NDArray[Any] = outputs[name][0]
    if tokens is not None and len(array) != tokens:
        raise InputError(f"{name} has {len(array)} tokens and the text {tokens}; give the outputs of this text")
    return array


def _check_outputs(outputs: Any) -> None:
    """Raises InputError unless they are what `Engine.run` gives for one sequence."""
    if not isinstance(outputs, dict) or not all(
        isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.ndim > 1 and len(array) == 1
        for array in outputs.values()
    ):
        raise InputError("outputs are not those of one sequence; give what Engine.run returned for it")


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
