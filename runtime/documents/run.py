"""`run_documents` runs a model over a file of documents and resumes a stopped run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lfx import __version__
from lfx.checks import LARGEST, file_path, function, output_file, shown, whole_number
from lfx.errors import InputError, one_line, require
from lfx.files import is_disk_full, is_same
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
from lfx.runtime.documents.journal import Journal, journal_path, read_header
from lfx.runtime.documents.rows import Runner, Summary, outputs_per_sequence, windows_of
from lfx.runtime.engine import Engine
from lfx.runtime.outputs import OUTPUT_BYTES
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.ragged import check_cuttable
from lfx.runtime.streaming import AHEAD
from lfx.runtime.text_files import TOKENIZER
from lfx.runtime.tokenizer import END_TO_END, MAX_CHARACTERS, Encoded, Tokenizer, check_signature
from lfx.signature import TEXT_GENERATION, Signature

# Number of documents of a chunk. A stopped run resumes after its last complete chunk. Batches are formed within a
# chunk, so a resumed run has the same batches, and bitwise the same outputs, as one that was not stopped.
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
    generation: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Run each document of a file, and write one row for each document or window.

    A document is an object with `text`, and `pair` if the task takes one, or with `input_ids`. Its `id`, of at most
    10,000 bytes as JSON, is copied to its rows. An `attention_mask` or `global_attention_mask` beside `input_ids` must
    be that which the document is run with; other fields are ignored.

    A row has `line` (the document's number in the input, from 1), `id`, `window` (from 0, with a stride only), `tokens`
    (number of tokens), `answers` (if there is a tokenizer and the task has answers) and `outputs` (the outputs without
    a sequence axis). A model that writes texts has `new_tokens` (number of generated tokens) and `summary` in place of
    `answers` and `outputs`, or `output_ids` if there is no tokenizer. A document that is refused, or on which the
    engine fails, has `line`, `id` and `error` instead. If no Parquet column type holds all ids, ids that are not
    strings are written as JSON text.

    If a batch fails in the engine, its sequences run again one by one, and those that fail alone get an `error`. The
    run stops with an error if the engine cannot run a single token.

    Args:
        engine: the model; multiple-choice is not supported.
        tokenizer: the model's tokenizer; None if all documents have input_ids.
        source, output: paths with the suffix .jsonl, .ndjson or .parquet.
        stride: number of tokens from the start of a window to the start of the next, 1 or more, for documents longer
            than the model's maximum. Default: such documents are refused.
        max_windows: largest number of windows of a document, 1 or more; a document with more is refused. Default:
            4,096.
        generation: options of `Engine.generate`, for a model that writes texts; one text for each document or window.
            A seed is drawn for sampling without one, and a resumed run has that of the stopped one.
        progress: called with a line after each chunk of 256 documents.
        report: called with a line for each row with an error.
    Returns:
        The counts of this run.
    Raises:
        InputError: an argument is out of range, a file cannot be read or written or has another suffix, or the input
            changed during the run.
        DependencyError: a file is Parquet and pyarrow is not installed.
        LfxError: the engine cannot run any input, or another process wrote to the journal. Completed chunks are kept,
            and the next run resumes after them.
    """
    if not isinstance(engine, Engine) or not isinstance(tokenizer, Tokenizer | None):
        raise InputError(
            f"engine and tokenizer are {type(engine).__name__} and {type(tokenizer).__name__}; give an Engine, and a "
            "Tokenizer or None"
        )
    stride = None if stride is None else whole_number(stride, "stride", 1)
    max_windows = whole_number(max_windows, "max_windows", 1)
    progress, report = function(progress, "progress"), function(report, "report")
    source, output = _check_files(engine, source, output)
    if not isinstance(generation, Mapping | None) or not all(isinstance(name, str) for name in generation or ()):
        raise InputError(f"generation is {shown(generation)}; give a dict of options, or leave it out")
    generation = dict(generation or {})
    check_generation(engine, generation)
    generation |= _drawn_seed(engine, generation, output)
    try:
        stamp, digest = _stamp(source), sha256(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {one_line(error)}") from error
    summary = Summary()
    postprocessor = Postprocessor(tokenizer) if tokenizer is not None else None
    runner = Runner(engine, tokenizer, postprocessor, stride, max_windows, summary, generation)
    header = _header(runner, digest)
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
        cure = "make room on its disk" if is_disk_full(error) else "fix the cause"
        raise InputError(
            f"{output} cannot be written: {one_line(error)}; {cure}, and give the same command again: completed "
            "documents are kept, and it resumes after them"
        ) from error
    return summary


def _header(runner: Runner, digest: str) -> dict[str, Any]:
    """The header of a journal: all that decides the rows. `digest` is the input's sha256."""
    return {"journal": 2, "lfx": __version__, "input": digest, **row_options(runner), "kernels": runner.engine.kernels}


def row_options(runner: Runner) -> dict[str, Any]:
    """The model and the options that decide the rows of an input, as JSON types."""
    engine, tokenizer = runner.engine, runner.tokenizer
    return {
        "model": engine.identity,
        "tokenizer": tokenizer.sha256 if tokenizer is not None else None,
        "backend": engine.backend,
        "precision": engine.precision,
        "stride": runner.stride,
        "max_windows": runner.max_windows,
        "token_budget": engine.token_budget,
        "groups": [CHUNK, AHEAD, OUTPUT_BYTES],
        **({"generation": _settings(runner)} if engine.signature.task == TEXT_GENERATION else {}),
    }


def _settings(runner: Runner) -> Any:
    """The settings of generation, as JSON types."""
    settings = runner.engine.generation_settings(**runner.generation)
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _drawn_seed(engine: Engine, generation: Mapping[str, Any], output: Path) -> dict[str, int]:
    """The option `seed` for sampling without one: the seed in the journal of a stopped run, or a new one."""
    if engine.signature.task != TEXT_GENERATION:
        return {}
    settings = engine.generation_settings(**generation)
    if not settings.do_sample or settings.seed is not None:
        return {}
    stopped = read_header(output).get("generation")
    kept = stopped.get("seed") if isinstance(stopped, dict) else None
    return {"seed": kept if type(kept) is int and 0 <= kept <= LARGEST else secrets.randbelow(LARGEST)}


def check_generation(engine: Engine, generation: Mapping[str, Any]) -> None:
    """Raise InputError for options of generation that the model does not take, or that give several texts."""
    if engine.signature.task != TEXT_GENERATION:
        if generation:
            raise InputError(
                f"options of generation ({', '.join(generation)}) are for models that write texts, and this one is for "
                f"{engine.signature.task}; leave them out"
            )
        return
    settings = engine.generation_settings(**generation)
    if settings.num_return_sequences > 1:
        raise InputError(
            f"num_return_sequences {settings.num_return_sequences}: one text is written for each document; give "
            "num_return_sequences=1, or use Engine.generate"
        )


def encoded(source: Path, signature: Signature, folder: Path, *, unlisted: bool = False) -> Iterator[Encoded]:
    """Tokenize each document of a file; a long document becomes windows without overlap.

    Args:
        source: path of a file as for `run_documents`, or of a text file, which is one document.
        folder: folder of the tokenizer's files; it may have none if all documents have input_ids.
        unlisted: as for `Tokenizer`.
    Yields:
        The windows in order; one document is in memory at a time.
    Raises:
        InputError: the file or a document cannot be read; the message has the document's line.
    """
    check_signature(signature)
    source, folder = file_path(source, "the file of documents"), file_path(folder, "the tokenizer's folder")
    check_source(source)
    tokenizer = Tokenizer(folder, signature, unlisted=unlisted) if (folder / TOKENIZER).exists() else None
    if is_documents(source):
        documents = read_documents(source)
    else:
        try:
            with source.open(encoding="utf-8-sig") as file:
                documents = iter([(1, {"text": file.read(MAX_CHARACTERS + 1)})])  # one more than is tokenized
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read as UTF-8 text: {error}") from error
    for line, document in documents:
        try:
            windows = windows_of(document, signature, tokenizer, END_TO_END)
        except InputError as error:
            raise InputError(f"{source}:{line}: {error}") from error
        yield from windows


def _check_files(engine: Engine, source: Path, output: Path) -> tuple[Path, Path]:
    """Check the two paths before anything runs."""
    if engine.signature.has_choices:
        raise InputError("files of documents are not run for multiple-choice; use Engine.run")
    if engine.signature.output_attentions:
        check_cuttable(engine.signature)
    source, output = file_path(source, "the input"), output_file(output, "output")
    for path in (source, output):
        if not is_documents(path):
            raise InputError(f"{path} is none of {', '.join(SUFFIXES)}; results are written in one of these formats")
    if is_parquet(source) or is_parquet(output):
        require("pyarrow.parquet", "parquet")
    check_source(source)
    if is_same(output, source):
        raise InputError(f"{output} cannot be written: it is the input; choose another output")
    return source, output


def _chunks(documents: Iterator[tuple[int, Any]]) -> Iterator[Iterator[tuple[int, Any]]]:
    """Yield iterators over CHUNK documents each, read lazily; exhaust each one before the next."""
    for first in documents:
        yield itertools.chain([first], itertools.islice(documents, CHUNK - 1))


def _run_chunk(
    runner: Runner, chunk: Iterable[tuple[int, Any]], journal: Journal, report: Callable[[str], None]
) -> tuple[int, int]:
    """Write the rows of a chunk as they are computed; returns its number of documents and of refused ones."""
    lines, refused = set(), set()
    for row in runner.rows(chunk):
        journal.write(row)
        lines.add(row["line"])
        if "error" in row:
            refused.add(row["line"])
            report(f"{row['line']}: {row['error']}")
    return len(lines), len(refused)


def _stamp(source: Path) -> tuple[int, ...] | None:
    """Identity, size and time of a file, which change when it is written or replaced; None if it does not exist."""
    try:
        status = source.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _check_unchanged(source: Path, digest: str, journal: Journal) -> None:
    """Raise InputError, and delete the journal, if the input changed during the run."""
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
    """Write the rows of the journal to the output; if Parquet cannot represent them, the error says how to get JSON."""
    try:
        write_rows(journal.rows, output, outputs_per_sequence(signature))
    except InputError as error:
        other = output.with_suffix(".jsonl")
        raise InputError(
            f"{output} cannot be written as Parquet: {error}; nothing is lost: rename {journal.path} to "
            f"{journal_path(other)} and give --output {other}, which writes the rows as JSON without computing again"
        ) from error
