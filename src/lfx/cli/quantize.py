"""`lfx quantize`: a float32 bundle in, an int8 bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfx.cli.options import Command, FilePath, OutputPath
from lfx.cli.terminal import echo, echo_json, progress
from lfx.manifest import Manifest


@click.command("quantize", cls=Command)
@click.argument("bundle", type=FilePath("a bundle"))
@click.option(
    "--calibration",
    type=FilePath(),
    required=True,
    help="Your text: a text file, or .jsonl (.ndjson) or .parquet with a field text or input_ids.",
)
@click.option(
    "--samples", type=click.IntRange(2, 1_000_000), default=32, show_default=True, help="Windows of text to use."
)
@click.option(
    "--activations",
    type=click.Choice(["uint8", "int8"]),
    default="uint8",
    show_default=True,
    help="uint8 is the fastest on CPUs; TensorRT takes int8 only.",
)
@click.option("--full-range", is_flag=True, help="8 bits of weight, not 7: for CPUs with VNNI or AMX, and for GPUs.")
@click.option(
    "--keep-float", multiple=True, metavar="PATTERN", help='Layers to leave as they are: "encoder.layer.11.*".'
)
@click.option("--tokenizer", type=FilePath(), help="A folder with one.  [default: the bundle's]")
@click.option("--output", type=OutputPath(folder=True), help="The new bundle.  [default: NAME-int8]")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest instead of a summary.")
def command(bundle: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Quantize the linear layers of a bundle to int8, calibrated on your text, and say what it cost."""
    with progress() as step:
        step("importing torch")
        from lfx.export.quantize import quantize

        made = quantize(bundle, output, progress=step, **options)
    manifest = Manifest.read(made)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    found = manifest.quantization
    size = sum(entry["bytes"] for entry in manifest.files.values())
    echo(f"{made}: {len(found['layers'])} linear layers in int8, {size / 1e6:,.0f} MB")
    echo(f"beside {found['accuracy']['reference']}:")
    for name, result in found["accuracy"]["outputs"].items():
        agreement = result.get("label_agreement")
        labels = "" if agreement is None else f", {agreement:.1%} of the labels agree"
        echo(
            f"{name}: cosine {result['cosine']:.5f}, largest error {result['max_abs_error']:.2g} where values reach "
            f"{result['max_abs_value']:.2g}{labels}"
        )
