"""`lfx bench`: an Engine beside PyTorch, rows as a table and as JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfx.checks import one_of, output_file, whole_number
from lfx.cli.engine import engine_options
from lfx.cli.options import MOST_TOKENS, Command, FilePath, FilledText, OutputPath
from lfx.cli.source import checkpoint_of, load_checkpoint
from lfx.cli.terminal import echo, echo_json, progress, table
from lfx.errors import InputError, require
from lfx.files import replacing, why_unwritten
from lfx.machine import cpu_name, package_versions

if TYPE_CHECKING:
    from lfx.cli.engine import OpenEngine
    from lfx.runtime import Engine
    from lfx.runtime.bench import Run

AGAINST = ("pytorch", "pytorch-bf16", "pytorch-compile")
_LENGTHS = (512, 1024, 2048, 4096)
_PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "numpy")


@click.command("bench", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--length", "lengths", type=click.IntRange(1, MOST_TOKENS), multiple=True, help="[default: 512 to 4096]")
@click.option(
    "--batch", "batch_sizes", type=click.IntRange(1, 1_000_000), multiple=True, default=[1], show_default=True
)
@click.option("--rounds", type=click.IntRange(1, 1_000_000), default=5, show_default=True, help="After one warm-up.")
@click.option(
    "--against",
    type=click.Choice(AGAINST),
    multiple=True,
    help="Measure PyTorch too, in turns, in the same process.",
)
@click.option(
    "--source",
    type=FilledText(),
    help="The checkpoint to compare with.  [default: the folder that the bundle was made from]",
)
@click.option("--output", type=OutputPath(), help="Write the rows to this .jsonl file.")
@click.option("--plot", type=OutputPath(), help="Draw tokens per second over length into this .png file.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON lines.")
@engine_options
def command(model: Path, open_engine: OpenEngine, **options: Any) -> None:
    """Measure a bundle or a plan: latency, tokens per second, peak memory, by length and batch."""
    if options["source"] is not None and not options["against"]:
        raise click.UsageError("--source is what --against measures; give both")
    run_bench(model, open_engine, **options)


def run_bench(
    model: Path,
    open_engine: OpenEngine,
    *,
    lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    against: tuple[str, ...],
    source: str | None,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure and show.

    Raises:
        InputError: an option that cannot be had, or a checkpoint that is not known.
        ArtifactError: the checkpoint has other weights than the artifact was made from.
    """
    from lfx.runtime import bench

    rounds = whole_number(rounds, "rounds", 1)
    lengths = tuple(whole_number(length, "length", 1) for length in lengths)
    batch_sizes = tuple(whole_number(batch, "batch", 1) for batch in batch_sizes)
    for name in against:
        one_of(name, "against", AGAINST)
    _check_outputs(output, plot)
    with progress() as step, open_engine(model) as engine:
        signature = engine.signature
        if signature.task == "multiple-choice":
            raise InputError("multiple-choice is not measured: its batches have a third axis")
        limit = signature.max_seqlen
        wanted = lengths or tuple(n for n in _LENGTHS if limit is None or n <= limit) or (limit or 512,)
        for length in wanted:
            if limit is not None and length > limit:
                raise InputError(f"length {length} is above the model's maximum {limit}")
        marks = {} if signature.default_global in ("none", "first") else {"global_attention_mask": 0}

        def run(ids: Any) -> Any:
            return engine.run(ids, **{name: ids * value for name, value in marks.items()})

        contenders: dict[str, Run] = {f"lfx {engine.backend.split()[0]}": run}
        contenders |= _torch_contenders(model, engine, against, source, marks, step)
        about = {
            "model": engine.manifest.to_dict().get("manifest_sha256") if engine.manifest is not None else None,
            "architecture": signature.architecture,
            "precision": engine.precision,
            "backend": engine.backend,
            "threads": engine.threads,
            "cores": os.cpu_count(),
            "cpu": cpu_name(),
            "versions": package_versions(_PACKAGES),
        }
        rows = bench.measure(
            contenders, wanted, batch_sizes, rounds=rounds, vocab_size=signature.vocab_size or 32, progress=step
        )
        for row in rows:
            row.update(about)
            if not against:  # with others in the process, its memory is not the Engine's
                row["peak_memory_bytes"] = bench.peak_memory_bytes()
    if output is not None:
        _write(output, rows)
    if plot is not None:
        bench.plot(rows, plot)
    if as_json:
        for row in rows:
            echo_json(row)
        return
    header = ["contender", "batch", "tokens", "p50 ms", "p95 ms", "tokens/s", "time, first = 1"]
    table(
        header,
        [
            [
                row["contender"],
                str(row["batch"]),
                str(row["seqlen"]),
                f"{row['p50_ms']:.1f}",
                f"{row['p95_ms']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['times_the_first']:.2f}",
            ]
            for row in rows
        ],
    )
    if not against:
        echo(f"peak memory of the process: {(rows[-1]['peak_memory_bytes'] or 0) / 1e9:.2f} GB")


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    """Before the minutes of measuring."""
    for path, name in ((output, "--output"), (plot, "--plot")):
        if path is not None:
            output_file(path, name)
    if plot is not None:
        require("matplotlib", "report")


def _torch_contenders(
    model: Path,
    engine: Engine,
    against: tuple[str, ...],
    source: str | None,
    marks: dict[str, int],
    step: Callable[[str], None],
) -> dict[str, Run]:
    if not against:
        return {}
    known = engine.manifest.source if engine.manifest is not None else None
    checkpoint = checkpoint_of(model, known, source, f"lfx bench {{}} --against {against[0]} --source {{}}")
    step("importing torch")
    import torch

    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    found: dict[str, Run] = {}
    for name in dict.fromkeys(against):
        module = load_checkpoint(checkpoint, engine.signature.task, known, step)
        run: Any = module.to(torch.bfloat16) if name == "pytorch-bf16" else module
        run = torch.compile(run) if name == "pytorch-compile" else run
        found[name] = _torch_run(run, marks)
    return found


def _torch_run(module: Any, marks: dict[str, int]) -> Run:
    import torch

    def run(ids: Any) -> Any:
        tensor = torch.from_numpy(ids)
        with torch.inference_mode():
            return module(tensor, **{name: tensor * value for name, value in marks.items()})

    return run


def _write(output: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        with replacing(output) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(why_unwritten(output, error, "choose another --output")) from error
