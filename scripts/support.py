"""Export each model class and feature, compare the bundle with the reference in each backend, and build plans from it.

    python -m scripts.support              # writes docs/records/support.jsonl; some 7 minutes on one core
    python -m scripts.support causal bf16  # measures these rows alone, and replaces them in the record

The models are the tiny random ones of the tests. Each cell is the result of a run: the largest error over the cases
against the dense float64 reference, or the reason why the run failed. Plans are built by TensorRT-RTX for sm89, which
needs no GPU; they are not run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lfx.errors import LfxError, one_line
from lfx.export import convert, export
from lfx.export.led import LED_CLASSES
from lfx.export.load import load
from lfx.export.quantize import quantize
from lfx.export.validate import compare_engine
from lfx.manifest import Manifest
from lfx.parity import Case, Report, full_cases
from lfx.runtime import Engine, build_engine
from lfx.runtime.plan import PlanManifest
from lfx.signature import TASKS, TEXT_GENERATION
from scripts import record
from tests.encoders import FAMILIES, save_tiny_encoder
from tests.export.test_convert_bart import tiny_bart
from tests.export.test_original import save_original
from tests.models import VOCAB_SIZE, tiny_led, tiny_model
from tests.parity.test_dilation import PATTERNS
from tests.parity.test_dilation import model as dilated_model

RTX = {"flavor": "tensorrt-rtx", "target": "sm89"}
BACKENDS = ("onnxruntime", "openvino")


class Relevance(nn.Module):
    """A module of a user's own: a Longformer, and a head with an output of its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_model()
        torch.manual_seed(1)
        self.score = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, global_attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """(batch, seqlen) each -> relevance, (batch)."""
        masks = {"attention_mask": attention_mask, "global_attention_mask": global_attention_mask}
        states = self.encoder(input_ids, **masks).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        return {"relevance": self.score(mean).squeeze(-1)}


@dataclass(frozen=True)
class Row:
    """A model class or a feature.

    Attributes:
        model: returns the float32 module, or writes the checkpoint into the given folder and returns its path.
        options: of `export`.
        activations: of `quantize`, for a row in int8; None = the bundle is not quantized.
        keep: whether a case is run.
    """

    group: str
    model: Callable[[Path], nn.Module | Path]
    options: dict[str, Any] = field(default_factory=dict)
    activations: str | None = None
    keep: Callable[[Case], bool] = lambda case: True


def rows() -> dict[str, Row]:
    """Return all rows by name, in the order of the table."""
    model_class = "model class"
    table = {
        f"{task.architecture}, {name}": Row(model_class, functools.partial(_tiny, name)) for name, task in TASKS.items()
    }
    for task, architecture in LED_CLASSES.items():
        if task != TEXT_GENERATION:
            table[f"{architecture}, {task}"] = Row(model_class, functools.partial(_tiny_led, architecture))
    table["BartForConditionalGeneration, converted"] = Row(model_class, _converted_bart)
    for family in FAMILIES:
        table[f"{family}Model, converted"] = Row(model_class, functools.partial(_converted, family))
    table["allenai's original checkpoint"] = Row(model_class, _original)
    table["a module of your own"] = Row(model_class, lambda folder: Relevance().eval())
    table["a module of your own, xPos"] = Row(model_class, _xpos)
    base = functools.partial(_tiny, "feature-extraction")
    table |= {
        "global tokens: none": Row("feature", base, {"global_attention": "none"}),
        "global tokens: first": Row("feature", base, {"global_attention": "first"}),
        "global tokens: scattered, adjacent, all": Row(
            "feature", base, keep=lambda c: c.globals not in ("none", "first")
        ),
        "global tokens: a constant number of slots": Row("feature", base, {"max_global": 5}),
        "padding: right": Row("feature", base, keep=lambda case: case.padding == "right"),
        "padding: left": Row("feature", base, keep=lambda case: case.padding == "left"),
        "padding: holes, a row of padding": Row("feature", base, keep=lambda c: c.padding in ("holes", "empty_row")),
    }
    for pattern in PATTERNS:
        name = (
            "causal" if pattern == "causal" else f"dilation {pattern.replace('-causal', ', causal').replace('-', ' ')}"
        )
        table[name] = Row("feature", functools.partial(_dilated, pattern))
    table |= {f"opset {opset}": Row("feature", base, {"opset": opset}) for opset in (17, 21, 23)}
    table |= {precision: Row("feature", base, {"precision": precision}) for precision in ("fp16", "bf16")}
    table |= {f"int8, {name} activations": Row("feature", base, activations=name) for name in ("uint8", "int8")}
    led = functools.partial(_tiny, TEXT_GENERATION)
    table |= {
        f"int8, {name} activations, LEDForConditionalGeneration": Row("feature", led, activations=name)
        for name in ("uint8", "int8")
    }
    table["attention probabilities as outputs"] = Row("feature", base, {"output_attentions": True})
    table["functions inlined"] = Row("feature", base, {"inline_functions": True})
    return table


