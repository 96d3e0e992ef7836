"""`lfx run`: run a model on a text or a file of documents, and print or write the results."""

from __future__ import annotations

import dataclasses
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfx.checks import file_path, output_file, parse_json
from lfx.cli.engine import engine_options
from lfx.cli.options import Command, FilePath, OutputPath, document_options
from lfx.cli.terminal import echo, echo_json, progress, table
from lfx.errors import InputError
from lfx.files import replacing, why_unwritten
from lfx.signature import TASKS, TEXT_GENERATION

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lfx.cli.engine import OpenEngine
    from lfx.runtime import Engine
    from lfx.runtime.tokenizer import Encoded, Tokenizer


_OF_ROWS = (".json", ".csv")  # suffixes by which rows may be meant; no arrays are written to such a file
_MOST_ANSWERS = 40  # in a table


@click.command("run", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--text", help="Run on this text: the question for question answering, the prompt for multiple choice.")
@click.option(
    "--pair", multiple=True, help="Add a second text: the document for a question, or one choice (repeatable)."
)
@click.option(
    "--input",
    "file",
    type=FilePath(),
    help="Run on this file: one text, or documents as .jsonl (.ndjson) or .parquet with a field text or input_ids.",
)
@document_options
@click.option(
    "--generate",
    "generation",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set an option of text generation, such as num_beams=4 (repeatable).  [default: the checkpoint's]",
)
@click.option(
    "--output",
    type=OutputPath(),
    help="Write the output arrays to this .npz file, or the results of documents to this .jsonl or .parquet file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, without the arrays per token.")
@engine_options
def command(
    model: Path,
    text: str | None,
    pair: tuple[str, ...],
    file: Path | None,
    stride: int | None,
    max_windows: int | None,
    tokenizer: Path | None,
    generation: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    open_engine: OpenEngine,
) -> None:
    """Run a bundle or a plan on a text or a file of documents.

    MODEL is the folder of a bundle, its .onnx file, a plan, or ORG/NAME on the Hugging Face hub.

    A model that writes texts gives a summary. An interrupted run over documents is resumed by the same command.
    """
    from lfx.runtime.documents.formats import is_documents
    from lfx.runtime.documents.run import check_generation

    if (text is None) == (file is None):
        raise click.UsageError("give either --text or --input")
    documents = file if file is not None and is_documents(file) else None
    if documents is not None and (output is None or pair):
        raise click.UsageError("documents need --output FILE.jsonl or FILE.parquet, and no --pair")
    if documents is None and output is not None and (is_documents(output) or output.suffix.lower() in _OF_ROWS):
        raise click.UsageError(
            f"--output {output} is for results of documents, and the input is one text: name the documents .jsonl "
            "(.ndjson) or .parquet, or give a .npz file, for the arrays of the text"
        )
    if documents is None and stride is not None:
        raise click.UsageError("--stride is for documents: --input FILE.jsonl or FILE.parquet")
    if stride is None and max_windows is not None:
        raise click.UsageError("--max-windows needs --stride, which cuts documents into windows; give both")
    chosen = generation_options(generation)
    with open_engine(model) as engine:
        if documents is not None and output is not None:
            run_documents(
                engine,
                model,
                documents,
                output,
                stride=stride,
                max_windows=max_windows,
                tokenizer=tokenizer,
                generation=chosen,
                as_json=as_json,
            )
        else:
            check_generation(engine, chosen)
            run = write_text if engine.signature.task == TEXT_GENERATION else run_text
            options = {"generation": chosen} if run is write_text else {}
            run(engine, model, text, pair, file, output, tokenizer=tokenizer, as_json=as_json, **options)


def generation_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse the option --generate: values are JSON, or strings.

    Raises:
        click.UsageError: a pair has no name or no value, or a name is given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not name or not separator or not text:
            raise click.UsageError(f"--generate {pair!r} is no NAME=VALUE; give an option such as num_beams=4")
        if name in options:
            raise click.UsageError(f"--generate {name} is given more than once; give it once")
        try:
            options[name] = parse_json(text)
        except ValueError:
            options[name] = {"True": True, "False": False, "None": None}.get(text, text)
    return options


def write_text(
    engine: Engine,
    model: Path,
    text: str | None,
    pair: tuple[str, ...],
    file: Path | None,
    output: Path | None,
    *,
    tokenizer: Path | None,
    generation: dict[str, Any],
    as_json: bool,
) -> None:
    """Write a text for one text, from `text` or `file`, such as its summary, and print it.

    Raises:
        InputError: the file or the tokenizer cannot be read, there is a pair, or an option is not supported.
    """
    from lfx.runtime.generation.rows import without_padding

    if output is not None:
        output_file(output, "--output")
    if pair:
        raise InputError(f"{engine.signature.task} takes one text, and no --pair; leave it out")
    reader = open_tokenizer(model, engine, tokenizer)
    encoded = reader.encode(text if text is not None else read_text(file))
    sequences = engine.generate(encoded.ids, **generation)
    ids = without_padding(sequences[0], engine.generation_settings(**generation))
    summary = reader.decode(ids.tolist())
    if output is not None:
        _save(output, {"sequences": sequences})
    if as_json:
        counts = {"tokens": len(encoded.ids), "new_tokens": len(ids) - 1}
        echo_json({**counts, "backend": engine.backend, "summary": summary, "output_ids": ids.tolist()})
        return
    echo(f"{len(encoded.ids)} tokens, {len(ids) - 1} new tokens, {engine.backend}")
    echo(summary)


def run_text(
    engine: Engine,
    model: Path,
    text: str | None,
    pair: tuple[str, ...],
    file: Path | None,
    output: Path | None,
    *,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Run a model on one text, from `text` or `file`, and print the outputs and the answers in them.

    Raises:
        InputError: the file or the tokenizer cannot be read, or the number of texts does not fit the task.
    """
    import numpy as np

    from lfx.runtime.postprocess import Postprocessor

    if output is not None:
        output_file(output, "--output")
    text = text if text is not None else read_text(file)
    reader = open_tokenizer(model, engine, tokenizer)
    encoded, ids, mask = encode_text(reader, text, pair)
    outputs = engine.run(ids, mask)
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    answers = Postprocessor(reader).answers(encoded[0], arrays)
    if output is not None:
        _save(output, arrays)
    tokens = sum(len(e.ids) for e in encoded)
    if as_json:
        described = _describe(arrays, {s.name for s in engine.signature.outputs if "sequence" in s.shape})
        echo_json({"tokens": tokens, "backend": engine.backend, "outputs": described, "answers": answers})
        return
    echo(f"{tokens} tokens, {engine.backend}")
    for name, array in arrays.items():
        first = ", ".join(f"{x:.4f}" for x in array.reshape(-1)[:4])
        echo(f"{name}: shape {tuple(array.shape)}, first values {first}")
    if answers:
        table(list(answers[0]), [[_cell(v) for v in answer.values()] for answer in answers[:_MOST_ANSWERS]])
    if len(answers) > _MOST_ANSWERS:
        echo(f"… and {len(answers) - _MOST_ANSWERS:,} more answers; --json prints all")


def encode_text(
    reader: Tokenizer, text: str, pair: tuple[str, ...]
) -> tuple[list[Encoded], NDArray[Any], NDArray[Any] | None]:
    """Tokenize a text and its pair, or a prompt and its choices.

    Returns:
        The encodings, and the ids and the attention mask for `Engine.run`; the mask is None for a single sequence.
    Raises:
        InputError: the number of texts does not fit the task.
    """
    import numpy as np

    from lfx.runtime.inputs import pad_choices

    signature = reader.signature
    choices = signature.has_choices
    if len(pair) > 1 and not choices:
        raise InputError(f"{signature.task} takes one --pair, but {len(pair)} are given; leave the others out")
    if TASKS[signature.task].needs_pair and not pair:
        raise InputError(f"{signature.task} needs --text and --pair: " + _pair_help(choices))
    encoded = [reader.encode(text, second) for second in (pair or (None,))]
    if choices:
        return encoded, *pad_choices([e.ids for e in encoded], signature.pad_token_id)
    return encoded, np.array(encoded[0].ids), None


def _describe(arrays: dict[str, NDArray[Any]], per_token: set[str]) -> dict[str, Any]:
    """Return shape and dtype of each array, and the values of those that are not per token."""
    described: dict[str, Any] = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()}
    for name, array in arrays.items():
        if name not in per_token:
            described[name]["values"] = array.tolist()
    return described


def run_documents(
    engine: Engine,
    model: Path,
    source: Path,
    output: Path,
    *,
    stride: int | None,
    max_windows: int | None,
    tokenizer: Path | None,
    generation: dict[str, Any],
    as_json: bool,
) -> None:
    """Run a model on a file of documents, write the results to `output`, and print their number.

    Args:
        stride: number of tokens from the start of a window to the start of the next; None = documents are not cut.
        generation: options of `Engine.generate`.
        max_windows: largest number of windows of a document; None = `lfx.runtime.documents.MAX_WINDOWS`.
    Raises:
        InputError: documents were refused; raised after the others are done.
    """
    from lfx.runtime import documents
    from lfx.runtime.text_files import TOKENIZER, text_folder

    reader = None
    if tokenizer or (text_folder(engine.path, engine.text_source) / TOKENIZER).exists():
        reader = open_tokenizer(model, engine, tokenizer)
    start = time.perf_counter()
    try:
        with progress() as step:
            done = documents.run_documents(
                engine,
                reader,
                source,
                output,
                stride=stride,
                max_windows=documents.MAX_WINDOWS if max_windows is None else max_windows,
                generation=generation,
                progress=step,
                report=lambda line: echo(line, err=True),
            )
    except KeyboardInterrupt:
        echo("finished documents are kept; run the same command to resume", err=True)
        raise
    seconds = time.perf_counter() - start
    if as_json:
        echo_json({**dataclasses.asdict(done), "seconds": seconds, "backend": engine.backend})
    else:
        resumed = f" (the first {done.resumed_at:,} in an earlier run)" if done.resumed_at else ""
        echo(f"{output}: {done.documents:,} documents{resumed}, {done.refused:,} refused, {engine.backend}")
        echo(f"{done.tokens:,} tokens in {seconds:.1f} s, {done.tokens / seconds:,.0f} tokens/s")
    if done.refused:
        raise InputError(f"{done.refused} of {done.documents} documents were refused; {output} says which and why")


def open_tokenizer(model: Path, engine: Engine, given: Path | None) -> Tokenizer:
    """Open the tokenizer in the folder `given`, or the model's own; see `lfx.runtime.tokenizer.open_tokenizer`."""
    from lfx.runtime import tokenizer

    return tokenizer.open_tokenizer(engine.path, engine.text_source, engine.signature, given)


def _pair_help(choices: bool) -> str:
    return "the prompt, and one --pair for each choice" if choices else "the question, and the document as --pair"


def read_text(file: Path | None) -> str:
    """Read the text of the option --input.

    Raises:
        InputError: the file cannot be read as UTF-8, or is too long.
    """
    from lfx.runtime.tokenizer import MAX_CHARACTERS

    assert file is not None
    file_path(file, "--input")
    try:
        with file.open(encoding="utf-8-sig") as source:  # a device may have no end, so read a limited length
            text = source.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{file} has more than {MAX_CHARACTERS:,} characters; split it into documents: a .jsonl file")
    return text


def _save(output: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an .npz file; `numpy.savez` fails for outputs with the names of its arguments, such as `file`."""
    import numpy as np

    try:
        with replacing(output) as path, zipfile.ZipFile(path, "w", allowZip64=True) as file:
            for name, array in arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
    except OSError as error:
        raise InputError(why_unwritten(output, error, "choose another --output")) from error


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
