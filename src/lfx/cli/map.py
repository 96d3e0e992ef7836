"""`lfx map`: run a model on files of documents through a pool of Engines in a Ray cluster."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfx.cli.engine import add_engine_options
from lfx.cli.options import Command, FilePath, FilledText, document_options
from lfx.cli.terminal import echo, echo_json
from lfx.errors import InputError

if TYPE_CHECKING:
    from lfx.ray.job import Progress


@click.command("map", cls=Command)
@click.argument("source", metavar="INPUT", type=FilledText())
@click.argument("output", type=FilePath())
@click.option("--model", required=True, type=FilePath("a bundle or a plan"), help="Run this bundle or plan.")
@click.option(
    "--address",
    type=FilledText(),
    help="Connect to the Ray cluster at this address.  [default: Ray is started on this machine]",
)
@click.option(
    "--actors",
    type=click.IntRange(1, 100_000),
    help="Run this many Engines.  [default: as many as fit; without --gpus, one CPU stays free]",
)
@click.option(
    "--cpus",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Reserve this many CPUs for each actor; also the default of --threads.",
)
@click.option(
    "--gpus",
    type=click.FloatRange(0, 64),
    default=0.0,
    show_default=True,
    help="Reserve this many GPUs for each actor; a fraction shares one.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["parquet", "jsonl"]),
    default="parquet",
    show_default=True,
    help="Write the parts in this format.",
)
@document_options
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
@add_engine_options
def command(
    source: str,
    output: Path,
    model: Path,
    address: str | None,
    actors: int | None,
    cpus: int,
    gpus: float,
    file_format: str,
    max_windows: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run files of documents through Engines on a Ray cluster.

    INPUT is a .jsonl (.ndjson) or .parquet file with a field text or input_ids, a folder of such files, or a URI such
    as s3://bucket/folder. OUTPUT is a folder, in which each file has the rows of 256 documents, as lfx run has them.

    An interrupted run is resumed by the same command.
    """
    if options["stride"] is None and max_windows is not None:
        raise click.UsageError("--max-windows needs --stride, which cuts documents into windows; give both")
    uses_gpu = options["provider"] != "cpu" or options["backend"] == "tensorrt" or model.suffix == ".plan"
    if gpus and not uses_gpu:
        raise click.UsageError("--gpus reserves GPUs that nothing uses: give --provider cuda, or a plan as --model")
    if uses_gpu and not gpus:
        raise click.UsageError("the model runs on a GPU, which Ray hides from actors without one: give --gpus 1")

    from lfx.ray import EngineOptions, map_documents
    from lfx.ray.cluster import PoolSize

    if max_windows is not None:
        options["max_windows"] = max_windows
    engine = EngineOptions(model, **options)
    start = time.perf_counter()
    begun = list[float]()  # when the first actor had opened the model

    def follow(state: Progress) -> None:
        begun.append(time.perf_counter())
        show(state, begun[0])

    try:
        with _progress_bar() as show:
            done, facts = map_documents(
                source,
                output,
                engine,
                PoolSize(actors, cpus, gpus),
                address=address,
                file_format=file_format,
                progress=follow,
                report=lambda line: echo(line, err=True),
            )
    except KeyboardInterrupt:
        echo("finished documents are kept; run the same command to resume", err=True)
        raise
    start_seconds, seconds = begun[0] - start, begun[-1] - begun[0]
    if as_json:
        times = {"start_seconds": start_seconds, "seconds": seconds}
        echo_json({**dataclasses.asdict(done), **times, "backend": facts["backend"]})
    else:
        resumed = f" ({done.resumed_at:,} in an earlier run)" if done.resumed_at else ""
        echo(f"{output}: {done.documents:,} documents{resumed}, {done.refused:,} refused, {facts['backend']}")
        rate = f"{done.tokens:,} tokens in {seconds:.1f} s, {done.tokens / max(seconds, 1e-9):,.0f} tokens/s"
        echo(f"{rate}; Ray and the model started in {start_seconds:.1f} s")
    if done.refused:
        raise InputError(f"{done.refused} of {done.documents} documents were refused; the column error says why")


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress, float], None]]:
    """Show the progress of a run on stderr: in a bar, or as lines if stderr is no terminal.

    Yields:
        A function of the state, and of the time at which the first document began.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)

    def describe(state: Any, begun: float) -> str:
        rate = state.tokens / max(time.perf_counter() - begun, 1e-9)
        actors = f"{state.actors} actor{'s' * (state.actors != 1)}"
        return f"{state.documents:,} of {state.total:,} documents, {rate:,.0f} tokens/s, {actors}"

    if not console.is_terminal:
        yield lambda state, begun: echo(f"… {describe(state, begun)}", err=True)
        return
    columns = (BarColumn(30), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=console, transient=True) as bar:
        task = bar.add_task("starting Ray", total=None)
        yield lambda state, begun: bar.update(
            task, description=describe(state, begun), total=state.total, completed=state.documents
        )
