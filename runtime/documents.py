"""Files of documents: JSONL or Parquet in, one result for each in the same format out, going on where a run stopped."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lfx.config import Signature, sha256
from lfx.errors import ArtifactError, InputError, one_line, require
from lfx.runtime.engine import Engine
from lfx.runtime.inputs import prepare
from lfx.runtime.text import END_TO_END, TOKENIZER, Encoded, Text

SUFFIXES = (".jsonl", ".ndjson", ".parquet")  # in any case
# Documents whose results are written together. Batches are formed within a chunk, so that a run that was stopped and
# goes on has the same batches, and the same numbers, as one that was left alone.
CHUNK = 256


@dataclass
class Summary:
    """What a run did, this time.

    Attributes:
        documents: of the input, those of an earlier run included. refused: of these, with a reason in their row.
        tokens: computed this time.
    """

    documents: int = 0
    refused: int = 0
    windows: int = 0
    tokens: int = 0
    resumed_at: int = 0


@dataclass
class _Item:
    """One line of the input: its windows, or why it has none."""

    line: int
    id: Any = None
    windows: list[Encoded] = field(default_factory=list)
    error: str | None = None


def run_documents(
    engine: Engine,
    reader: Text | None,
    source: Path,
    output: Path,
    *,
    stride: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Run every document of a file and write one row for each, or for each of its windows.

    A document is an object with `text`, and `pair` where the task takes one, or with `input_ids`; its `id` is handed
    on, other fields are not looked at. A row has `line` (of the input, from 1), `id`, `tokens`, `answers` where the
    task has a reading, and `outputs`, the outputs per sequence; with a stride also `window` (from 0); and `error` in
    place of these where the document was refused.

    Args:
        reader: the tokenizer; None where every document has input_ids.
        source, output: .jsonl (or .ndjson) or .parquet, each.
        stride: documents longer than the model takes are cut into windows that begin every `stride` tokens; None
            refuses them.
        progress: called after each chunk. report: called with a line for each refused document.
    Raises:
        InputError: the files cannot be read or written, or are of another kind.
    """
    if engine.signature.task == "multiple-choice":
        raise InputError("files of documents are not run for multiple-choice; use Engine.run")
    for path in (source, output):
        if not is_documents(path):
            raise InputError(f"{path} is none of {', '.join(SUFFIXES)}; results are written in one of these formats")
    if not source.is_file():
        raise InputError(f"{source} does not exist, or is no file")
    if output.is_dir() or not output.absolute().parent.is_dir() or output.resolve() == source.resolve():
        raise InputError(f"{output} cannot be written: it is a folder or the input, or its folder does not exist")
    partial = output.with_name(f".{output.name}.partial")
    header = {
        "input": sha256(source),
        "model": engine.identity,
        "tokenizer": reader.sha256 if reader is not None else None,
        "backend": engine.backend,
        "precision": engine.precision,
        "stride": stride,
        "token_budget": engine.token_budget,
    }
    try:
        with partial.open("a", encoding="utf-8") as file:
            _lock(file, output)
            summary = _resume(partial, header)
            summary.resumed_at = summary.documents
            for chunk in _chunks(itertools.islice(_lines(source), summary.documents, None)):
                items = [_encode(number, found, engine.signature, reader, stride) for number, found in chunk]
                for item in items:
                    if item.error is not None:
                        report(f"{source}:{item.line}: {item.error}")
                rows = list(_rows(engine, reader, items, stride, summary))
                marker = {"done": len(items), "refused": sum(item.error is not None for item in items)}
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in (*rows, {"chunk": marker}))
                file.flush()
                os.fsync(file.fileno())
                summary.documents += marker["done"]
                summary.refused += marker["refused"]
                progress(f"{summary.documents:,} documents")
            _finish(partial, output)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written: {error}; what is done is kept, and goes on from there"
        ) from error
    return summary


