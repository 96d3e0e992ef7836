"""Text in and answers out, with the tokenizer and labels that a bundle carries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.config import Signature, is_multi_label, sha256
from lfx.errors import ArtifactError, InputError

TOKENIZER = "tokenizer.json"
END_TO_END = 0  # a stride: each window begins where the one before it ends


@dataclass(frozen=True)
class Encoded:
    """One text as the model sees it: ids, and for each token its piece of the text."""

    ids: list[int]
    pieces: list[str]


class Text:
    """The tokenizer and the labels of a bundle.

    Args:
        bundle: the folder that `lfx export` wrote.
    Attributes:
        sha256: of the tokenizer's file.
    Raises:
        ArtifactError: the bundle has no tokenizer, or a broken one.
    """

    def __init__(self, bundle: Path, signature: Signature) -> None:
        from tokenizers import Tokenizer

        path = bundle / TOKENIZER
        if not path.is_file():
            raise ArtifactError(
                f"{bundle} has no {TOKENIZER}, since its checkpoint had no tokenizer; give ids to Engine.run instead, "
                "name a folder that has one with --tokenizer, or export a checkpoint that has one"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ArtifactError(f"{path} cannot be read: {error}; export the model again") from error
        self.sha256 = sha256(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._signature = signature
        self._config = settings(bundle / "config.json")
        mask = settings(bundle / "tokenizer_config.json").get("mask_token") or "<mask>"
        self._mask_token = str(mask["content"] if isinstance(mask, dict) else mask)

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Tokenize, with the special tokens of the model.

        Raises:
            InputError: no text, or more tokens than the model takes; nothing is cut in silence.
        """
        _check_text(text, pair)
        encoding = self._tokenizer.encode(text, pair)
        limit = self._signature.max_seqlen
        if limit is not None and len(encoding.ids) > limit:
            raise InputError(
                f"the text has {len(encoding.ids)} tokens, above the model's maximum {limit}; shorten or split it "
                "(lfx run --stride cuts the documents of a .jsonl file)"
            )
        return Encoded(list(encoding.ids), list(encoding.tokens))

    def windows(self, text: str, pair: str | None, stride: int) -> list[Encoded]:
        """Tokenize a text of any length into windows that the model takes.

        Args:
            pair: the document, where `text` is a question; then the question stands before every window of it.
            stride: tokens from the beginning of one window to that of the next; END_TO_END for as many as fit.
        Raises:
            InputError: a stride with which tokens would be left out, or a question that leaves no room.
        """
        _check_text(text, pair)
        limit = self._signature.max_seqlen
        whole = self._tokenizer.encode(text, pair)
        if limit is None or len(whole.ids) <= limit:
            return [Encoded(list(whole.ids), list(whole.tokens))]
        fixed = self._tokenizer.num_special_tokens_to_add(pair is not None)
        if pair is not None:
            fixed += len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        room = limit - fixed
        stride = room if stride == END_TO_END else stride
        if not 1 <= stride <= room:
            raise InputError(
                f"stride {stride} does not fit: a window has room for {max(room, 0)} tokens of the document, so give 1 "
                f"to {max(room, 1)}"
            )
        strategy = "only_first" if pair is None else "only_second"
        self._tokenizer.enable_truncation(limit, stride=room - stride, strategy=strategy)
        try:
            first = self._tokenizer.encode(text, pair)
        finally:
            self._tokenizer.no_truncation()
        return [Encoded(list(found.ids), list(found.tokens)) for found in (first, *first.overflowing)]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def label(self, index: int) -> str:
        """The name of a class, from the checkpoint's config."""
        return str(self._config.get("id2label", {}).get(str(index), f"LABEL_{index}"))

    def answers(self, encoded: Encoded, outputs: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """What the outputs of one sequence mean for the task, best first; empty where the task has no reading.

        Returns:
            text-classification: {label, score} of each class. token-classification: {token, label, score} of each
            token. fill-mask: {position, token, score} of the five best tokens of each mask. question-answering: the
            best {answer, score}. multiple-choice: {choice, score} of each choice.
        """
        task = self._signature.task
        if task == "question-answering":
            return [self._best_span(encoded, outputs["start_logits"][0], outputs["end_logits"][0])]
        if task not in ("text-classification", "token-classification", "fill-mask", "multiple-choice"):
            return []
        logits = outputs["logits"][0]
        problem = self._config.get("problem_type")
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
        if task == "token-classification":
            best = scores.argmax(axis=-1)
            return [
                {"token": piece, "label": self.label(int(i)), "score": float(row[i])}
                for piece, i, row in zip(encoded.pieces, best, scores, strict=True)
            ]
        return self._mask_fillers(encoded, scores)

    def _mask_fillers(self, encoded: Encoded, scores: NDArray[Any]) -> list[dict[str, Any]]:
        mask_id = self._tokenizer.token_to_id(self._mask_token)
        found = []
        for position in (i for i, token in enumerate(encoded.ids) if token == mask_id):
            for token in np.argsort(-scores[position])[:5]:
                text = self.decode([int(token)])
                found.append({"position": position, "token": text, "score": float(scores[position][token])})
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
    for given in filter(None, (text, pair)):
        if not given.isascii() and any("\ud800" <= letter <= "\udfff" for letter in given):
            raise InputError("the text is not UTF-8; convert it first")


def settings(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not a JSON object ({error}); export the model again") from error


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
