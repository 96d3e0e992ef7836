"""From documents to rows: the windows that the model is given, run in groups, and what is written of each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LfxError, one_line
from lfx.runtime.engine import AHEAD, Engine
from lfx.runtime.inputs import prepare
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import Encoded, Tokenizer
from lfx.signature import Signature, TensorSpec

# Outputs per token of the windows that run together: those of a fill-mask model have 200 kB a token.
OUTPUT_BYTES = 1 << 30

Outputs = dict[str, NDArray[Any]]


@dataclass
class Summary:
    """What a run did, this time.

    Attributes:
        documents: of the input, those of an earlier run included. refused: of these, with a reason in a row of theirs.
        windows: computed this time. tokens: of these.
    """

    documents: int = 0
    refused: int = 0
    windows: int = 0
    tokens: int = 0
    resumed_at: int = 0


@dataclass(frozen=True)
class _Window:
    """A window that waits to be run, and the row that it gets so far."""

    row: dict[str, Any]
    encoded: Encoded


@dataclass(frozen=True)
class Runner:
    """Computes rows; counts what it ran in `summary`."""

    engine: Engine
    tokenizer: Tokenizer | None
    postprocessor: Postprocessor | None
    stride: int | None
    max_windows: int
    summary: Summary

    def rows(self, documents: Iterable[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of some documents, in order. Windows run in groups that only the documents decide."""
        group: list[_Window | dict[str, Any]] = []  # windows to run, and rows that need none, in order
        windows = tokens = 0
        bytes_per_token = _output_bytes_per_token(self.engine.signature)
        for line, document in documents:
            for item in self._items(line, document):
                group.append(item)
                if not isinstance(item, _Window):
                    continue
                windows, tokens = windows + 1, tokens + len(item.encoded.ids)
                if windows == AHEAD or tokens * bytes_per_token >= OUTPUT_BYTES:
                    yield from self._run_group(group)
                    group, windows, tokens = [], 0, 0
        yield from self._run_group(group)

    def _items(self, line: int, document: Any) -> Iterator[_Window | dict[str, Any]]:
        """The windows of one document, or the row that says why it has none."""
        row: dict[str, Any] = {"line": line}
        try:
            if isinstance(document, dict) and document.get("id") is not None:
                row["id"] = _checked_id(document["id"])
            windows = windows_of(document, self.engine.signature, self.tokenizer, self.stride, self.max_windows)
        except MemoryError:
            raise
        except Exception as error:
            yield {**row, "error": _reason(error)}
            return
        for number, window in enumerate(windows):
            yield _Window({**row, **({"window": number} if self.stride is not None else {})}, window)

    def _run_group(self, group: list[_Window | dict[str, Any]]) -> Iterator[dict[str, Any]]:
        results = iter(self._outputs([item.encoded.ids for item in group if isinstance(item, _Window)]))
        for item in group:
            yield self._row(item, next(results)) if isinstance(item, _Window) else item

    def _outputs(self, sequences: list[list[int]]) -> Sequence[Outputs | Exception]:
        """What the engine gives for each sequence, or why it gives nothing."""
        if not sequences:
            return []
        try:
            return list(self.engine.stream(sequences, ahead=AHEAD))
        except MemoryError:
            raise
        except Exception:  # one sequence may be the cause, or their number
            found = [self._outputs_alone(ids) for ids in sequences]
        failures = [result for result in found if isinstance(result, Exception)]
        if len(failures) == len(found):
            self._check_engine(failures[0])
        return found

    def _outputs_alone(self, ids: list[int]) -> Outputs | Exception:
        try:
            return next(self.engine.stream([ids]))
        except MemoryError:
            raise
        except Exception as error:
            return error

    def _check_engine(self, failure: Exception) -> None:
        """Stop the run where the engine cannot run a single token either.

        Raises:
            LfxError: it cannot.
        """
        try:
            if self.engine.supports_shape(1, 1):
                self.engine.warm_up([(1, 1)])
        except MemoryError:
            raise
        except Exception:
            raise LfxError(
                f"the engine fails on every input: {_reason(failure)}; what is done is kept, and the same command goes "
                "on from there"
            ) from failure

    def _row(self, window: _Window, outputs: Outputs | Exception) -> dict[str, Any]:
        if isinstance(outputs, Exception):
            return {**window.row, "error": _reason(outputs)}
        self.summary.windows += 1
        self.summary.tokens += len(window.encoded.ids)
        row = {**window.row, "tokens": len(window.encoded.ids)}
        try:
            answers = _answers(self.postprocessor, window.encoded, outputs)
        except LfxError as error:
            return {**window.row, "error": _reason(error)}
        if answers:
            row["answers"] = answers
        names = outputs_per_sequence(self.engine.signature)
        return {**row, "outputs": {spec.name: _plain(outputs[spec.name]) for spec in names}}


