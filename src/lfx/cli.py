"""The command `lfx`. Every heavy import stands inside the command that needs it, so that --help is instant."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lfx import __version__
from lfx.config import GLOBAL_MODES, MANIFEST, OPSETS, PRECISIONS, TASKS
from lfx.errors import ArtifactError, InputError, LfxError, one_line, with_cure
from lfx.options import FilePath, FilledText, Group, OutputPath
from lfx.terminal import (
    catch_interrupts,
    drop_stdout,
    echo,
    echo_json,
    interrupted,
    prepare_streams,
    printable,
    progress,
    table,
    write,
)

if TYPE_CHECKING:
    from lfx.config import Manifest
    from lfx.runtime import Engine
    from lfx.runtime.plan import PlanManifest

    OpenEngine = Callable[[Path], Engine]

_MOST_TOKENS = 2**31 - 1
_ENGINE_OPTIONS = (
    click.option(
        "--backend", default="auto", show_default=True, help="auto, onnxruntime, openvino, reference or tensorrt."
    ),
    click.option("--provider", default="cpu", show_default=True, help="Of ONNX Runtime: cpu, cuda or tensorrt."),
    click.option(
        "--threads", type=click.IntRange(1, 1024), help="Threads of one run.  [default: the backend's choice]"
    ),
    click.option(
        "--precision", help="Of OpenVINO's arithmetic, whatever the bundle's is: fp32 or bf16.  [default: the bundle's]"
    ),
)


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of an Engine, as one argument `open_engine`: a function of the model's path."""

    @functools.wraps(command)
    def with_engine(*, backend: str, provider: str, threads: int | None, precision: str | None, **others: Any) -> Any:
        def open_engine(model: Path) -> Engine:
            from lfx.runtime import Engine

            return Engine(model, backend, provider=provider, threads=threads, precision=precision)

        return command(open_engine=open_engine, **others)

    found: Callable[..., Any] = with_engine
    for option in reversed(_ENGINE_OPTIONS):
        found = option(found)
    return found


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lfx")
def cli() -> None:
    """Longformer from PyTorch to ONNX and production."""


@cli.command()
@click.option(
    "--model", type=FilledText(), required=True, help="A checkpoint folder, or a model id of the Hugging Face hub."
)
@click.option("--task", type=click.Choice(["auto", *TASKS]), default="auto", show_default=True)
@click.option("--opset", type=click.IntRange(*OPSETS), default=OPSETS[0], show_default=True)
@click.option("--output", type=OutputPath(folder=True), help="The bundle's folder.  [default: the model's name]")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option(
    "--global-attention",
    type=click.Choice(GLOBAL_MODES),
    default="mask",
    show_default=True,
    help="Global tokens: a graph input, the first token of every row, or none.",
)
@click.option(
    "--max-global",
    type=click.IntRange(1, _MOST_TOKENS),
    help="A constant number of global slots.  [default: as many as needed]",
)
@click.option("--inline-functions", is_flag=True, help="Write standard ops only, without the lfx domain.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest instead of a summary.")
def export(
    model: str,
    task: str,
    opset: int,
    output: Path | None,
    precision: str,
    global_attention: str,
    max_global: int | None,
    inline_functions: bool,
    as_json: bool,
) -> None:
    """Export a Longformer to an ONNX bundle and validate it against PyTorch."""
    from lfx.config import Manifest

    with progress() as step:
        step("importing torch")
        from lfx.export import export as run_export

        bundle = run_export(
            model,
            output,
            task=task,
            opset=opset,
            precision=precision,
            global_attention=global_attention,
            max_global=max_global,
            inline_functions=inline_functions,
            progress=step,
        )
    manifest = Manifest.read(bundle)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    echo(f"{bundle}: {manifest.signature.task}, opset {manifest.opset}, {manifest.signature.precision}")
    for name, result in manifest.validation["outputs"].items():
        echo(
            f"{name}: largest error {result['max_abs_error']:.2g} against float64, PyTorch's own "
            f"{result['torch_max_abs_error']:.2g}, tolerance {result['tolerance']:.2g}"
        )


