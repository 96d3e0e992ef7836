"""Converts documents to rows: tokenizes them into windows, runs the windows in groups, and formats the outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LfxError, one_line
from lfx.runtime.engine import Engine
from lfx.runtime.generation.rows import without_padding
from lfx.runtime.inputs import prepare, prepare_each
from lfx.runtime.outputs import OUTPUT_BYTES, output_bytes
from lfx.runtime.postprocess import Postprocessor, answer_outputs
from lfx.runtime.streaming import AHEAD
from lfx.runtime.tokenizer import Encoded, Tokenizer
from lfx.signature import TASKS, TEXT_GENERATION, Signature, TensorSpec

GENERATED = "sequences"  # name of the ids that `Engine.generate` returns, as Hugging Face's
_MAX_ID_BYTES = 10_000  # of JSON; an id is copied to each row of its document

Outputs = dict[str, NDArray[Any]]


@dataclass
class Summary:
    """Counts of a run.

    Attributes:
        documents: number of documents with rows, including those of earlier runs that this run resumed.
        refused: number of these that have an error in place of outputs.
        windows: number of windows computed in this run.
        tokens: number of tokens of these windows.
        resumed_at: number of documents done in earlier runs.
    """

    documents: int = 0
    refused: int = 0
    windows: int = 0
    tokens: int = 0
    resumed_at: int = 0


@dataclass(frozen=True)
class _Window:
    """A window to run, its number in its document, and the fields of its row that are known before."""

    row: dict[str, Any]
    encoded: Encoded
    number: int

    @property
    def index(self) -> int:
        """A number that no other window of the run has, however often the run is stopped and resumed."""
        return int(self.row["line"]) + (self.number << 32)


@dataclass(frozen=True)
class Runner:
    """Computes the rows of documents, and counts windows and tokens in `summary`.

    Attributes:
        generation: options of `Engine.generate`, for a model that writes texts.
    """

    engine: Engine
    tokenizer: Tokenizer | None
    postprocessor: Postprocessor | None
    stride: int | None
    max_windows: int
    summary: Summary
    generation: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, documents: Iterable[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the rows of (number, document) pairs, in order. The groups of windows depend on the documents alone."""
        group: list[_Window | dict[str, Any]] = []  # windows to run and rows of refused documents, in order
        windows = size = 0
        writes_texts = self.engine.signature.task == TEXT_GENERATION
        for line, document in documents:
            for item in self._items(line, document):
                group.append(item)
                if not isinstance(item, _Window):
                    continue
                windows += 1
                size += 0 if writes_texts else output_bytes(self.engine.signature, len(item.encoded.ids))
                if windows == AHEAD or size >= OUTPUT_BYTES:
                    yield from self._run_group(group)
                    group, windows, size = [], 0, 0
        yield from self._run_group(group)

    def _items(self, line: int, document: Any) -> Iterator[_Window | dict[str, Any]]:
        """Yield the windows of one document, or a row with the reason why it is refused."""
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
            yield _Window({**row, **({"window": number} if self.stride is not None else {})}, window, number)

    def _run_group(self, group: list[_Window | dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Run the windows of a group; yields all its rows, in order."""
        results = iter(self._outputs([item for item in group if isinstance(item, _Window)]))
        for item in group:
            yield self._row(item, next(results)) if isinstance(item, _Window) else item

    def _outputs(self, windows: list[_Window]) -> Sequence[Outputs | Exception]:
        """The engine's outputs for each window, or the exception that it raises for it."""
        if not windows:
            return []
        if self.engine.signature.task == TEXT_GENERATION:
            return self._texts(windows)
        sequences = [window.encoded.ids for window in windows]
        try:
            return list(self.engine.stream(sequences, ahead=AHEAD, outputs=self._output_names()))
        except MemoryError:
            raise
        except Exception:  # one sequence may be the cause, or the size of a batch
            results = [self._outputs_alone(ids) for ids in sequences]
        failures = [result for result in results if isinstance(result, Exception)]
        if len(failures) == len(results):
            self._check_engine(failures[0])
        return results

    def _texts(self, windows: list[_Window]) -> Sequence[Outputs | Exception]:
        """The ids of the text that the engine writes for each window, or the exception that it raises for it."""
        results = self._generate(windows)
        if len(windows) > 1:  # a batch may have failed because of one of its sequences, or of its size
            failed = [i for i, result in enumerate(results) if isinstance(result, Exception)]
            for i in failed:
                results[i] = self._generate([windows[i]])[0]
        failures = [result for result in results if isinstance(result, Exception)]
        if len(failures) == len(results):
            self._check_engine(failures[0])
        return results

    def _generate(self, windows: list[_Window]) -> list[Outputs | Exception]:
        """`Engine.generate`, with the random numbers of each window's `index`."""
        ids, indices = [window.encoded.ids for window in windows], [window.index for window in windows]
        try:
            with self.engine.metrics.call():
                writer = self.engine.text_writer()
                sequences: list[Any] = list(prepare_each(ids, None, None, self.engine.signature))
                rows = writer.write_each(sequences, writer.settings(self.generation), indices)
        except MemoryError:
            raise
        except Exception as error:
            return [error] * len(windows)
        return [row if isinstance(row, LfxError) else {GENERATED: row[0]} for row in rows]

    def _outputs_alone(self, ids: list[int]) -> Outputs | Exception:
        try:
            return next(self.engine.stream([ids], outputs=self._output_names()))
        except MemoryError:
            raise
        except Exception as error:
            return error

    def _output_names(self) -> list[str] | None:
        """Names of the outputs that rows are made from; None = all."""
        signature = self.engine.signature
        names = {spec.name for spec in outputs_per_sequence(signature)}
        if self.postprocessor is not None:
            names.update(answer_outputs(signature))
        return [spec.name for spec in signature.outputs if spec.name in names] or None

    def _check_engine(self, failure: Exception) -> None:
        """Raise an error if the engine cannot even run a single token.

        Raises:
            LfxError: it cannot; stops the run.
        """
        try:
            if self.engine.supports_shape(1, 1):
                self.engine.warm_up([(1, 1)])
        except MemoryError:
            raise
        except Exception:
            raise LfxError(
                f"the engine fails on every input: {_reason(failure)}; completed documents are kept, and the same "
                "command resumes after them"
            ) from failure

    def _row(self, window: _Window, outputs: Outputs | Exception) -> dict[str, Any]:
        """The complete row of a window that was run."""
        if isinstance(outputs, Exception):
            return {**window.row, "error": _reason(outputs)}
        self.summary.windows += 1
        self.summary.tokens += len(window.encoded.ids)
        row = {**window.row, "tokens": len(window.encoded.ids)}
        try:
            if GENERATED in outputs:
                return {**row, **self._summary(outputs[GENERATED])}
            answers = _answers(self.postprocessor, window.encoded, outputs)
        except LfxError as error:
            return {**window.row, "error": _reason(error)}
        if answers:
            row["answers"] = answers
        names = outputs_per_sequence(self.engine.signature)
        return {**row, "outputs": {spec.name: _plain(outputs[spec.name]) for spec in names}}

    def _summary(self, tokens: NDArray[np.int64]) -> dict[str, Any]:
        """The fields of a text that was written: `new_tokens`, and `summary`, or `output_ids` without a tokenizer."""
        ids = without_padding(tokens, self.engine.generation_settings(**self.generation)).tolist()
        written = {"output_ids": ids} if self.tokenizer is None else {"summary": self.tokenizer.decode(ids)}
        return {"new_tokens": len(ids) - 1, **written}


def windows_of(
    document: Any, signature: Signature, tokenizer: Tokenizer | None, stride: int | None, max_windows: int | None = None
) -> Sequence[Encoded]:
    """Tokenize and check one document.

    Args:
        document: a document from `read_documents`.
        tokenizer: None if documents have input_ids.
        stride: as for `Tokenizer.windows`; None = one window.
        max_windows: largest number of windows; None = no limit.
    Returns:
        The windows; each is made when it is indexed.
    Raises:
        InputError: the document is broken, or the model cannot take one of its windows.
    """
    if isinstance(document, InputError):
        raise document
    if not isinstance(document, dict):
        raise InputError(f"the document is {type(document).__name__}; give an object with text or input_ids")
    windows = _encode(document, signature, tokenizer, stride)
    if max_windows is not None and len(windows) > max_windows:
        raise InputError(
            f"the document gives {len(windows):,} windows, above the {max_windows:,} allowed; give a larger --stride, "
            f"or --max-windows {len(windows)}"
        )
    for window in windows:
        prepare([window.ids], None, None, signature)  # checks ids and lengths
    return windows


def _encode(
    document: dict[str, Any], signature: Signature, tokenizer: Tokenizer | None, stride: int | None
) -> Sequence[Encoded]:
    """The windows of a document from its fields."""
    text, pair, ids = document.get("text"), document.get("pair"), document.get("input_ids")
    if (text is None) == (ids is None):
        fields = ", ".join(sorted(ascii(name)[1:-1] for name in document)) or "none"
        raise InputError(f"the document has the fields {fields}; give either text or input_ids")
    if ids is not None:
        if pair is not None:
            raise InputError("the document has input_ids and pair; give the ids of both texts as input_ids")
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise InputError("input_ids must be a list of at least one whole number")
        feeds = prepare([ids], None, None, signature)[0]  # checks the length before pieces are made
        _check_masks(document, feeds, signature)
        return [Encoded(ids, [str(i) for i in ids])]
    if not isinstance(text, str) or not text.strip() or not isinstance(pair, str | None):
        raise InputError("text (and pair, if any) must be a string, and text not empty")
    if TASKS[signature.task].needs_pair and pair is None:
        raise InputError(f"{signature.task} needs the question as text and the document as pair")
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so documents must have input_ids")
    windows = [tokenizer.encode(text, pair)] if stride is None else tokenizer.windows(text, pair, stride)
    if TASKS[signature.task].needs_pair and not windows[0].document:
        raise InputError("the document, given as pair, has no tokens, so the question has no answer in it")
    return windows


def _check_masks(document: dict[str, Any], feeds: Mapping[str, NDArray[Any]], signature: Signature) -> None:
    """Check that the masks of a document with input_ids, if it has any, are those that it is run with.

    Raises:
        InputError: they are not.
    """
    ones = np.ones_like(feeds["input_ids"])
    first = ones * (np.arange(ones.shape[-1]) == 0)
    marks = feeds.get("global_attention_mask", first if signature.global_attention == "first" else 0 * ones)
    if document.get("attention_mask") not in (None, ones.ravel().tolist()):
        raise InputError("attention_mask must be a 1 for each of input_ids, in documents; leave padding out of both")
    if document.get("global_attention_mask") not in (None, marks.ravel().tolist()):
        raise InputError(
            "global_attention_mask differs from the task's global tokens, which documents have; leave it out, or give "
            "it to Engine.run"
        )


def _checked_id(value: Any) -> Any:
    """Return the id of a document.

    Raises:
        InputError: JSON cannot represent it, or it has more than 10,000 bytes of JSON.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"id is {type(value).__name__}, which JSON cannot hold: {one_line(error, 80)}; make it text"
        ) from error
    if len(text) > _MAX_ID_BYTES:
        raise InputError(f"id has {len(text):,} bytes as JSON, above the {_MAX_ID_BYTES:,} allowed; shorten it")
    return value


def _reason(error: Exception) -> str:
    """The text of an exception for a row's `error`."""
    return one_line(error) if isinstance(error, LfxError) else f"{type(error).__name__}: {one_line(error)}"


def _answers(postprocessor: Postprocessor | None, window: Encoded, outputs: Outputs) -> list[dict[str, Any]]:
    """The answers of a window, floats rounded; empty without a postprocessor."""
    if postprocessor is None:
        return []
    answers = postprocessor.answers(window, {name: array[None] for name, array in outputs.items()})
    return [{key: _short(v) if isinstance(v, float) else v for key, v in answer.items()} for answer in answers]


def outputs_per_sequence(signature: Signature) -> list[TensorSpec]:
    """The outputs without a sequence axis; a row has these only. A model that writes texts has none."""
    return [spec for spec in signature.outputs if "sequence" not in spec.shape]


def _plain(array: NDArray[Any]) -> Any:
    """Convert an array to nested lists; floats are rounded to nine significant digits, enough for a float32."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [_plain(part) for part in array] if array.ndim else _short(float(array))


def _short(value: float) -> float | None:
    """Round to nine significant digits; None for NaN and infinities, which JSON does not have."""
    return float(f"{value:.9g}") if np.isfinite(value) else None
