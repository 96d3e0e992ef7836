"""`map_documents` runs a model over files of documents in a Ray cluster, and resumes a stopped run."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfx.checks import file_path, function, one_of, shown
from lfx.errors import ArtifactError, InputError, one_line
from lfx.files import is_disk_full
from lfx.ray.actor import Piece
from lfx.ray.cluster import PoolSize, connected, machines
from lfx.ray.engine import EngineOptions
from lfx.ray.inputs import Inputs, check_apart, local_source
from lfx.ray.journal import Parts
from lfx.ray.parts import FORMATS, join
from lfx.ray.pool import Pool, Task
from lfx.runtime.documents.rows import Summary
from lfx.runtime.documents.run import CHUNK
from lfx.runtime.hub import local_path, pinned


@dataclass(frozen=True)
class Progress:
    """State of a run.

    Attributes:
        documents: number of documents with rows.
        total: number of documents of the input.
        tokens: number of tokens that this run has computed.
        actors: number of actors at work.
    """

    documents: int
    total: int
    tokens: int
    actors: int


def map_documents(
    source: str | Path,
    output: str | Path,
    options: EngineOptions,
    size: PoolSize | None = None,
    *,
    address: str | None = None,
    file_format: str = "parquet",
    progress: Callable[[Progress], None] = lambda state: None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Summary, dict[str, Any]]:
    """Run each document of a file or of the files in a folder, and write one row for each document or window.

    Documents and rows are those of `lfx.runtime.documents.run_documents`; a row has the name of its `file` too. The
    rows of 256 documents are one file in the output, a part. Parts are in the order of the names of the files, and
    in each file of the documents' numbers. In Parquet all parts have the same columns, and an id that is no string is
    written as JSON text.

    If an actor or its machine ends, another one runs its documents. Documents during which two actors have ended are
    split in halves, which run on their own; a single document during which two actors have ended gets an `error`.

    Args:
        source: a file, a folder or a URI, see `lfx.ray.inputs.Inputs`; only this process reads it.
        output: a folder on this machine, which is made. The same call resumes a stopped run; other options are
            refused.
        options: what runs, the same on every machine. Default of threads: the number of CPUs of an actor.
        size: number of actors, and what each of them reserves.
        address: of a Ray cluster. Default: Ray is started on this machine, unless this process is connected already.
        file_format: "parquet" or "jsonl".
        progress: called after each part.
        report: called with a line for each row with an error, and for each actor that ends.
    Returns:
        The counts of this run, and what decided the rows.
    Raises:
        InputError: an argument is out of range, the input cannot be read or changed during the run, or the output
            cannot be written or has results of other options.
        DependencyError: ray, or what the model needs, is not installed.
        LfxError: there is no cluster, or the engine cannot run any input. Complete parts are kept, and the next run
            makes the others.
    """
    one_of(file_format, "file_format", FORMATS)
    progress, report = function(progress, "progress"), function(report, "report")
    if not isinstance(options, EngineOptions) or not isinstance(size, PoolSize | None):
        raise InputError(
            f"options and size are {type(options).__name__} and {type(size).__name__}; give EngineOptions(model), and "
            "a PoolSize or None"
        )
    if not isinstance(source, str | os.PathLike) or source == "":
        raise InputError(f"the input is {shown(source)}; give a path or a URI")
    source = local_source(str(source)) if "://" in str(source) else str(file_path(source, "the input"))
    output = file_path(output, "the output").absolute()
    if not output.parent.is_dir() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} cannot be written: it is no folder, or the folder that it is in does not exist")
    check_apart(source, output)
    size = size or PoolSize()
    options = dataclasses.replace(
        options,
        model=_model_of_actors(file_path(options.model, "the model"), address),
        tokenizer=None if options.tokenizer is None else file_path(options.tokenizer, "the tokenizer").absolute(),
        threads=options.threads or size.cpus,
    )
    inputs = Inputs(source)
    with connected(address) as ray:
        count = size.fit(machines(ray), may_grow=address is not None)
        resources = {"num_cpus": float(size.cpus), "num_gpus": size.gpus}
        with Pool(ray, options, file_format, count, resources, report) as pool:
            facts, _ = pool.opened()
            header = {"map": 1, "input": inputs.digest, "format": file_format, **facts}
            try:
                with Parts(output, header, file_format) as parts:
                    return _run(pool, inputs, parts, file_format, progress, report), facts
            except OSError as error:
                cure = "make room on its disk" if is_disk_full(error) else "fix the cause"
                raise InputError(
                    f"{output} cannot be written: {one_line(error)}; {cure}, and give the same command again: "
                    "complete parts are kept, and it makes the others"
                ) from error


def _model_of_actors(model: Path, address: str | None) -> Path:
    """The model that actors open: an absolute path, or on other machines the present commit of a repository of the hub.

    Raises:
        ArtifactError: without `address`, there is no such path; or the repository cannot be fetched.
    """
    local = local_path(model)
    if local != model and address is not None:
        return pinned(model, local)
    if address is None and not local.exists():  # Ray needs seconds to start
        raise ArtifactError(f"{model} does not exist; give a bundle or a plan")
    return local.absolute()


def _run(
    pool: Pool,
    inputs: Inputs,
    parts: Parts,
    file_format: str,
    progress: Callable[[Progress], None],
    report: Callable[[str], None],
) -> Summary:
    """Make the parts that are missing."""
    resumed = sum(counts["documents"] for counts in parts.complete.values())
    summary = Summary(resumed, sum(counts["refused"] for counts in parts.complete.values()), resumed_at=resumed)
    progress(Progress(resumed, inputs.documents, 0, pool.actors))
    pieces: dict[int, dict[int, Piece]] = {}  # number of a part -> its pieces by the index of their first document
    for task, piece in pool.results(_missing(inputs, parts)):
        for line in piece.errors:
            report(line)
        summary.windows, summary.tokens = summary.windows + piece.windows, summary.tokens + piece.tokens
        own = pieces.setdefault(task.part, {})
        own[task.first] = piece
        documents = sum(other.documents for other in own.values())
        if documents < min(CHUNK, inputs.documents - task.part * CHUNK):
            continue  # the task was split
        ordered = [own[first] for first in sorted(pieces.pop(task.part))]
        refused = sum(other.refused for other in ordered)
        parts.write(task.part, join([other.content for other in ordered], file_format), documents, refused)
        summary.documents, summary.refused = summary.documents + documents, summary.refused + refused
        progress(Progress(summary.documents, inputs.documents, summary.tokens, pool.actors))
    return summary


def _missing(inputs: Inputs, parts: Parts) -> Iterator[Task]:
    """Read the documents of the parts that are missing."""
    complete = set(parts.complete)
    count = -(-inputs.documents // CHUNK)
    # Parts that follow one another are read in one go: a file of JSON lines can be read from its start only.
    for is_complete, run in itertools.groupby(range(count), complete.__contains__):
        numbers = list(run)
        if is_complete:
            continue
        documents = inputs.read(numbers[0] * CHUNK, min((numbers[-1] + 1) * CHUNK, inputs.documents))
        for number in numbers:
            yield Task(number, 0, list(itertools.islice(documents, CHUNK)))
        next(documents, None)  # checks that the last file was not changed