@cli.command()
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
def quantize(bundle: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Quantize the linear layers of a bundle to int8, calibrated on your text, and say what it cost."""
    from lfx.config import Manifest

    with progress() as step:
        step("importing torch")
        from lfx.export.quantize import quantize as run_quantize

        made = run_quantize(bundle, output, progress=step, **options)
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


@cli.command()
@click.argument("bundle", type=FilePath("a bundle"), required=False)
@click.option("--fp16", "precision", flag_value="fp16", help="Convert a float32 bundle to float16, strongly typed.")
@click.option("--bf16", "precision", flag_value="bf16", help="The same to bfloat16.")
@click.option("--batch", multiple=True, default=["1:1:8"], show_default=True, help="MIN:OPT:MAX, or one number.")
@click.option("--seqlen", multiple=True, help="The same, in tokens.  [default: all that the model takes]")
@click.option("--max-global", help="Global slots of a row.  [default: the bundle's, or 64]")
@click.option("--flavor", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="[default: what is installed]")
@click.option("--target", help="Compute capability to build for without a GPU, such as sm89; TensorRT-RTX only.")
@click.option("--plugin/--no-plugin", default=True, show_default=True, help="Attention by the lfx plugin.")
@click.option("--timing-cache", type=OutputPath(), help="Read, and written after the build.")
@click.option("--workspace", type=click.IntRange(1, 10_000_000), metavar="MB", help="Most scratch memory of a layer.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="[default: TensorRT's]")
@click.option("--version-compatible", is_flag=True, help="The plan runs with later TensorRT versions too.")
@click.option("--refit", is_flag=True, help="Weights can be exchanged in the plan.")
@click.option("--output", type=OutputPath(), help="The plan.  [default: the bundle's name with .plan]")
@click.option("--json", "as_json", is_flag=True, help="Print the plan's JSON instead of a summary.")
def build_engine(
    bundle: Path | None,
    precision: str | None,
    batch: tuple[str, ...],
    seqlen: tuple[str, ...],
    max_global: str | None,
    flavor: str | None,
    target: str | None,
    plugin: bool,
    timing_cache: Path | None,
    workspace: int | None,
    optimization_level: int | None,
    version_compatible: bool,
    refit: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Build a TensorRT plan from a bundle; without BUNDLE, from the only one in this folder.

    Give --batch and --seqlen several times for several optimization profiles.
    """
    from lfx.runtime.builder import Options
    from lfx.runtime.builder import build_engine as build
    from lfx.runtime.plan import PlanManifest

    options = Options(
        timing_cache=timing_cache,
        workspace_bytes=workspace * 1_000_000 if workspace is not None else None,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        refit=refit,
    )
    with progress() as step:
        plan = build(
            bundle if bundle is not None else _only_bundle(),
            output,
            precision=precision,
            batch=batch,
            seqlen=seqlen or None,
            max_global=max_global,
            flavor=flavor,
            target=target,
            plugin=plugin,
            options=options,
            progress=step,
            log=lambda line: echo(line, err=True),
        )
    manifest = PlanManifest.read(plan)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    signature = manifest.signature
    echo(
        f"{plan}: {manifest.flavor} {manifest.tensorrt_version}, {manifest.target}, {signature.precision}, "
        f"{' and '.join(map(str, manifest.profiles))}, {manifest.plan['bytes']:,} bytes"
    )
    echo(f"{manifest.plugin_layers} of {manifest.attention_nodes} attention nodes are plugin layers")


def _only_bundle() -> Path:
    found = sorted(path.parent for path in Path().glob(f"*/{MANIFEST}"))
    if Path(MANIFEST).is_file():
        return Path()
    if len(found) != 1:
        names = f"{len(found)} bundles ({', '.join(map(str, found))})" if found else "no bundle"
        raise InputError(f"this folder holds {names}; name the one to build: lfx build-engine BUNDLE")
    return found[0]


@cli.command()
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--text", help="The text; for question answering the question, for multiple choice the prompt.")
@click.option("--pair", multiple=True, help="A second text: the document asked about, or one choice (repeat it).")
@click.option(
    "--input",
    "file",
    type=FilePath(),
    help="A text file, one document; or documents: .jsonl (.ndjson) or .parquet, with a field text or input_ids.",
)
@click.option(
    "--stride",
    type=click.IntRange(1, _MOST_TOKENS),
    metavar="N",
    help="Cut long documents into windows that begin every N tokens.",
)
@click.option(
    "--max-windows",
    type=click.IntRange(1, _MOST_TOKENS),
    metavar="N",
    help="With --stride: refuse a document that gives more windows.  [default: 4096]",
)
@click.option("--tokenizer", type=FilePath(), help="A folder with one.  [default: the bundle's]")
@click.option(
    "--output",
    type=OutputPath(),
    help="The arrays, as .npz; of documents the results, .jsonl or .parquet.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; arrays per token only with --output.")
@_engine_options
def run(
    model: Path,
    text: str | None,
    pair: tuple[str, ...],
    file: Path | None,
    stride: int | None,
    max_windows: int | None,
    tokenizer: Path | None,
    output: Path | None,
    as_json: bool,
    open_engine: OpenEngine,
) -> None:
    """Run a text, or a file of documents, through a bundle (a folder, or its .onnx file) or a plan.

    A run over documents that was stopped goes on where it was when the same command is given again.
    """
    from lfx.running import run_documents, run_text
    from lfx.runtime.formats import is_documents

    if (text is None) == (file is None):
        raise click.UsageError("give either --text or --input")
    documents = file if file is not None and is_documents(file) else None
    if documents is not None and (output is None or pair):
        raise click.UsageError("documents need --output FILE.jsonl or FILE.parquet, and no --pair")
    if documents is None and stride is not None:
        raise click.UsageError("--stride is for documents: --input FILE.jsonl or FILE.parquet")
    if stride is None and max_windows is not None:
        raise click.UsageError("--max-windows needs --stride, which cuts documents into windows")
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
                as_json=as_json,
            )
        else:
            run_text(engine, model, text, pair, file, output, tokenizer=tokenizer, as_json=as_json)


