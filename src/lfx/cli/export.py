"""`lfx export`: export a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from lfx.cli.options import MOST_TOKENS, Command, FilledText, OutputPath
from lfx.cli.terminal import echo, echo_json, progress
from lfx.manifest import Manifest
from lfx.signature import GLOBAL_MODES, OPSETS, POOLINGS, PRECISIONS, TASKS, grouped


@click.command("export", cls=Command)
@click.option(
    "--model",
    type=FilledText(),
    required=True,
    help="Export this checkpoint: a folder, or a model id of the Hugging Face hub.",
)
@click.option(
    "--task",
    type=click.Choice(["auto", *TASKS]),
    default="auto",
    show_default=True,
    help="Set the task; auto reads it from the checkpoint's config.",
)
@click.option("--opset", type=click.IntRange(*OPSETS), default=OPSETS[0], show_default=True, help="Set the ONNX opset.")
@click.option(
    "--output", type=OutputPath(folder=True), help="Write the bundle to this folder.  [default: the model's name]"
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Set the precision of weights and arithmetic.",
)
@click.option(
    "--global-attention",
    type=click.Choice(GLOBAL_MODES),
    default="mask",
    show_default=True,
    help="Read global tokens from a graph input, fix the first token of each row, or leave global attention out.",
)
@click.option(
    "--pooling",
    type=click.Choice(POOLINGS),
    help="Export sentence embeddings, pooled this way.  [default: the pooling of a sentence-transformers folder]",
)
@click.option(
    "--max-seqlen",
    type=click.IntRange(1, MOST_TOKENS),
    help="Set the longest sequence in tokens.  [default: the largest that the checkpoint allows]",
)
@click.option(
    "--max-global",
    type=click.IntRange(1, MOST_TOKENS),
    help="Fix the number of slots for global tokens in a row.  [default: the largest number in the batch]",
)
@click.option("--inline-functions", is_flag=True, help="Write standard ops only, without the domain lfx.")
@click.option("--output-attentions", is_flag=True, help="Add the attention probabilities of each layer to the outputs.")
@click.option(
    "--layout",
    type=click.Choice(["lfx", "hf"]),
    default="lfx",
    show_default=True,
    help="Write a bundle, or the files that other clients of the hub read: onnx/model.onnx of standard ops, with the "
    "global tokens fixed by the task's rule.",
)
@click.option(
    "--model-type",
    type=click.Choice(["longformer", "roberta", "bart"]),
    help="With --layout hf, write this model_type into config.json; transformers.js needs roberta for classification "
    "and bart for text generation.  [default: the checkpoint's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest instead of a summary.")
def command(
    model: str,
    task: str,
    opset: int,
    output: Path | None,
    precision: str,
    global_attention: str,
    pooling: str | None,
    max_seqlen: int | None,
    max_global: int | None,
    inline_functions: bool,
    output_attentions: bool,
    layout: str,
    model_type: str | None,
    as_json: bool,
) -> None:
    """Export a Longformer or an LED to an ONNX bundle.

    Before the command reports success, it compares the bundle with PyTorch.
    """
    with progress() as step:
        step("importing torch")
        from lfx.export import export

        bundle = export(
            model,
            output,
            task=task,
            opset=opset,
            precision=precision,
            global_attention=global_attention,
            pooling=pooling,
            max_seqlen=max_seqlen,
            max_global=max_global,
            inline_functions=inline_functions,
            output_attentions=output_attentions,
            layout=layout,
            model_type=model_type,
            progress=step,
        )
    manifest = Manifest.read(bundle)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    echo(f"{bundle}: {manifest.signature.task}, opset {manifest.opset}, {manifest.signature.precision}")
    measured = manifest.validation["outputs"]
    for label, group in grouped(measured).items():
        error, torch_error = (max(measured[o][key] for o in group) for key in ("max_abs_error", "torch_max_abs_error"))
        echo(
            f"{label}: largest error {error:.2g} against float64, PyTorch's error {torch_error:.2g}, "
            f"tolerance {min(measured[o]['tolerance'] for o in group):.2g}"
        )
