"""Files of documents: JSONL or Parquet in, one result for each in the same format out, going on where a run stopped."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lfx import __version__
from lfx.checks import file_path, whole_number
from lfx.errors import InputError, one_line, require
from lfx.files import is_disk_full
from lfx.manifest import sha256
from lfx.runtime.documents.formats import (
    SUFFIXES,
    check_source,
    count_documents,
    is_documents,
    is_parquet,
    read_documents,
    write_rows,
)
from lfx.runtime.documents.journal import Journal, journal_path
from lfx.runtime.documents.rows import OUTPUT_BYTES, Runner, Summary, outputs_per_sequence, windows_of
from lfx.runtime.engine import AHEAD, Engine
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import END_TO_END, TOKENIZER, Encoded, Tokenizer
from lfx.signature import Signature

# Documents whose rows count together: a run that was stopped goes on behind its last whole chunk. Batches are formed
# within a chunk, so that such a run has the same batches, and the same numbers, as one that was left alone.
CHUNK = 256
MAX_WINDOWS = 4096


def run_documents(
    engine: Engine,
    tokenizer: Tokenizer | None,
    source: Path,
    output: Path,
    *,
    stride: int | None = None,
    max_windows: int = MAX_WINDOWS,
    progress: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Run every document of a file and write one row for each, or for each of its windows.

    A document is an object with `text`, and `pair` where the task takes one, or with `input_ids`; its `id` is handed
    on, other fields are not looked at. A row has `line` (of the input, from 1), `id`, `tokens`, `answers` where the
    task has a reading, and `outputs`, the outputs per sequence; with a stride also `window` (from 0); and `error` in
    place of these where the document was refused, or failed in the engine. In Parquet an id that is no string is
    written as JSON text where no column type holds all ids.

    A batch that fails in the engine is run again sequence by sequence, and those that fail alone get an `error`; the
    run stops where the engine fails on every input.

    Args:
        tokenizer: the tokenizer; None where every document has input_ids.
        source, output: .jsonl (or .ndjson) or .parquet, each.
        stride: documents longer than the model takes are cut into windows that begin every `stride` tokens, 1 or more;
            None refuses them.
        max_windows: most windows of one document, 1 or more; a document with more is refused.
        progress: called after each chunk. report: called with a line for each refused document.
    Raises:
        InputError: the files cannot be read or written, are of another kind, or the input was changed during the run.
        DependencyError: one of the files is Parquet, and pyarrow is not installed.
        LfxError: the engine fails on every input. What is done is kept.
    """
    if not isinstance(engine, Engine) or not isinstance(tokenizer, Tokenizer | None):
        raise InputError(
            f"engine and tokenizer are {type(engine).__name__} and {type(tokenizer).__name__}; give an Engine, and a "
            "Tokenizer or None"
        )
    stride = None if stride is None else whole_number(stride, "stride", 1)
    max_windows = whole_number(max_windows, "max_windows", 1)
    source, output = _check_files(engine, source, output)
    try:
        stamp, digest = _stamp(source), sha256(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {one_line(error)}") from error
    header = {
        "journal": 2,
        "lfx": __version__,
        "input": digest,
        "model": engine.identity,
        "tokenizer": tokenizer.sha256 if tokenizer is not None else None,
        "backend": engine.backend,
        "precision": engine.precision,
        "stride": stride,
        "max_windows": max_windows,
        "token_budget": engine.token_budget,
        "groups": [CHUNK, AHEAD, OUTPUT_BYTES],
    }
    summary = Summary()
    postprocessor = Postprocessor(tokenizer) if tokenizer is not None else None
    runner = Runner(engine, tokenizer, postprocessor, stride, max_windows, summary)
    try:
        with Journal(output, header, CHUNK) as journal:
            if journal.documents and journal.documents > count_documents(source):
                journal.restart()
            summary.documents = summary.resumed_at = journal.documents
            summary.refused = journal.refused
            for chunk in _chunks(read_documents(source, journal.documents)):
                done, refused = _run_chunk(runner, chunk, journal, lambda text: report(f"{source}:{text}"))
                if stamp != (stamp := _stamp(source)):
                    _check_unchanged(source, digest, journal)
                journal.end_chunk(done, refused)
                summary.documents, summary.refused = journal.documents, journal.refused
                progress(f"{summary.documents:,} documents")
            _check_unchanged(source, digest, journal)
            _write_output(journal, output, engine.signature)
            journal.remove()
    except OSError as error:
        cure = "make room on its disk" if is_disk_full(error) else "mend that"
        raise InputError(
            f"{output} cannot be written: {one_line(error)}; {cure}, and give the same command again: what is done is "
            "kept, and it goes on from there"
        ) from error
    return summary


def encoded(source: Path, signature: Signature, folder: Path) -> Iterator[Encoded]:
    """Every document of a file, long ones in windows that lie end to end; one document is in memory at a time.

    Args:
        source: .jsonl or .parquet, as `run_documents` takes, or a text file, read as one document.
        folder: holds the tokenizer, where texts are to be read.
    Raises:
        InputError: the file or a document cannot be read; says which line.
    """
    source, folder = file_path(source, "the file of documents"), file_path(folder, "the tokenizer's folder")
    check_source(source)
    tokenizer = Tokenizer(folder, signature) if (folder / TOKENIZER).exists() else None
    if is_documents(source):
        documents = read_documents(source)
    else:
        try:
            documents = iter([(1, {"text": source.read_text(encoding="utf-8")})])
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read as UTF-8 text: {error}") from error
    for line, document in documents:
        try:
            windows = windows_of(document, signature, tokenizer, END_TO_END)
        except InputError as error:
            raise InputError(f"{source}:{line}: {error}") from error
        yield from windows


def _check_files(engine: Engine, source: Path, output: Path) -> tuple[Path, Path]:
    if engine.signature.task == "multiple-choice":
        raise InputError("files of documents are not run for multiple-choice; use Engine.run")
    source, output = file_path(source, "the input"), file_path(output, "the output")
    for path in (source, output):
        if not is_documents(path):
            raise InputError(f"{path} is none of {', '.join(SUFFIXES)}; results are written in one of these formats")
    if is_parquet(source) or is_parquet(output):
        require("pyarrow.parquet", "parquet")
    check_source(source)
    same = os.path.realpath(output) == os.path.realpath(source)
    if output.is_dir() or not output.absolute().parent.is_dir() or same:
        raise InputError(f"{output} cannot be written: it is a folder or the input, or its folder does not exist")
    return source, output


def _chunks(documents: Iterator[tuple[int, Any]]) -> Iterator[Iterator[tuple[int, Any]]]:
    """CHUNK documents each, read as they are taken; each chunk is to be taken to its end before the next."""
    for first in documents:
        yield itertools.chain([first], itertools.islice(documents, CHUNK - 1))


def _run_chunk(
    runner: Runner, chunk: Iterable[tuple[int, Any]], journal: Journal, report: Callable[[str], None]
) -> tuple[int, int]:
    """Write the rows of a chunk as they are computed; returns the numbers of its documents and of those refused."""
    lines, refused = set(), set()
    for row in runner.rows(chunk):
        journal.write(row)
        lines.add(row["line"])
        if "error" in row:
            refused.add(row["line"])
            report(f"{row['line']}: {row['error']}")
    return len(lines), len(refused)


def _stamp(source: Path) -> tuple[int, ...] | None:
    """Changes when the file is written or replaced; None where it is gone."""
    try:
        status = source.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _check_unchanged(source: Path, digest: str, journal: Journal) -> None:
    try:
        unchanged = sha256(source) == digest
    except OSError:
        unchanged = False
    if not unchanged:
        journal.remove()
        raise InputError(
            f"{source} was changed or removed during the run, so the rows mix two versions of it; they are dropped: "
            "run again, and leave the file as it is until the end"
        )


def _write_output(journal: Journal, output: Path, signature: Signature) -> None:
    try:
        write_rows(journal.rows, output, outputs_per_sequence(signature))
    except InputError as error:
        other = output.with_suffix(".jsonl")
        raise InputError(
            f"{output} cannot be written as Parquet: {error}; nothing is lost: rename {journal.path} to "
            f"{journal_path(other)} and give --output {other}, which writes the rows as JSON without computing again"
        ) from error