@cli.command()
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest.")
def inspect(model: Path, as_json: bool) -> None:
    """Show what a bundle or a plan is: model, inputs, outputs, limits, and what its validation measured."""
    manifest = _any_manifest(model)
    if as_json:
        echo_json(manifest.to_dict(), indent=1)
        return
    from lfx.summary import rows

    table(["what", "value"], rows(manifest))


@cli.command()
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--key", type=FilledText(), help="Minisign's public key of who signed: a file, or the key itself.")
@click.option("--signature", type=FilePath(), help="[default: the manifest's name with .minisig, beside it]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(model: Path, key: str | None, signature: Path | None, as_json: bool) -> None:
    """Check all files of a bundle, or a plan, against the manifest, and with --key who signed that.

    Sign with minisign: minisign -Sm lfx.json, or of a plan minisign -Sm NAME.plan.json.
    """
    if key is None and signature is not None:
        raise click.UsageError("--signature needs --key, the public key of who signed")
    from lfx.runtime.signing import verify as run_verify

    found = run_verify(model, key, signature)
    if as_json:
        signer = {"key_id": found.key_id, "trusted_comment": found.trusted_comment}
        echo_json({"manifest": str(found.manifest), "files": found.files, **signer})
        return
    signed = "no signature was checked (--key)"
    if found.key_id is not None:
        signed = f"signed by the key {found.key_id}, trusted comment: {found.trusted_comment}"
    echo(f"{model}: {len(found.files)} files are what {found.manifest.name} says; {signed}")


def _any_manifest(model: Path) -> Manifest | PlanManifest:
    from lfx.runtime.plan import SUFFIX, PlanManifest

    if model.suffix != SUFFIX or model.is_dir():
        return _manifest(model)
    manifest = PlanManifest.read(model)
    manifest.verify(model)
    return manifest


def _manifest(model: Path) -> Manifest:
    from lfx.config import Manifest, locate

    bundle, _ = locate(model)
    if bundle is None:
        raise ArtifactError(f"{model} has no manifest beside it; give the bundle that lfx export wrote")
    manifest = Manifest.read(bundle)
    manifest.verify(bundle)
    return manifest


@cli.command()
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option(
    "--source",
    type=FilledText(),
    help="The checkpoint to compare with.  [default: the one that the bundle was made from]",
)
@click.option("--cases", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--by-layer", is_flag=True, help="Compare every attention layer too, and name the first that differs.")
@click.option("--report", type=OutputPath(), help="Write a page with tables and plots: FILE.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_engine_options
def parity(model: Path, open_engine: OpenEngine, **options: Any) -> None:
    """Compare a bundle or a plan with PyTorch, by length, batch, globals and padding; exit 1 when out of tolerance."""
    from lfx.comparing import run_parity

    run_parity(model, _any_manifest(model), open_engine, **options)


@cli.command()
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--length", "lengths", type=click.IntRange(1, _MOST_TOKENS), multiple=True, help="[default: 512 to 4096]")
@click.option(
    "--batch", "batch_sizes", type=click.IntRange(1, 1_000_000), multiple=True, default=[1], show_default=True
)
@click.option("--rounds", type=click.IntRange(1, 1_000_000), default=5, show_default=True, help="After one warm-up.")
@click.option(
    "--against",
    type=click.Choice(["pytorch", "pytorch-bf16", "pytorch-compile"]),
    multiple=True,
    help="Measure PyTorch too, in turns, in the same process.",
)
@click.option(
    "--source",
    type=FilledText(),
    help="The checkpoint to compare with.  [default: the one that the bundle was made from]",
)
@click.option("--output", type=OutputPath(), help="Write the rows to this .jsonl file.")
@click.option("--plot", type=OutputPath(), help="Draw tokens per second over length into this .png file.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON lines.")
@_engine_options
def bench(model: Path, open_engine: OpenEngine, **options: Any) -> None:
    """Measure a bundle or a plan: latency, tokens per second, peak memory, by length and batch."""
    if options["source"] is not None and not options["against"]:
        raise click.UsageError("--source is what --against measures; give both")
    from lfx.benching import run_bench

    run_bench(model, open_engine, **options)


_LONGEST_MESSAGE = 2000
_INTERRUPTED = "interrupted; nothing half-written was left"


def main() -> NoReturn:
    """Run the command line: 0 done, 1 one line of error, 2 usage."""
    prepare_streams()
    catch_interrupts()
    try:
        cli(standalone_mode=False)
        write("")  # what others printed to stdout must have got there too
    except click.ClickException as error:
        _show_usage(error)
        _exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(_INTERRUPTED)
    except LfxError as error:
        _fail(_INTERRUPTED if interrupted() else str(error))
    except BrokenPipeError:
        _exit(1)
    except (MemoryError, OSError) as error:  # of the system, which may refuse at any place
        _fail(_INTERRUPTED if interrupted() else with_cure(error))
    except Exception as error:
        if interrupted():
            _fail(_INTERRUPTED)
        if os.environ.get("LFX_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {one_line(error)} (LFX_DEBUG=1 shows where; please report it)")
    _exit(0)


def _show_usage(error: click.ClickException) -> None:
    """Print what click has to say of wrong usage, which quotes the arguments."""
    if type(error).__name__ != "NoArgsIsHelpError":  # whose message is the help; click has it since 8.2
        error.message = printable(error.message)  # type: ignore[misc]  # no other way to the text around it
    text = io.StringIO()
    error.show(text)
    write(text.getvalue(), err=True)


def _fail(message: str) -> NoReturn:
    long = len(message) > _LONGEST_MESSAGE  # its end says what to do
    echo(f"error: {f'{message[:800]} … {message[-800:]}' if long else message}", err=True)
    _exit(1)


def _exit(code: int) -> NoReturn:
    drop_stdout()
    sys.exit(code)


if __name__ == "__main__":
    main()
