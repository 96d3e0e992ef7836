"""`lfx triton`: write a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfx.cli.engine import add_engine_options
from lfx.cli.options import MOST_TOKENS, Command, FilePath, FilledText, OutputPath
from lfx.cli.terminal import echo, echo_json


@click.command("triton", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"), metavar="BUNDLE_OR_PLAN")
@click.option(
    "--output",
    "repository",
    type=OutputPath(folder=True),
    required=True,
    help="Write the model into this repository, which is made if it does not exist.",
)
@click.option("--name", type=FilledText(), help="Set the model's name.  [default: that of the bundle or plan]")
@click.option(
    "--triton-backend",
    type=click.Choice(["python", "onnxruntime", "tensorrt"]),
    default="python",
    show_default=True,
    help="python runs an Engine, which takes texts and any lengths; the others run the bare ONNX file or plan.",
)
@click.option("--link", is_flag=True, help="Write the path of the bundle or plan, instead of copying it.")
@click.option(
    "--max-batch",
    type=click.IntRange(1, MOST_TOKENS),
    help="Bound the sequences that Triton collects into one batch.  [default: 64, or a plan's largest]",
)
@click.option(
    "--max-delay",
    "max_delay_ms",
    type=click.FloatRange(0, 86_400_000),
    default=5.0,
    show_default=True,
    help="Let a request wait up to this many ms for others to run with it.",
)
@click.option(
    "--max-pending",
    type=click.IntRange(1, MOST_TOKENS),
    default=1024,
    show_default=True,
    help="Refuse a request when this many are waiting.",
)
@click.option(
    "--token-budget", type=click.IntRange(1, MOST_TOKENS), help="Bound the tokens of a batch.  [default: 8192]"
)
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Run this many instances of the model: on each GPU, or on the CPU.",
)
@click.option(
    "--gpu", "gpus", type=click.IntRange(0, 1023), multiple=True, help="Run on this GPU (repeatable).  [default: all]"
)
@click.option("--custom-ops", type=FilePath(), help="Let ONNX Runtime load this library of custom ops on the server.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@add_engine_options
def command(model: Path, repository: Path, as_json: bool, **options: Any) -> None:
    """Write a model repository for Triton Inference Server.

    tritonserver starts the repository as it is. A model of the same name that lfx wrote is replaced.

    With --triton-backend python, the server's Python needs lfx; with the others it needs nothing.
    """
    from lfx.runtime.triton.repository import Settings, write_model

    written = write_model(model, repository, Settings(**options))
    start = f"tritonserver --model-repository={repository}"
    if written.plugins is not None:
        start += f" --backend-config=tensorrt,plugins={written.plugins}"
    if written.lacks_tokenizer:
        echo(
            "it takes ids and no texts: a tokenizer outside of a bundle is not copied; give the bundle, or --link, "
            "for texts",
            err=True,
        )
    if as_json:
        plugins = None if written.plugins is None else str(written.plugins)
        echo_json({"model": written.name, "folder": str(written.folder), "plugins": plugins, "start": start})
        return
    echo(f"wrote {written.folder}; start it with: {start}")