def _tiny(task: str, folder: Path) -> nn.Module:
    module: nn.Module = tiny_model(task)
    return module


def _tiny_led(architecture: str, folder: Path) -> nn.Module:
    module: nn.Module = tiny_led(architecture)
    return module


def _converted_bart(folder: Path) -> Path:
    tiny_bart().save_pretrained(folder / "bart")
    return convert(folder / "bart", folder / "checkpoint", max_seqlen=128, attention_window=16)


def _converted(family: str, folder: Path) -> Path:
    encoder = folder / "encoder"
    encoder.mkdir()
    return convert(save_tiny_encoder(encoder, family), folder / "checkpoint", max_seqlen=128, attention_window=16)


def _original(folder: Path) -> Path:
    save_original(folder / "checkpoint")
    return folder / "checkpoint"


def _xpos(folder: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("rotary_positions", record.ROOT / "examples" / "rotary_positions.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    module: nn.Module = example.rotated_model()
    return module


def _dilated(pattern: str, folder: Path) -> nn.Module:
    module: nn.Module = dilated_model(pattern)
    return module


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Run a row.

    Returns:
        `exported`, `onnxruntime`, `openvino`, `function` and `plugin`: each {"ok": True} with what was measured, or
        {"ok": False} with the `reason`.
    """
    result: dict[str, Any] = {}

    def attempt(name: str, run: Callable[[], tuple[Any, dict[str, Any]]]) -> Any:
        """Store what a run measured, or why it failed; returns its product, or None."""
        try:
            product, measured = run()
        except LfxError as error:
            result[name] = {"ok": False, "reason": one_line(error, 400).replace(f"{folder}/", "")}
            return None
        result[name] = {"ok": True, **measured}
        return product

    exported = attempt("exported", functools.partial(_export, row, folder))
    if exported is None:
        return result
    bundle, module = exported
    for backend in BACKENDS:
        attempt(backend, functools.partial(_compare, row, bundle, module, backend))
    for name, plugin in (("function", False), ("plugin", True)):
        attempt(name, functools.partial(_build, bundle, folder / f"{name}.plan", plugin))
    return result


def _export(row: Row, folder: Path) -> tuple[tuple[Path, nn.Module], dict[str, Any]]:
    """Export the model of a row; returns the bundle with the float32 module, and its opset and precision."""
    model = row.model(folder)
    bundle = export(model, folder / "bundle", **row.options)
    if row.activations:
        text = bundle.with_name("documents.jsonl")
        random = np.random.default_rng(0)
        ids = [random.integers(3, VOCAB_SIZE, length).tolist() for length in random.integers(10, 120, 12)]
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
        bundle = quantize(bundle, bundle.with_name("int8"), calibration=text, activations=row.activations)
    manifest = Manifest.read(bundle)
    module = model if isinstance(model, nn.Module) else load(str(model))[0]
    return (bundle, module), {"opset": manifest.opset, "precision": manifest.signature.precision}


def _compare(row: Row, bundle: Path, module: nn.Module, backend: str) -> tuple[Report, dict[str, Any]]:
    def cases(window: int, max_seqlen: int | None, multiple_of: int) -> list[Case]:
        return [case for case in full_cases(window, max_seqlen, multiple_of) if row.keep(case)]

    with Engine(bundle, backend) as engine:
        quantization = Manifest.read(bundle).quantization
        report = compare_engine(engine, module, cases, lambda step: None, quantization=quantization)
    report.require()
    worst = max(report.outputs, key=lambda name: report.outputs[name].error / report.tolerance(name))
    measured = {"error": report.outputs[worst].error, "tolerance": report.tolerance(worst), "cases": len(report.rows)}
    return report, measured


def _build(bundle: Path, plan: Path, plugin: bool) -> tuple[Path, dict[str, Any]]:
    build_engine(bundle, plan, plugin=plugin, **RTX, log=lambda line: None)
    manifest = PlanManifest.read(plan)
    measured = {"attention_nodes": manifest.attention_nodes, "plugin_layers": manifest.plugin_layers}
    return plan, {**measured, "flavor": f"{manifest.flavor} {manifest.tensorrt_version}", "target": manifest.target}


def main() -> None:
    """Run all rows, or the given ones, and write the record."""
    table = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*table, []], metavar="ROW", help="names of rows (default: all)")
    chosen = parser.parse_args().rows or list(table)
    about = record.environment()
    measured = {row["name"]: row for row in record.read("support")} if chosen != list(table) else {}
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="lfx-support-") as folder:
            measured[name] = {**about, "name": name, "group": table[name].group, **measure(table[name], Path(folder))}
        print(name, {key: cell for key, cell in measured[name].items() if isinstance(cell, dict) and "ok" in cell})
        record.write("support", [measured[key] for key in table if key in measured])


if __name__ == "__main__":
    main()
