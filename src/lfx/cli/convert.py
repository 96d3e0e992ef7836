"""`lfx convert`: make a Longformer checkpoint of an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfx.cli.options import Command, FilledText, OutputPath
from lfx.cli.terminal import echo, echo_json, progress


class _Windows(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on only
    """One whole number, or several with commas between them."""

    name = "integer[,…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | list[int]:
        """Return the number, or the list of numbers."""
        if isinstance(value, int):
            return value
        parts = value.split(",")
        if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
            self.fail(f"{value!r} is no even number, such as 512, or one for each layer, such as 256,512", param, ctx)
        return int(value) if len(parts) == 1 else [int(part) for part in parts]


@click.command("convert", cls=Command)
@click.option(
    "--model",
    type=FilledText(),
    required=True,
    help="Convert this checkpoint: a folder, or a model id of the Hugging Face hub.",
)
@click.option(
    "--output", type=OutputPath(folder=True), required=True, help="Write the Longformer checkpoint to this new folder."
)
@click.option(
    "--max-seqlen",
    type=click.IntRange(1, 65_536),
    default=4096,
    show_default=True,
    help="Set the longest sequence, in tokens.",
)
@click.option(
    "--attention-window",
    type=_Windows(),
    default=512,
    show_default=True,
    help="Set the attention window, both sides together: an even number, or one for each layer (256,512,…).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON instead of a summary.")
def command(model: str, output: Path, max_seqlen: int, attention_window: int | list[int], as_json: bool) -> None:
    """Convert BERT or RoBERTa to Longformer, or BART to LED.

    Other encoders like BERT are converted too. Before the command reports success, it compares the result with the
    original.
    """
    with progress() as step:
        step("importing torch")
        from lfx.export.converter import convert_and_compare

        done = convert_and_compare(model, output, max_seqlen, attention_window, step)
    comparison = done.report.to_dict()
    if as_json:
        echo_json(
            {
                "output": str(done.folder),
                "architecture": done.architecture,
                "max_seqlen": done.max_seqlen,
                "attention_window": done.attention_windows,
                "equal_seqlen": done.equal_seqlen,
                "comparison": comparison,
            },
            indent=1,
        )
        return
    widths = sorted(set(done.attention_windows))
    echo(
        f"{done.folder}: {done.architecture}, up to {done.max_seqlen} tokens, attention window "
        f"{' and '.join(map(str, widths))}; equal to the original up to {done.equal_seqlen} tokens"
    )
    for name, result in comparison["outputs"].items():
        echo(
            f"{name}: largest error {result['max_abs_error']:.2g} against the original in float64, the original's own "
            f"error {result['torch_max_abs_error']:.2g}, tolerance {result['tolerance']:.2g}"
        )
