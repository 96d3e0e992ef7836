"""From the outputs of a task head to answers: labels, spans, choices and fillers of masks, with their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.checks import parse_json, whole_number
from lfx.errors import ArtifactError, InputError, one_line
from lfx.runtime.tokenizer import CONFIG, TOKENIZER_CONFIG, Encoded, Tokenizer, failing, is_utf8, read_file
from lfx.signature import is_multi_label


class Postprocessor:
    """What the outputs of a model mean, in the words of its tokenizer and the labels of its config. Thread-safe.

    Args:
        tokenizer: of the bundle; the configs are read from its folder.
    Raises:
        ArtifactError: a broken config.
        InputError: `tokenizer` is none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(f"tokenizer is {type(tokenizer).__name__}; give a Tokenizer")
        self._tokenizer = tokenizer
        self._labels, self._problem = _labels(tokenizer.folder / CONFIG)
        path = tokenizer.folder / TOKENIZER_CONFIG
        mask = _mask_token(path)
        with failing(ArtifactError, f"{path} has a broken mask_token", "export the model again"):
            self._mask_id = tokenizer.token_id(mask)

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
        task = self._tokenizer.signature.task
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
        if is_multi_label(self._tokenizer.signature, problem):
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
                text = self._tokenizer.decode([int(token)])
                found.append({"position": position, "token": text, "score": float(scores[token])})
        return found

    def _best_span(self, encoded: Encoded, start: NDArray[Any], end: NDArray[Any], longest: int = 30) -> dict[str, Any]:
        separators = [i for i, token in enumerate(encoded.ids) if token == self._tokenizer.signature.sep_token_id]
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
        return {"answer": self._tokenizer.decode(ids), "score": score}


def settings(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ArtifactError: it cannot be read, or is no JSON object.
    """
    data = read_file(path)
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


def _labels(path: Path) -> tuple[dict[str, str], str | None]:
    """The names of the classes, by index, and the problem type of a checkpoint's config."""
    config = settings(path)
    labels, problem = config.get("id2label", {}), config.get("problem_type")
    if not isinstance(labels, dict) or not all(isinstance(label, str) and is_utf8(label) for label in labels.values()):
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
