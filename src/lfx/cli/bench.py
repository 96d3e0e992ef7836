"""`lfx bench`: measure an Engine, and PyTorch for comparison; print a table, write JSONL or draw a plot."""

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
from lfx.signature import TEXT_GENERATION, Signature

if TYPE_CHECKING:
    from lfx.cli.engine import OpenEngine
    from lfx.runtime import Engine
    from lfx.runtime.bench import Generate, Run

AGAINST = ("pytorch", "pytorch-bf16", "pytorch-compile")
_LENGTHS = (512, 1024, 2048, 4096)
_NEW_TOKENS = 128
# Greedy search that has no end token and no rules of the checkpoint's.
_GREEDY: dict[str, Any] = {
    "num_beams": 1,
    "do_sample": False,
    "eos_token_id": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "no_repeat_ngram_size": 0,
}
_PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "numpy")


@click.command("bench", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(1, MOST_TOKENS),
    multiple=True,
    help="Set the sequence length, in tokens (repeatable).  [default: 512, 1024, 2048 and 4096]",
)
@click.option(
    "--batch",
    "batch_sizes",
    type=click.IntRange(1, 1_000_000),
    multiple=True,
    default=[1],
    show_default=True,
    help="Set the batch size (repeatable).",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1_000_000),
    default=5,
    show_default=True,
    help="Set the number of runs after one warm-up.",
)
@click.option(
    "--against",
    type=click.Choice(AGAINST),
    multiple=True,
    help="Measure PyTorch too, alternating, in the same process.",
)
@click.option(
    "--source",
    type=FilledText(),
    help="Name the checkpoint for --against.  [default: the folder that the bundle was exported from]",
)
@click.option(
    "--only",
    type=FilledText(),
    multiple=True,
    help="Copy only the model output of this name from the backend (repeatable).  [default: all]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(2, MOST_TOKENS),
    help="Set the number of tokens that a model that writes texts generates.  "
    "[default: 128, or what its decoder has positions for]",
)
@click.option("--output", type=OutputPath(), help="Write the rows to this .jsonl file.")
@click.option("--plot", type=OutputPath(), help="Plot tokens per second over length into this .png file.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON lines.")
@engine_options
def command(model: Path, open_engine: OpenEngine, **options: Any) -> None:
    """Measure latency, tokens per second and peak memory.

    A bundle or a plan is measured for each length and batch size.

    For a model that writes texts, the prefill (the time to the first token) and the tokens per second after it are
    separate figures.
    """
    if options["source"] is not None and not options["against"]:
        raise click.UsageError("--source is the checkpoint that --against measures; give both")
    from lfx.runtime.hub import local_path

    run_bench(local_path(model), open_engine, **options)


