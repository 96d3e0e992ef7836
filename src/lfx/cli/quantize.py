"""`lfx quantize`: quantize a float32 bundle to int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfx.cli.options import Command, FilePath, OutputPath
from lfx.cli.run import generation_options
from lfx.cli.terminal import echo, echo_json, progress
from lfx.manifest import Manifest
from lfx.signature import grouped


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
@click.option(
    "--generate",
    "generation",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set an option of greedy search, such as max_new_tokens=128, for a model that writes texts (repeatable).  "
    "[default: the checkpoint's]",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Fail if fewer labels, or tokens of greedy search, agree with float32: a share from 0 to 1.",
)
@click.option("--tokenizer", type=FilePath(), help="Read the tokenizer from this folder.  [default: the bundle's]")
@click.option(
    "--output", type=OutputPath(folder=True), help="Write the new bundle to this folder.  [default: NAME-int8]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest instead of a summary.")
def command(bundle: Path, output: Path | None, generation: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Quantize a bundle to int8, calibrated on your text.

    The linear layers are quantized, and the accuracy is measured.

    For a model that writes texts, both graphs are quantized, and the texts of greedy search are compared with those of
    float32.
    """
    generate = generation_options(generation)
    with progress() as step:
        step("importing torch")
        from lfx.export.quantize import quantize

        quantized = quantize(bundle, output, generate=generate, progress=step, **options)
    manifest = Manifest.read(quantized)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    accuracy = manifest.quantization["accuracy"]
    size = sum(entry["bytes"] for entry in manifest.files.values())
    echo(f"{quantized}: {len(manifest.quantization['layers'])} linear layers in int8, {size / 1e6:,.0f} MB")
    echo(f"compared with {accuracy['reference']}:")
    for label, text in described(accuracy).items():
        echo(f"{label}: {text}")


def described(accuracy: dict[str, Any]) -> dict[str, str]:
    """Return a line of text for each output of the manifest's entry `accuracy`, and for the texts of greedy search.

    Outputs whose names differ only in the layer's number share a line, which has their worst values.
    """
    lines = {}
    for label, names in grouped(accuracy["outputs"]).items():
        results = [accuracy["outputs"][name] for name in names]
        agreements = [result["label_agreement"] for result in results if "label_agreement" in result]
        labels = f", {min(agreements):.1%} of the labels agree" if agreements else ""
        cosine, error, value = (
            pick(result[key] for result in results)
            for pick, key in ((min, "cosine"), (max, "max_abs_error"), (max, "max_abs_value"))
        )
        lines[label] = f"cosine {cosine:.5f}, largest error {error:.2g}, largest value {value:.2g}{labels}"
    if "texts" in accuracy:
        texts = accuracy["texts"]
        lines["texts of greedy search"] = (
            f"{texts['text_agreement']:.1%} of {texts['texts']:,} are equal, and {texts['token_agreement']:.1%} of "
            f"{texts['tokens']:,} tokens come before the first difference"
        )
    return lines
