"""What `lfx parity` does: a bundle or a plan beside PyTorch, shown as a table, as JSON or as a page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lfx.checks import file_path, one_of, output_file
from lfx.config import QUANTIZED, Manifest, locate
from lfx.errors import ArtifactError, InputError, require
from lfx.files import temporary_folder
from lfx.parity import Report, full_cases, quick_cases
from lfx.runtime import Engine
from lfx.runtime.plan import PlanManifest
from lfx.terminal import echo, echo_json, progress, table

OpenEngine = Callable[[Path], Engine]
Step = Callable[[str], None]


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
    if by_layer and isinstance(manifest, PlanManifest):
        raise InputError(f"{model} is a plan, whose layers TensorRT has merged; compare the bundle by layer")
    if by_layer and isinstance(manifest, Manifest) and manifest.inlined:
        raise InputError(
            f"{model} has its functions inlined, so its layers are not to be seen; export it without --inline-functions"
        )
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
        from lfx.report import write

        write(report, facts, found, layers)
    found.require()
    if layers is not None:
        layers.require()


def checkpoint_of(model: Path, known: Mapping[str, Any] | None, source: str | None, command: str) -> str:
    """The checkpoint that an artifact is compared with.

    A manifest may come from a stranger, so it decides only where it names a folder of this machine.

    Args:
        known: the manifest's `source`; None where there is no manifest.
        source: what the caller named; it comes first.
        command: the command to give where it is not known, with {} for the artifact and {} for the checkpoint.
    Raises:
        InputError: it is not known, or is to be fetched and was not named by the caller.
    """
    if source is not None:
        if not isinstance(source, str) or not source:
            raise InputError(f"source is {source!r}; give a checkpoint folder or a hub id")
        return source
    name, kind = (known.get("model"), known.get("kind")) if known is not None else (None, None)
    named = isinstance(name, str) and bool(name) and name.isprintable()
    if kind == "folder" and named and Path(str(name)).is_absolute() and file_path(name, "source").is_dir():
        return str(name)
    reason, place = "does not say which checkpoint it was made from", "CHECKPOINT"
    if kind == "hub" and named:
        reason, place = f"says it was made from {name} of the hub, which is loaded only when you ask for it", str(name)
    elif kind == "folder" and named:
        reason = f"was made from the folder {name}, which is not here"
    elif kind == "module":
        reason = "was made from a module in memory; save that with save_pretrained"
    raise InputError(f"{model} {reason}; give: {command.format(shlex.quote(str(model)), shlex.quote(place))}")


def load_checkpoint(source: str, task: str, known: Mapping[str, Any] | None, step: Step) -> Any:
    """Load the model that an artifact is compared with.

    Args:
        known: the manifest's `source`; None where there is no manifest, and so no digest to compare.
    Raises:
        ExportError: it cannot be loaded.
        ArtifactError: its weights are not those that the artifact was made from.
    """
    step("importing torch")
    from lfx.export.load import load, weights_sha256

    step("loading the checkpoint")
    module, _ = load(source, task)
    if known is not None and weights_sha256(module) != known.get("sha256"):
        raise ArtifactError(
            f"{source} has other weights than the bundle was made from (sha256 differs); "
            "give the right checkpoint with --source, or export again"
        )
    return module


def _compare(engine: Engine, module: Any, manifest: Manifest | PlanManifest, cases: str, step: Step) -> Report:
    from lfx.export.validate import compare_engine

    wanted = full_cases if cases == "full" else quick_cases
    return compare_engine(engine, module, wanted, step, quantization=manifest.quantization)


def _compare_layers(
    model: Path, open_engine: OpenEngine, module: Any, manifest: Manifest | PlanManifest, step: Step
) -> Report:
    from lfx.export.layers import expose_layers
    from lfx.export.validate import compare_engine

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
    rows.append(["", "", "", "PyTorch's own", *(f"{report.outputs[o].torch_error:.2e}" for o in names)])
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
        errors = [f"{x:.2e}" for x in (result.error, result.torch_error, report.tolerance(name))]
        rows.append([name, *errors, "ok" if report.passes(name) else "out of tolerance"])
    table(["layer", "error", "PyTorch's own", "tolerance", "verdict"], rows)
    parted = report.first_failure()
    echo(f"the two part at {parted}" if parted else "the two part at no layer")
