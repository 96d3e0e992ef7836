"""`lfx quantize`: quantize a float32 bundle to int8."""

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
    help="Calibrate on this file: a text, or .jsonl (.ndjson) or .parquet with a field text or input_ids.",
)
@click.option(
    "--samples",
    type=click.IntRange(2, 1_000_000),
    default=32,
    show_default=True,
    help="Set the number of windows of text; half of them calibrate, the others measure the accuracy.",
)
@click.option(
    "--activations",
    type=click.Choice(["uint8", "int8"]),
    default="uint8",
    show_default=True,
    help="Set the dtype of activations; uint8 is fastest on CPUs, TensorRT needs int8.",
)
@click.option(
    "--full-range", is_flag=True, help="Use 8 bits for weights instead of 7: for CPUs with VNNI or AMX, and for GPUs."
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help='Keep layers in float32, such as "encoder.layer.11.*" (repeatable).',
)
@click.option("--tokenizer", type=FilePath(), help="Read the tokenizer from this folder.  [default: the bundle's]")
@click.option(
    "--output", type=OutputPath(folder=True), help="Write the new bundle to this folder.  [default: NAME-int8]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest instead of a summary.")
def command(bundle: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Quantize the linear layers of a bundle to int8, calibrated on your text, and measure the accuracy."""
    with progress() as step:
        step("importing torch")
        from lfx.export.quantize import quantize

        quantized = quantize(bundle, output, progress=step, **options)
    manifest = Manifest.read(quantized)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    accuracy = manifest.quantization["accuracy"]
    size = sum(entry["bytes"] for entry in manifest.files.values())
    echo(f"{quantized}: {len(manifest.quantization['layers'])} linear layers in int8, {size / 1e6:,.0f} MB")
    echo(f"compared with {accuracy['reference']}:")
    for name, result in accuracy["outputs"].items():
        agreement = result.get("label_agreement")
        labels = "" if agreement is None else f", {agreement:.1%} of the labels agree"
        echo(
            f"{name}: cosine {result['cosine']:.5f}, largest error {result['max_abs_error']:.2g}, largest value "
            f"{result['max_abs_value']:.2g}{labels}"
        )
