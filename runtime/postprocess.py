"""Converts the outputs of a task head to answers: labels, spans, choices or mask fillers, with their scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.checks import whole_number
from lfx.errors import ArtifactError, InputError
from lfx.runtime.text_files import CONFIG, TOKENIZER_CONFIG, json_object, read_file
from lfx.runtime.tokenizer import Encoded, Tokenizer, failing, is_utf8
from lfx.signature import Signature, is_multi_label

_FIRST = 32  # scores of a vocabulary that are sorted at once


class Postprocessor:
    """Converts the outputs of a model to answers, with the text of its tokenizer and the labels of its config.

    Thread-safe.

    Args:
        tokenizer: the bundle's tokenizer, which has read tokenizer_config.json and config.json, if they exist.
    Raises:
        ArtifactError: one of these files is broken.
        InputError: `tokenizer` is no Tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(f"tokenizer is {type(tokenizer).__name__}; give a Tokenizer")
        self._tokenizer = tokenizer
        self._labels, self._problem_type = _labels(tokenizer.config, tokenizer.config_folder / CONFIG)
        path = tokenizer.folder / TOKENIZER_CONFIG
        mask_token = _mask_token(tokenizer.tokenizer_config, path)
        with failing(ArtifactError, f"{path} has a broken mask_token", "export the model again"):
            self._mask_id = tokenizer.token_id(mask_token)

    def label(self, index: int) -> str:
        """The name of a class, from the checkpoint's config.

        Args:
            index: index of the class, 0 or more.
        Returns:
            The name, or LABEL_<index> if the config has none.
        Raises:
            InputError: `index` is no whole number, or is negative.
        """
        index = whole_number(index, "index", 0)
        return self._labels.get(str(index), f"LABEL_{index}")

    def answers(self, encoded: Encoded, outputs: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """Convert the outputs of one sequence to answers.

        Args:
            encoded: the sequence, from `Tokenizer.encode` or `Tokenizer.windows`.
            outputs: what `Engine.run` returned for this sequence; output name -> array with a batch axis of 1.
                Attention weights are not read.
        Returns:
            The answers, scores from 0 to 1. text-classification: {label, score} of each class, best first; a regression
            has its values as scores. token-classification: {token, label, score} of each token, in order. fill-mask:
            {position, token, score} of the tokenizer's five best tokens for each mask. question-answering: the best
            {answer, score}. multiple-choice: {choice, score} of each choice, best first. Empty for other tasks, if an
            output has NaN, and if the model has no logits with the name and the axes of the task's.
        Raises:
            InputError: the outputs are of another text or task, or an answer has an id that the tokenizer does not
                have.
        """
        if not isinstance(encoded, Encoded):
            raise InputError(f"encoded is {type(encoded).__name__}; give what `encode` returned for this text")
        attentions = self._tokenizer.signature.attention_outputs  # those of multiple choice have a row for each choice
        if isinstance(outputs, dict):
            outputs = {name: array for name, array in outputs.items() if name not in attentions}
        _check_outputs(outputs)
        if any(np.isnan(array).any() or np.isposinf(array).any() for array in outputs.values()):
            return []
        task = self._tokenizer.signature.task
        if not answer_outputs(self._tokenizer.signature):
            return []
        head = _HEADS[task]
        arrays = [_output(outputs, name, task, len(encoded.ids) if head.per_token else None) for name in head.outputs]
        if any(array.ndim != head.axes for array in arrays):
            return []
        return head.read(self, encoded, *arrays)

    def _classes(self, _: Encoded, logits: NDArray[Any]) -> list[dict[str, Any]]:
        """Label and score of each class, from logits (classes,), best first; for a regression each value, in order."""
        if is_multi_label(self._tokenizer.signature, self._problem_type):
            scores = 0.5 * (1.0 + np.tanh(0.5 * logits))  # the sigmoid, without overflow
        elif len(logits) == 1 or self._problem_type == "regression":
            return [{"label": self.label(i), "score": float(value)} for i, value in enumerate(logits)]
        else:
            scores = _softmax(logits)
        return [{"label": self.label(int(i)), "score": float(scores[i])} for i in np.argsort(-scores)]

    def _choices(self, _: Encoded, logits: NDArray[Any]) -> list[dict[str, Any]]:
        """Each choice, from logits (choices,), best first."""
        scores = _softmax(logits)
        return [{"choice": int(i), "score": float(scores[i])} for i in np.argsort(-scores)]

    def _token_labels(self, encoded: Encoded, logits: NDArray[Any]) -> list[dict[str, Any]]:
        """The best label of each token, from logits (seqlen, classes)."""
        scores = _softmax(logits)
        best = scores.argmax(axis=-1)
        return [
            {"token": piece, "label": self.label(int(i)), "score": float(row[i])}
            for piece, i, row in zip(encoded.pieces, best, scores, strict=True)
        ]

    def _mask_fillers(self, encoded: Encoded, logits: NDArray[Any]) -> list[dict[str, Any]]:
        """The five best tokens for each mask token, from logits (seqlen, vocabulary)."""
        fillers = []
        for position in (i for i, token in enumerate(encoded.ids) if token == self._mask_id):
            scores = _softmax(logits[position])
            # A model may have more ids than its tokenizer, for alignment. The best one must be the tokenizer's.
            known = (token for i, token in enumerate(_best(scores)) if i == 0 or self._tokenizer.has_id(token))
            for token in itertools.islice(known, 5):
                text = self._tokenizer.decode([token])
                fillers.append({"position": position, "token": text, "score": float(scores[token])})
        return fillers

    def answers_of_request(
        self, encoded: Encoded, outputs: Mapping[str, Any], positions: NDArray[np.int64] | None = None
    ) -> list[dict[str, Any]]:
        """`answers` for a client: an answer to a question also has `start` and `end`, see `answer_range`.

        Args:
            encoded: the real tokens of the sequence.
            outputs: output name -> array with a batch axis of 1, of real and masked tokens.
            positions: of the real tokens in the outputs; None = no token is masked.
        Raises:
            ArtifactError: the outputs are not those of the task, or an answer has an id that the tokenizer does not
                have: the request is not the cause.
        """
        arrays = {name: np.asarray(value) for name, value in outputs.items()}
        if positions is not None:
            specs = self._tokenizer.signature.outputs
            per_token = {spec.name for spec in specs if spec.shape[1:2] == ("sequence",)}
            arrays |= {name: arrays[name][:, positions] for name in per_token & arrays.keys()}
        try:
            answers = self.answers(encoded, arrays)
            if answers and (span := self.answer_range(encoded, arrays)) is not None:
                answers[0] |= {"start": span[0], "end": span[1]}
        except InputError as error:
            raise ArtifactError(str(error)) from error
        return answers

    def answer_range(self, encoded: Encoded, outputs: dict[str, NDArray[Any]]) -> tuple[int, int] | None:
        """The range of characters of the answer to a question in `encoded.text`: start, and end (exclusive).

        Args:
            encoded, outputs: the arguments of `answers`.
        Returns:
            The range; None for another task, for ids without their text, and if there is no answer.
        """
        if self._tokenizer.signature.task != "question-answering" or not encoded.offsets:
            return None
        start, end = (_output(outputs, name, "", len(encoded.ids)) for name in ("start_logits", "end_logits"))
        span = self._span(encoded, start, end)
        if span is None:
            return None
        first, stop = encoded.offsets[span.first][0], encoded.offsets[span.last][1]
        text = encoded.text[first:stop]
        first += len(text) - len(text.lstrip())
        return first, first + len(text.strip())

    def _best_span(self, encoded: Encoded, start: NDArray[Any], end: NDArray[Any]) -> list[dict[str, Any]]:
        """The text and the score of the best span of the document, from start and end logits (seqlen,)."""
        span = self._span(encoded, start, end)
        if span is None:
            return []
        if encoded.offsets:
            answer = encoded.text[encoded.offsets[span.first][0] : encoded.offsets[span.last][1]].strip()
        else:
            first = span.document.start
            answer = self._tokenizer.decode(encoded.ids[first + span.first : first + span.last + 1])
        return [{"answer": answer, "score": span.score}]

    def _span(self, encoded: Encoded, start: NDArray[Any], end: NDArray[Any], max_length: int = 30) -> _Span | None:
        """The best span of the document, at most `max_length` tokens; None if there is no document."""
        document = self._document(encoded)
        if not document:
            return None
        within = slice(document.start, document.stop)
        start_scores, end_scores = _softmax(start[within]), _softmax(end[within])
        # Row i has the ends of the spans that start at i; ends past the document score 0.
        padded = np.concatenate([end_scores, np.zeros(max_length - 1, end_scores.dtype)])
        lengths = np.lib.stride_tricks.sliding_window_view(padded, max_length).argmax(axis=-1)
        scores = start_scores * padded[np.arange(len(lengths)) + lengths]
        best = int(scores.argmax())
        return _Span(document, best, best + int(lengths[best]), float(scores[best]))

    def _document(self, encoded: Encoded) -> range | None:
        """The positions of the document; for ids without their text, those between the question and the last separator.

        None if there are fewer than two separators.
        """
        if encoded.document is not None:
            return encoded.document
        separators = [i for i, token in enumerate(encoded.ids) if token == self._tokenizer.signature.sep_token_id]
        if len(separators) < 2:
            return None
        # A question is followed by two separators in RoBERTa's format, and by one in BERT's.
        question_end = separators[1] if separators[1] == separators[0] + 1 else separators[0]
        return range(question_end + 1, separators[-1])


@dataclass(frozen=True)
class _Span:
    """An answer: its first and last token, counted from the start of the document, and its score."""

    document: range
    first: int
    last: int
    score: float


@dataclass(frozen=True)
class _Head:
    """A task's logits, and the method that converts those of one sequence to answers.

    Attributes:
        axes: number of axes without the batch.
        per_token: whether the first axis is the sequence.
        fields: names of an answer's fields.
    """

    read: Callable[..., list[dict[str, Any]]]
    axes: int
    per_token: bool
    fields: tuple[str, ...]
    outputs: tuple[str, ...] = ("logits",)


_HEADS = {
    "text-classification": _Head(Postprocessor._classes, 1, per_token=False, fields=("label", "score")),
    "multiple-choice": _Head(Postprocessor._choices, 1, per_token=False, fields=("choice", "score")),
    "token-classification": _Head(Postprocessor._token_labels, 2, per_token=True, fields=("token", "label", "score")),
    "fill-mask": _Head(Postprocessor._mask_fillers, 2, per_token=True, fields=("position", "token", "score")),
    "question-answering": _Head(
        Postprocessor._best_span, 1, per_token=True, fields=("answer", "score"), outputs=("start_logits", "end_logits")
    ),
}


def answer_outputs(signature: Signature) -> tuple[str, ...]:
    """Names of the outputs that a model's answers are made from; none for a model without answers.

    A module of one's own may have a task, and outputs of other names or axes than the task's.
    """
    head, shapes = _HEADS.get(signature.task), {spec.name: spec.shape[1:] for spec in signature.outputs}
    if head is None or any(
        len(shapes.get(name, ())) != head.axes or (shapes[name][0] == "sequence") != head.per_token
        for name in head.outputs
    ):
        return ()
    return head.outputs


def answer_fields(signature: Signature) -> tuple[str, ...]:
    """Names of the fields of a model's answers; none for a model without answers."""
    return _HEADS[signature.task].fields if answer_outputs(signature) else ()


def settings(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; an empty one if the file does not exist.

    Raises:
        ArtifactError: the file cannot be read, or holds no JSON object.
    """
    return json_object(read_file(path), path)


def _labels(data: bytes | None, path: Path) -> tuple[dict[str, str], str | None]:
    """id2label (index as text -> name) and problem_type of a checkpoint's config."""
    config = json_object(data, path)
    labels, problem_type = config.get("id2label", {}), config.get("problem_type")
    if not isinstance(labels, dict) or not all(isinstance(label, str) and is_utf8(label) for label in labels.values()):
        raise ArtifactError(
            f"{path}: id2label must be an object of index and name; correct it, or export the model again"
        )
    if not isinstance(problem_type, str | None):
        raise ArtifactError(f"{path}: problem_type must be a string or null; correct it, or export the model again")
    return labels, problem_type


def _mask_token(data: bytes | None, path: Path) -> str:
    """The mask token of a tokenizer's config; Longformer's own if the config has none."""
    token = json_object(data, path).get("mask_token")
    if isinstance(token, dict):
        token = token.get("content", token)
    if not isinstance(token, str | None):
        raise ArtifactError(
            f"{path}: mask_token must be a string, an object with the string content, or null; correct it, or export "
            "the model again"
        )
    return "<mask>" if token is None else token


def _output(outputs: dict[str, NDArray[Any]], name: str, task: str, seqlen: int | None) -> NDArray[Any]:
    """One output without its batch axis; `seqlen` is the required length of an output per token, else None."""
    if name not in outputs:
        raise InputError(f"{task} needs the output {name}; the outputs are {', '.join(outputs) or 'none'}")
    array = np.asarray(outputs[name][0])
    if array.dtype == np.float16:  # the product of two probabilities may be too small for it
        array = array.astype(np.float32)
    if seqlen is not None and array.shape[:1] != (seqlen,):
        tokens = len(array) if array.ndim else "no"
        raise InputError(f"{name} has {tokens} tokens and the text {seqlen}; give the outputs of this text")
    return array


def _check_outputs(outputs: Any) -> None:
    """Raise InputError unless the outputs have the form that `Engine.run` returns for one sequence."""
    if not isinstance(outputs, dict) or not all(
        isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.ndim > 0 and len(array) == 1
        for array in outputs.values()
    ):
        raise InputError("outputs are not those of one sequence; give what Engine.run returned for it")


def _best(scores: NDArray[Any]) -> Iterator[int]:
    """Indices of the scores, best first. More than the first are sorted only if they are asked for."""
    count = min(_FIRST, len(scores))
    first = np.argpartition(-scores, count - 1)[:count]
    yield from first[np.argsort(-scores[first])].tolist()
    given = set(first.tolist())
    yield from (int(i) for i in np.argsort(-scores) if int(i) not in given)


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))
