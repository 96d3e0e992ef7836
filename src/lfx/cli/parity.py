"""`lfx parity`: compare a bundle or a plan with PyTorch; print a table or JSON, or write an HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfx.checks import one_of, output_file
from lfx.cli.engine import engine_options
from lfx.cli.inspect import checked_manifest
from lfx.cli.options import Command, FilePath, FilledText, OutputPath
from lfx.cli.source import checkpoint_of, load_checkpoint
from lfx.cli.terminal import echo, echo_json, progress, table
from lfx.errors import InputError, require
from lfx.files import temporary_folder
from lfx.manifest import Manifest, locate
from lfx.signature import QUANTIZED, grouped

if TYPE_CHECKING:
    from lfx.cli.engine import OpenEngine
    from lfx.parity import Report
    from lfx.runtime import Engine
    from lfx.runtime.plan import PlanManifest

    Step = Callable[[str], None]


@click.command("parity", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option(
    "--source",
    type=FilledText(),
    help="Compare with this checkpoint.  [default: the folder that the bundle was exported from]",
)
@click.option(
    "--cases",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="Compare over five cases, or over all lengths around multiples of the window.",
)
@click.option(
    "--by-layer", is_flag=True, help="Compare each attention layer too, and name the first one out of tolerance."
)
@click.option("--report", type=OutputPath(), help="Write an HTML page with tables and plots to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@engine_options
def command(model: Path, open_engine: OpenEngine, **options: Any) -> None:
    """Compare a bundle or a plan with PyTorch.

    The cases vary length, batch, global tokens and padding. The exit status is 1 if an output is out of tolerance.
    """
    from lfx.runtime.hub import local_path

    model = local_path(model)
    run_parity(model, checked_manifest(model), open_engine, **options)


def run_parity(
    model: Path,
    manifest: Manifest | PlanManifest,
    open_engine: OpenEngine,
    *,
    source: str | None,
    cases: str,
    by_layer: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Compare an artifact with its checkpoint and print the report; the arguments are the command's options.

    Args:
        by_layer: compare each attention layer too, over the quick cases, in a copy of the graph that outputs them.
        report: the HTML page to write; it has the layers too if the artifact is a bundle with lfx functions.
    Raises:
        InputError: the checkpoint is unknown, or an option is invalid.
        ArtifactError: the checkpoint's weights are not those that the artifact was exported from.
        ParityError: an output is out of tolerance; raised after the table, the JSON and the page are written.
    """
    one_of(cases, "cases", ("quick", "full"))
    checkpoint = checkpoint_of(model, manifest.source, source, "lfx parity {} --source {}")
    if report is not None:
        output_file(report, "--report")
    if by_layer:
        _check_layers(model, manifest)
    if report is not None:
        require("matplotlib", "report")
    layers = None
    with progress() as step:
        with open_engine(model) as engine:
            module = load_checkpoint(checkpoint, manifest.signature.task, manifest.source, step)
            comparison = _compare(engine, module, manifest, cases, step)
            facts = _facts(model, manifest, engine, checkpoint)
        if by_layer or (report is not None and isinstance(manifest, Manifest) and not manifest.inlined):
            layers = _compare_layers(model, open_engine, module, manifest, step)
    try:
        if report is not None:
            from lfx.cli.report import write

            write(report, facts, comparison, layers)
    finally:  # a comparison whose page cannot be written is printed
        _print(comparison, layers, facts, as_json=as_json, by_layer=by_layer)
    comparison.require()
    if layers is not None:
        layers.require()


def _check_layers(model: Path, manifest: Manifest | PlanManifest) -> None:
    """Check that the artifact has attention nodes to compare.

    Raises:
        InputError: it is a plan, or its functions are inlined.
    """
    if not isinstance(manifest, Manifest):
        raise InputError(f"{model} is a plan, whose layers TensorRT has merged; compare the bundle by layer")
    if manifest.inlined:
        raise InputError(
            f"{model} has its functions inlined, so it has no attention nodes to compare; export it without "
            "--inline-functions"
        )


