"""`lfx parity`: a bundle or a plan beside PyTorch, shown as a table, as JSON or as a page."""

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
from lfx.signature import QUANTIZED

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
    help="The checkpoint to compare with.  [default: the folder that the bundle was made from]",
)
@click.option("--cases", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--by-layer", is_flag=True, help="Compare every attention layer too, and name the first that differs.")
@click.option("--report", type=OutputPath(), help="Write a page with tables and plots: FILE.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@engine_options
def command(model: Path, open_engine: OpenEngine, **options: Any) -> None:
    """Compare a bundle or a plan with PyTorch, by length, batch, globals and padding; exit 1 when out of tolerance."""
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
    """Compare and show.

    Args:
        by_layer: compare every attention layer too, over the quick cases, in a copy of the graph that hands them out.
        report: the page to write; it has the layers too, where the artifact shows them.
    Raises:
        InputError: the checkpoint is not known, or an option cannot be had.
        ArtifactError: the checkpoint has other weights than the artifact was made from.
        ParityError: an output is out of tolerance; the table, the JSON and the page are there all the same.
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
            found = _compare(engine, module, manifest, cases, step)
            facts = _facts(model, manifest, engine, checkpoint)
        if by_layer or (report is not None and isinstance(manifest, Manifest) and not manifest.inlined):
            layers = _compare_layers(model, open_engine, module, manifest, step)
    if as_json:
        data = {"backend": facts["backend"], **found.to_dict()}
        if layers is not None:
            data |= {"passed": data["passed"] and not layers.failures(), "by_layer": layers.to_dict()}
        echo_json(data, indent=1)
    else:
        _show(found, facts)
        if by_layer and layers is not None:
            _show_layers(layers)
    if report is not None:
        from lfx.cli.report import write

        write(report, facts, found, layers)
    found.require()
    if layers is not None:
        layers.require()


def _check_layers(model: Path, manifest: Manifest | PlanManifest) -> None:
    """Raises: InputError: the artifact does not show its layers."""
    if not isinstance(manifest, Manifest):
        raise InputError(f"{model} is a plan, whose layers TensorRT has merged; compare the bundle by layer")
    if manifest.inlined:
        raise InputError(
            f"{model} has its functions inlined, so its layers are not to be seen; export it without --inline-functions"
        )


def _compare(engine: Engine, module: Any, manifest: Manifest | PlanManifest, cases: str, step: Step) -> Report:
    from lfx.export.validate import compare_engine
    from lfx.parity import full_cases, quick_cases

    wanted = full_cases if cases == "full" else quick_cases
    return compare_engine(engine, module, wanted, step, quantization=manifest.quantization)


def _compare_layers(
    model: Path, open_engine: OpenEngine, module: Any, manifest: Manifest | PlanManifest, step: Step
) -> Report:
    from lfx.export.expose_layers import expose_layers
    from lfx.export.validate import compare_engine
    from lfx.parity import quick_cases

    bundle, _ = locate(model)
    assert bundle is not None
    with (
        temporary_folder("parity") as scratch,
        open_engine(expose_layers(bundle, manifest.signature, scratch)) as engine,
    ):
        return compare_engine(engine, module, quick_cases, step, quantization=manifest.quantization, by_layer=True)


def _facts(model: Path, manifest: Manifest | PlanManifest, engine: Engine, source: str) -> dict[str, str]:
    signature = manifest.signature
    return {
        "artifact": str(model),
        "kind": f"ONNX bundle, opset {manifest.opset}" if isinstance(manifest, Manifest) else f"{manifest.flavor} plan",
        "backend": engine.backend,
        "model": f"{signature.architecture}, {signature.task}, {len(signature.attention_windows)} attention layers",
        "precision": engine.precision,
        "compared with": source,
        "weights": str(manifest.source.get("sha256")),
    }


def _show(report: Report, facts: dict[str, str]) -> None:
    names = list(report.outputs)
    header = ["batch", "length", "globals", "padding", *(f"{o} error" for o in names)]
    rows = [
        [str(c.batch), str(c.seqlen), c.globals, c.padding, *(f"{errors[o].error:.2e}" for o in names)]
        for c, errors in report.rows
    ]
    rows.append(["", "", "", "tolerance", *(f"{report.tolerance(o):.2e}" for o in names)])
    rows.append(["", "", "", "PyTorch's own", *(f"{report.outputs[o].witness_error:.2e}" for o in names)])
    table(header, rows)
    for name in names if report.precision == QUANTIZED else ():
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
    table(["layer", "error", "PyTorch's own", "tolerance", "verdict"], rows)
    parted = report.first_failure()
    echo(f"the two part at {parted}" if parted else "the two part at no layer")