def is_documents(path: Path) -> bool:
    """Whether a file is one of documents, by its name; others are one text."""
    return path.suffix.lower() in SUFFIXES


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _lock(file: IO[str], output: Path) -> None:
    """Keep a second run away from this output for as long as the file is open."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ModuleNotFoundError:
        return  # no such lock on Windows
    busy = f"another run is writing {output}; wait for it, or give another --output"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(busy) from error
    if not Path(file.name).exists() or not os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat()):
        raise InputError(busy)  # it ended, and took the file away, between opening and locking


def encoded(source: Path, signature: Signature, folder: Path) -> Iterator[Encoded]:
    """Every document of a file, long ones in windows that lie end to end.

    Args:
        source: .jsonl or .parquet, as `run_documents` takes, or a text file, read as one document.
        folder: holds the tokenizer, where texts are to be read.
    Raises:
        InputError: the file or a document cannot be read; says which line.
    """
    if not source.is_file():
        raise InputError(f"{source} does not exist, or is no file")
    reader = Text(folder, signature) if (folder / TOKENIZER).is_file() else None
    if is_documents(source):
        lines = _lines(source)
    else:
        try:
            lines = iter([(1, {"text": source.read_text(encoding="utf-8")})])
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read as UTF-8 text: {error}") from error
    for number, found in lines:
        item = _encode(number, found, signature, reader, END_TO_END)
        if item.error is not None:
            raise InputError(f"{source}:{number}: {item.error}")
        yield from item.windows


def _resume(partial: Path, header: dict[str, Any]) -> Summary:
    """Cut an earlier run's file behind its last whole chunk; start a new one where it is of something else."""
    summary = Summary()
    keep = 0
    try:
        with partial.open("rb") as file:
            first = file.readline()
            if first.endswith(b"\n") and json.loads(first) == header:
                place = keep = len(first)
                for line in file:
                    place += len(line)
                    row = json.loads(line)
                    if "chunk" in row and line.endswith(b"\n"):
                        summary.documents += row["chunk"]["done"]
                        summary.refused += row["chunk"]["refused"]
                        keep = place
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or its last line was not written whole
    try:
        if keep:
            os.truncate(partial, keep)
        else:
            partial.write_text(json.dumps(header) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{partial} cannot be written: {error}") from error
    return summary


def _lines(source: Path) -> Iterator[tuple[int, Any]]:
    """(number, document or InputError), from 1."""
    if _is_parquet(source):
        parquet = require("pyarrow.parquet", "parquet")
        try:
            tables = parquet.ParquetFile(source).iter_batches(CHUNK)
            rows: Iterable[Any] = itertools.chain.from_iterable(table.to_pylist() for table in tables)
            yield from enumerate(rows, 1)
        except Exception as error:
            raise InputError(f"{source} cannot be read as Parquet: {one_line(error)}") from error
        return
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except UnicodeDecodeError:
                yield number, InputError("not UTF-8")
            except (ValueError, RecursionError) as error:
                reason = f"broken JSON: {one_line(error)}" if line.strip() else "empty line"
                yield number, InputError(reason)


def _chunks(lines: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    while chunk := list(itertools.islice(lines, CHUNK)):
        yield chunk


def _encode(line: int, found: Any, signature: Signature, reader: Text | None, stride: int | None) -> _Item:
    item = _Item(line)
    try:
        if isinstance(found, InputError):
            raise found
        if not isinstance(found, dict):
            raise InputError(f"{type(found).__name__} where an object with text or input_ids should be")
        item.id = _checked_id(found.get("id"))
        item.windows = _windows(found, signature, reader, stride)
        for window in item.windows:
            prepare([window.ids], None, None, signature)  # ids and lengths
    except InputError as error:
        item.error, item.windows = one_line(error), []
    return item


def _checked_id(value: Any) -> Any:
    """Raises: InputError: JSON cannot hold it."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"id is {type(value).__name__}, which JSON cannot hold: {one_line(error, 80)}") from error
    return value


def _windows(found: dict[str, Any], signature: Signature, reader: Text | None, stride: int | None) -> list[Encoded]:
    text, pair, ids = found.get("text"), found.get("pair"), found.get("input_ids")
    if (text is None) == (ids is None):
        names = (str(name).encode("ascii", "backslashreplace").decode() for name in found)
        fields = ", ".join(sorted(names)) or "none"
        raise InputError(f"fields {fields}; give either text or input_ids")
    if ids is not None:
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise InputError("input_ids is no list of whole numbers, one at least")
        return [Encoded(ids, [str(i) for i in ids])]
    if not isinstance(text, str) or not text.strip() or not isinstance(pair, str | None):
        raise InputError("text (and pair, if any) must be a string, and text not empty")
    if signature.task == "question-answering" and pair is None:
        raise InputError("question-answering needs the question as text and the document as pair")
    if reader is None:
        raise InputError("the model has no tokenizer, so documents must have input_ids")
    return [reader.encode(text, pair)] if stride is None else reader.windows(text, pair, stride)


def _rows(
    engine: Engine, reader: Text | None, items: list[_Item], stride: int | None, summary: Summary
) -> Iterator[dict[str, Any]]:
    """The rows of a chunk, in the order of its lines."""
    encoded = [window for item in items for window in item.windows]
    results = engine.stream((window.ids for window in encoded), ahead=max(len(encoded), 1))
    summary.windows += len(encoded)
    summary.tokens += sum(len(window.ids) for window in encoded)
    per_token = {spec.name for spec in engine.signature.outputs if "sequence" in spec.shape}
    for item in items:
        about = {"line": item.line} | ({"id": item.id} if item.id is not None else {})
        if item.error is not None:
            yield {**about, "error": item.error}
        for number, window in enumerate(item.windows):
            found = next(results)
            row = {**about, **({"window": number} if stride is not None else {}), "tokens": len(window.ids)}
            answers = _answers(reader, window, found)
            if answers:
                row["answers"] = answers
            yield {**row, "outputs": {name: _plain(a) for name, a in found.items() if name not in per_token}}


def _answers(reader: Text | None, window: Encoded, found: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    if reader is None:
        return []
    answers = reader.answers(window, {name: array[None] for name, array in found.items()})
    return [{key: _short(v) if isinstance(v, float) else v for key, v in answer.items()} for answer in answers]


def _plain(array: NDArray[Any]) -> Any:
    """Nested lists, every float with the nine digits that a float32 has."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [_plain(part) for part in array] if array.ndim else _short(float(array))


def _short(value: float) -> float | None:
    return float(f"{value:.9g}") if np.isfinite(value) else None  # JSON knows no infinity


def _finish(partial: Path, output: Path) -> None:
    """Rows without the header and the markers, under the name that was asked for."""
    ready = output.with_name(f".{output.name}.ready")
    try:
        with partial.open(encoding="utf-8") as file:
            next(file)
            rows = (line for line in file if not line.startswith('{"chunk":'))
            if _is_parquet(output):
                _write_parquet(rows, ready)
            else:
                with ready.open("w", encoding="utf-8") as target:
                    target.writelines(rows)
        ready.replace(output)
    finally:
        ready.unlink(missing_ok=True)
    partial.unlink()


def _write_parquet(rows: Iterator[str], target: Path) -> None:
    pyarrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    found = [json.loads(row) for row in rows]
    names = dict.fromkeys(name for row in found for name in row)
    if len({type(row["id"]) for row in found if "id" in row}) > 1:  # a column has one type
        for row in found:
            if "id" in row:
                row["id"] = str(row["id"])
    if not found:
        raise ArtifactError("no documents, so there is nothing to write as Parquet; use .jsonl")
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in found] for name in names}), target)