def windows_of(
    document: Any, signature: Signature, tokenizer: Tokenizer | None, stride: int | None, max_windows: int | None = None
) -> Sequence[Encoded]:
    """What the model is given for one document, checked; windows are made when they are asked for.

    Raises:
        InputError: the document, or one of its windows, is none that the model takes.
    """
    if isinstance(document, InputError):
        raise document
    if not isinstance(document, dict):
        raise InputError(f"{type(document).__name__} where an object with text or input_ids should be")
    windows = _encode(document, signature, tokenizer, stride)
    if max_windows is not None and len(windows) > max_windows:
        raise InputError(
            f"the document gives {len(windows):,} windows, above the {max_windows:,} allowed; give a larger --stride, "
            f"or --max-windows {len(windows)}"
        )
    for window in windows:
        prepare([window.ids], None, None, signature)  # ids and lengths
    return windows


def _encode(
    document: dict[str, Any], signature: Signature, tokenizer: Tokenizer | None, stride: int | None
) -> Sequence[Encoded]:
    text, pair, ids = document.get("text"), document.get("pair"), document.get("input_ids")
    if (text is None) == (ids is None):
        fields = ", ".join(sorted(ascii(name)[1:-1] for name in document)) or "none"
        raise InputError(f"fields {fields}; give either text or input_ids")
    if ids is not None:
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise InputError("input_ids is no list of whole numbers, one at least")
        prepare([ids], None, None, signature)  # before a piece is made for each of too many
        return [Encoded(ids, [str(i) for i in ids])]
    if not isinstance(text, str) or not text.strip() or not isinstance(pair, str | None):
        raise InputError("text (and pair, if any) must be a string, and text not empty")
    if signature.task == "question-answering" and pair is None:
        raise InputError("question-answering needs the question as text and the document as pair")
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so documents must have input_ids")
    return [tokenizer.encode(text, pair)] if stride is None else tokenizer.windows(text, pair, stride)


def _checked_id(value: Any) -> Any:
    """Raises: InputError: JSON cannot hold it."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"id is {type(value).__name__}, which JSON cannot hold: {one_line(error, 80)}") from error
    return value


def _reason(error: Exception) -> str:
    return one_line(error) if isinstance(error, LfxError) else f"{type(error).__name__}: {one_line(error)}"


def _answers(postprocessor: Postprocessor | None, window: Encoded, outputs: Outputs) -> list[dict[str, Any]]:
    if postprocessor is None:
        return []
    answers = postprocessor.answers(window, {name: array[None] for name, array in outputs.items()})
    return [{key: _short(v) if isinstance(v, float) else v for key, v in answer.items()} for answer in answers]


def outputs_per_sequence(signature: Signature) -> list[TensorSpec]:
    """The outputs that a row has."""
    return [spec for spec in signature.outputs if "sequence" not in spec.shape]


def _output_bytes_per_token(signature: Signature) -> int:
    shapes = [spec.shape for spec in signature.outputs if "sequence" in spec.shape]
    return sum(4 * math.prod(size for size in shape if isinstance(size, int)) for shape in shapes)


def _plain(array: NDArray[Any]) -> Any:
    """Nested lists, every float with the nine digits that a float32 has."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [_plain(part) for part in array] if array.ndim else _short(float(array))


def _short(value: float) -> float | None:
    return float(f"{value:.9g}") if np.isfinite(value) else None  # JSON knows no infinity
