"""`lfx explain`: write an HTML page that shows which tokens each token of a text attends to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfx.cli.engine import engine_options
from lfx.cli.options import Command, FilePath, OutputPath
from lfx.cli.run import encode_text, open_tokenizer, read_text
from lfx.cli.terminal import echo, echo_json, progress
from lfx.errors import ArtifactError
from lfx.signature import Signature

if TYPE_CHECKING:
    from lfx.cli.engine import OpenEngine


@click.command("explain", cls=Command)
@click.argument("model", type=FilePath("a bundle with attention outputs"))
@click.option("--text", help="Explain this text: the question for question answering, the prompt for multiple choice.")
@click.option(
    "--pair", multiple=True, help="Add a second text: the document for a question, or one choice (repeatable)."
)
@click.option("--input", "file", type=FilePath(), help="Explain the text in this file.")
@click.option("--tokenizer", type=FilePath(), help="Read the tokenizer from this folder.  [default: the bundle's]")
@click.option(
    "--output",
    type=OutputPath(),
    default="explain.html",
    show_default=True,
    help="Write the page to this file.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the page's path, its size and the number of tokens as JSON."
)
@engine_options
def command(
    model: Path,
    text: str | None,
    pair: tuple[str, ...],
    file: Path | None,
    tokenizer: Path | None,
    output: Path,
    as_json: bool,
    open_engine: OpenEngine,
) -> None:
    """Write an HTML page of what each token of a text attends to.

    The page shows attention by layer and head; for multiple choice, that of the best choice. The bundle must be
    exported with --output-attentions.
    """
    if (text is None) == (file is None):
        raise click.UsageError("give either --text or --input")
    import numpy as np

    from lfx.cli.explain_page import TOP, write
    from lfx.runtime.documents.formats import is_documents
    from lfx.runtime.hub import local_path
    from lfx.runtime.postprocess import Postprocessor
    from lfx.runtime.strongest import strongest

    if file is not None and is_documents(file):
        raise click.UsageError(f"--input {file} is a file of documents, and the page shows one text; give it as --text")
    text = text if text is not None else read_text(file)
    with progress() as step:
        step("opening the bundle")
        name, model = model, local_path(model)
        with open_engine(model) as engine:
            signature = engine.signature
            check_attentions(name, signature)
            opened = open_tokenizer(model, engine, tokenizer)
            encoded, ids, mask = encode_text(opened, text, pair)
            step(f"running {ids.size:,} tokens")
            outputs = {name: np.asarray(value) for name, value in engine.run(ids, mask).items()}
            backend = engine.backend
        answers = Postprocessor(opened).answers(encoded[0], outputs)
        row = int(answers[0]["choice"]) if signature.has_choices and answers else 0  # the choice that is shown
        step("selecting the strongest weights")
        weights = strongest(outputs, len(encoded[row].ids), row=row, top=TOP)
        step("writing the page")
        tokens = opened.token_texts(text, pair[row] if pair else None)
        title = f"Attention of {name.resolve().name}"
        write(output, title, _facts(signature, len(tokens), pair, row), tokens, weights, answers)
    size = output.stat().st_size
    if as_json:
        echo_json({"page": str(output), "bytes": size, "tokens": len(tokens), "backend": backend})
    else:
        echo(f"{output}: {len(tokens):,} tokens, {size / 1e6:.1f} MB, {backend}")


def check_attentions(model: Path, signature: Signature) -> None:
    """Check that a model has attention outputs.

    Raises:
        ArtifactError: the model has none.
    """
    if not signature.output_attentions:
        raise ArtifactError(
            f"{model} has no attention outputs; export the checkpoint with: lfx export --model … --output-attentions"
        )


def _facts(signature: Signature, tokens: int, pair: tuple[str, ...], row: int) -> str:
    choice = f", choice {row} of {len(pair)}" if signature.has_choices else ""
    layers = len(signature.attention_windows)
    return f"{signature.architecture}, {signature.task}{choice}, {layers} layers, {tokens:,} tokens"