def _compare(engine: Engine, module: Any, manifest: Manifest | PlanManifest, cases: str, step: Step) -> Report:
    from lfx.export.validate import compare_engine
    from lfx.parity import full_cases, quick_cases

    make_cases = full_cases if cases == "full" else quick_cases
    return compare_engine(engine, module, make_cases, step, quantization=manifest.quantization)


def _compare_layers(
    model: Path, open_engine: OpenEngine, module: Any, manifest: Manifest | PlanManifest, step: Step
) -> Report:
    from lfx.export.expose_layers import expose_layers
    from lfx.export.validate import compare_engine
    from lfx.parity import quick_cases

    bundle, _ = locate(model)
    assert bundle is not None
    assert isinstance(manifest, Manifest)
    with (
        temporary_folder("parity") as scratch,
        open_engine(expose_layers(bundle, manifest.signature, scratch, manifest.model_file)) as engine,
    ):
        return compare_engine(engine, module, quick_cases, step, quantization=manifest.quantization, by_layer=True)


def _facts(model: Path, manifest: Manifest | PlanManifest, engine: Engine, source: str) -> dict[str, str]:
    signature = manifest.signature
    return {
        "artifact": str(model),
        "format": f"ONNX bundle, opset {manifest.opset}"
        if isinstance(manifest, Manifest)
        else f"{manifest.flavor} plan",
        "backend": engine.backend,
        "model": f"{signature.architecture}, {signature.task}, {len(signature.attention_windows)} attention layers",
        "precision": engine.precision,
        "compared with": source,
        "weights": str(manifest.source.get("sha256")),
    }


def _print(comparison: Report, layers: Report | None, facts: dict[str, str], *, as_json: bool, by_layer: bool) -> None:
    if as_json:
        data = {"backend": facts["backend"], **comparison.to_dict()}
        if layers is not None:
            data |= {"passed": data["passed"] and not layers.failures(), "by_layer": layers.to_dict()}
        echo_json(data, indent=1)
        return
    _show(comparison, facts)
    if by_layer and layers is not None:
        _show_layers(layers)
    elif layers is None and comparison.too_small():
        echo(f"{', '.join(comparison.too_small())}: too few numbers to find every wrong layer; give --by-layer too")


def _show(report: Report, facts: dict[str, str]) -> None:
    groups = grouped(report.outputs)  # of a group, the largest errors and the smallest tolerance
    header = ["batch", "length", "globals", "padding", *(f"{label} error" for label in groups)]
    rows = []
    for c, errors in report.rows:
        largest = (max(errors[o].error for o in group) for group in groups.values())
        rows.append([str(c.batch), str(c.seqlen), c.globals, c.padding, *(f"{error:.2e}" for error in largest)])
    tolerances = (min(map(report.tolerance, group)) for group in groups.values())
    witness = (max(report.outputs[o].witness_error for o in group) for group in groups.values())
    rows.append(["", "", "", "tolerance", *(f"{tolerance:.2e}" for tolerance in tolerances)])
    rows.append(["", "", "", "PyTorch's error", *(f"{error:.2e}" for error in witness)])
    table(header, rows)
    for name in report.outputs if report.precision == QUANTIZED else ():
        result = report.outputs[name]
        agreement = f", {result.agreeing} of {result.labels} labels agree" if result.labels else ""
        echo(f"{name}: cosine {result.cosine():.5f} with the float64 reference{agreement}")
    verdict = "out of tolerance" if report.failures() else "in tolerance"
    echo(f"{len(report.rows)} cases, {facts['backend']}, {report.precision}: {verdict}")


def _show_layers(report: Report) -> None:
    rows = []
    for name, result in report.outputs.items():
        errors = [f"{x:.2e}" for x in (result.error, result.witness_error, report.tolerance(name))]
        rows.append([name, *errors, "ok" if report.passed(name) else "out of tolerance"])
    table(["layer", "error", "PyTorch's error", "tolerance", "verdict"], rows)
    first = report.first_failure()
    echo(f"first out of tolerance: {first}" if first else "all layers are in tolerance")