def run_bench(
    model: Path,
    open_engine: OpenEngine,
    *,
    lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    against: tuple[str, ...],
    source: str | None,
    new_tokens: int | None = None,
    only: tuple[str, ...] = (),
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure an Engine and print the rows; the arguments are the command's options.

    Raises:
        InputError: an option is invalid, or the checkpoint is unknown.
        ArtifactError: the checkpoint's weights are not those that the artifact was exported from.
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
        if signature.has_choices:
            raise InputError(
                "multiple-choice is not measured: its batches have a third axis; give another task's model"
            )
        _check_task(signature.task, new_tokens, only, plot)
        lengths = _checked_lengths(lengths, signature.max_seqlen)
        new_tokens = _checked_new_tokens(signature, new_tokens)
        step(f"attention runs in {'fused kernels' if engine.kernels == 'fused' else 'function bodies'}")
        modules = _torch_modules(model, engine, against, source, step)
        settings: dict[str, Any] = {"rounds": rounds, "vocab_size": signature.vocab_size or 32, "progress": step}
        if signature.task == TEXT_GENERATION:
            settings["new_tokens"] = new_tokens
            rows = _measure_generation(engine, modules, lengths, batch_sizes, **settings)
        else:
            rows = _measure(engine, modules, only, lengths, batch_sizes, **settings)
        facts = _facts(engine)
        for row in rows:
            row.update(facts)
            if not against:  # the process's peak memory would include PyTorch's
                row["peak_memory_bytes"] = bench.peak_memory_bytes()
    try:
        if output is not None:
            _write(output, rows)
        if plot is not None:
            bench.plot(rows, plot)
    finally:  # rows that cannot be written are printed
        _print(rows, as_json)


def _check_task(task: str, new_tokens: int | None, only: tuple[str, ...], plot: Path | None) -> None:
    """Raise InputError for an option that models of this task do not have."""
    if task != TEXT_GENERATION and new_tokens is not None:
        raise InputError(f"--new-tokens is for models that write texts, and this one is for {task}; leave it out")
    if task == TEXT_GENERATION and only:
        raise InputError("--only is for models with outputs, and this one writes texts; leave it out")
    if task == TEXT_GENERATION and plot is not None:
        raise InputError("--plot is not drawn for models that write texts; leave it out")


def _measure(
    engine: Engine, modules: dict[str, Any], only: tuple[str, ...], *sizes: tuple[int, ...], **settings: Any
) -> list[dict[str, Any]]:
    """`lfx.runtime.bench.measure` for an Engine and models of PyTorch."""
    from lfx.runtime import bench

    # Default rules other than none and first need separators, which random ids do not have: give a mask of zeros.
    signature = engine.signature
    takes_mask = any(spec.name == "global_attention_mask" for spec in signature.inputs)
    needs_mask = takes_mask and signature.default_global not in ("none", "first")

    def run(ids: Any) -> Any:
        return engine.run(ids, None, ids * 0 if needs_mask else None, outputs=only or None)

    contenders: dict[str, Run] = {_name(engine): run}
    first = signature.default_global == "first"
    contenders |= {name: _torch_run(module, first=first) for name, module in modules.items()}
    return bench.measure(contenders, *sizes, **settings)


def _measure_generation(
    engine: Engine, modules: dict[str, Any], *sizes: tuple[int, ...], **settings: Any
) -> list[dict[str, Any]]:
    """`lfx.runtime.bench.measure_generation` for an Engine and models of PyTorch."""
    from lfx.runtime import bench

    contenders = {_name(engine): engine_generate(engine)}
    first = engine.signature.default_global == "first"
    contenders |= {name: torch_generate(module, first=first) for name, module in modules.items()}
    return bench.measure_generation(contenders, *sizes, **settings)


def _name(engine: Engine) -> str:
    return f"lfx {engine.backend.split()[0]}"


def _checked_lengths(lengths: tuple[int, ...], max_seqlen: int | None) -> tuple[int, ...]:
    """Return the lengths, or the default ones up to the model's maximum.

    Raises:
        InputError: a length is above the maximum.
    """
    for length in lengths:
        if max_seqlen is not None and length > max_seqlen:
            raise InputError(f"length {length} is above the model's maximum {max_seqlen}; give a shorter one")
    return lengths or tuple(n for n in _LENGTHS if max_seqlen is None or n <= max_seqlen) or (max_seqlen or 512,)


def _checked_new_tokens(signature: Signature, new_tokens: int | None) -> int:
    """Return the number of tokens, or the default one up to the decoder's maximum.

    Raises:
        InputError: the number is above the maximum.
    """
    most = signature.decoder.max_tokens if signature.decoder is not None else None
    if most is not None and new_tokens is not None and new_tokens > most:
        raise InputError(f"--new-tokens {new_tokens} is above what the decoder has positions for; give at most {most}")
    return new_tokens or min(_NEW_TOKENS, most or _NEW_TOKENS)


def _facts(engine: Engine) -> dict[str, Any]:
    """Return the model, settings and machine, for each row."""
    return {
        "model": engine.manifest.to_dict().get("manifest_sha256") if engine.manifest is not None else None,
        "architecture": engine.signature.architecture,
        "precision": engine.precision,
        "backend": engine.backend,
        "kernels": engine.kernels,
        "threads": engine.threads,
        "cores": os.cpu_count(),
        "cpu": cpu_name(),
        "versions": package_versions(_PACKAGES),
    }


def engine_generate(engine: Engine) -> Generate:
    """Return greedy search of an Engine, which never ends early."""

    def run(ids: Any, new_tokens: int, on_token: Callable[[], None]) -> None:
        for _ in engine.generate(ids, stream=True, max_new_tokens=new_tokens, **_GREEDY):
            on_token()

    return run


def torch_generate(module: Any, *, first: bool = True) -> Generate:
    """Return greedy search of a model of Hugging Face's that never ends early, with the first token global or none."""
    import torch

    class Streamer:
        """Counts the calls of `generate`, of which the first has the start token."""

        def __init__(self, on_token: Callable[[], None]) -> None:
            self.calls, self.on_token = 0, on_token

        def put(self, tokens: Any) -> None:
            self.calls += 1
            if self.calls > 1:
                self.on_token()

        def end(self) -> None:
            pass

    def run(ids: Any, new_tokens: int, on_token: Callable[[], None]) -> None:
        tensor = torch.from_numpy(ids)
        global_mask = _global_mask(tensor, first=first)
        masks = {"attention_mask": torch.ones_like(tensor), "global_attention_mask": global_mask}
        with torch.inference_mode():
            module.generate(tensor, **masks, max_new_tokens=new_tokens, streamer=Streamer(on_token), **_GREEDY)

    return run


def _show_generation(rows: list[dict[str, Any]]) -> None:
    header = ["contender", "batch", "tokens", "prefill p50 ms", "prefill p95 ms", "new tokens", "new tokens/s"]
    table(
        [*header, "relative prefill", "relative decoding"],
        [
            [
                row["contender"],
                str(row["batch"]),
                str(row["seqlen"]),
                f"{row['prefill_p50_ms']:.1f}",
                f"{row['prefill_p95_ms']:.1f}",
                str(row["new_tokens"]),
                f"{row['decode_tokens_per_second']:,.1f}",
                f"{row['prefill_times_the_first']:.2f}",
                f"{row['decode_times_the_first']:.2f}",
            ]
            for row in rows
        ],
    )


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the rows, as JSON lines or as a table."""
    if as_json:
        for row in rows:
            echo_json(row)
        return
    _show(rows)
    if "peak_memory_bytes" in rows[-1]:
        echo(f"peak memory of the process: {(rows[-1]['peak_memory_bytes'] or 0) / 1e9:.2f} GB")


def _show(rows: list[dict[str, Any]]) -> None:
    if "new_tokens" in rows[0]:
        _show_generation(rows)
        return
    header = ["contender", "batch", "tokens", "p50 ms", "p95 ms", "tokens/s", "relative time"]
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


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    """Check the output paths before measuring, which takes minutes."""
    from lfx.runtime.bench import check_plot

    for path, name in ((output, "--output"), (plot, "--plot")):
        if path is not None:
            output_file(path, name)
    if plot is not None:
        check_plot(plot)


def _torch_modules(
    model: Path,
    engine: Engine,
    against: tuple[str, ...],
    source: str | None,
    step: Callable[[str], None],
) -> dict[str, Any]:
    if not against:
        return {}
    recorded = engine.manifest.source if engine.manifest is not None else None
    checkpoint = checkpoint_of(model, recorded, source, f"lfx bench {{}} --against {against[0]} --source {{}}")
    step("importing torch")
    torch = require("torch", "export")
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    modules: dict[str, Any] = {}
    for name in dict.fromkeys(against):
        module: Any = load_checkpoint(checkpoint, engine.signature.task, recorded, step)
        module = module.to(torch.bfloat16) if name == "pytorch-bf16" else module
        modules[name] = torch.compile(module) if name == "pytorch-compile" else module
    return modules


def _torch_run(module: Any, *, first: bool) -> Run:
    """Return a run of a model of Hugging Face's, with the first token global or none, whatever its task's rule is."""
    import torch

    def run(ids: Any) -> Any:
        tensor = torch.from_numpy(ids)
        with torch.inference_mode():
            return module(tensor, global_attention_mask=_global_mask(tensor, first=first))

    return run


def _global_mask(ids: Any, *, first: bool) -> Any:
    mask = ids * 0
    mask[:, 0] = int(first)
    return mask


def _write(output: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        with replacing(output) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(why_unwritten(output, error, "choose another --output")) from error
