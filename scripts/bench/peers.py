"""Compare exporters with Hugging Face eager fp32, in nine cases of length, batch and global tokens.

    python -m scripts.bench.peers [--optimum-python PYTHON]      # writes docs/records/peers.jsonl

The model has two layers, random weights and attention_window 32. All tools get the same model in the same run.
optimum-onnx needs a separate environment (see peers_optimum.py); without one its row is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
import transformers
from transformers import LongformerConfig, LongformerModel

from lfx.errors import one_line
from lfx.export import export
from lfx.runtime import Engine
from scripts import record

CASES = [(batch, seqlen, globals_) for batch, globals_ in ((1, 0), (2, 0), (2, 1)) for seqlen in (16, 64, 500)]
# Chosen, and recorded in each row: 10 to 100 times the rounding error of two layers in float32, and less than 1 % of
# the error of a wrong mask.
TOLERANCE = 1e-4


def main() -> None:
    """Run all tools, write the record, and print a line for each tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum-python", help="Python interpreter of an environment with optimum-onnx")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        attention_window=32,
        max_position_embeddings=514,
    )
    model = LongformerModel(config).eval()
    about = {**record.environment(), "tolerance": TOLERANCE, "cases": len(CASES)}
    with tempfile.TemporaryDirectory() as folder:
        cases = _eager_answers(model)
        rows = [{**about, "tool": "lfx", **_verdict(_run_lfx(model, cases, Path(folder) / "out"))}]
        for dynamic in (False, True):
            rows.append({**about, "tool": "transformers OnnxExporter", **_try_transformers(model, dynamic)})
        for dynamo in (True, False):
            tool = f"torch.onnx.export, dynamo={dynamo}"
            result = _attempt(_run_torch, model, cases, Path(folder) / "torch.onnx", dynamo)
            rows.append({**about, "tool": tool, **result})
        for batch in (1, 2):
            tool = f"openvino.convert_model, traced at {batch} x 64"
            rows.append({**about, "tool": tool, **_attempt(_run_openvino, model, cases, batch)})
        if options.optimum_python:
            result = _run_optimum(options.optimum_python, model, cases, Path(folder))
            rows.append({**about, "tool": "optimum-onnx", **result})
        else:
            rows += [row for row in record.read("peers") if row["tool"] == "optimum-onnx"]
    print(record.write("peers", rows))
    for row in rows:
        print({key: row.get(key) for key in ("tool", "right", "crashed", "max_difference", "error")})


def _eager_answers(model: Any) -> dict[str, np.ndarray]:
    """Return the inputs and Hugging Face's outputs of all cases."""
    stored = {}
    for i, (batch, seqlen, globals_) in enumerate(CASES):
        ids = np.random.default_rng(seqlen).integers(3, 1000, (batch, seqlen))
        global_mask = np.zeros_like(ids)
        global_mask[:, : 3 * globals_ : 2] = 1
        with torch.inference_mode():
            outputs = model(torch.from_numpy(ids), global_attention_mask=torch.from_numpy(global_mask))
        expected = outputs.last_hidden_state.numpy()
        stored |= {f"ids_{i}": ids, f"global_mask_{i}": global_mask, f"expected_{i}": expected}
    return stored


def _inputs(model: Any, batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 1000, (batch, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "global_attention_mask": torch.zeros_like(ids)}


def _attempt(run: Callable[..., list[float | None]], *arguments: Any) -> dict[str, Any]:
    """Return a tool's results, or the error that its export raised."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return _verdict(run(*arguments))
    except Exception as error:
        return {"right": 0, "error": f"{type(error).__name__}: {one_line(error)}"}


def _run_torch(model: Any, cases: dict[str, np.ndarray], path: Path, dynamo: bool) -> list[float | None]:
    """Export with torch.onnx, with dynamic batch and sequence axes, and run the cases."""
    inputs = _inputs(model, 2)
    axes: dict[str, Any] = {name: {0: "batch", 1: "sequence"} for name in inputs}
    dynamic = {"dynamic_shapes": axes} if dynamo else {"dynamic_axes": axes}
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=path,
        input_names=list(inputs),
        output_names=["last_hidden_state", "pooler_output"],
        opset_version=18,
        dynamo=dynamo,
        verbose=False,
        **dynamic,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options)
    names = {item.name for item in session.get_inputs()}

    def run(feeds: dict[str, np.ndarray]) -> Any:
        return session.run(["last_hidden_state"], {name: feeds[name] for name in feeds if name in names})[0]

    return _differences(run, cases)


def _run_openvino(model: Any, cases: dict[str, np.ndarray], batch: int) -> list[float | None]:
    """Convert with OpenVINO, traced with one batch size, and run the cases."""
    converted = openvino.convert_model(model, example_input=_inputs(model, batch))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _differences(lambda feeds: compiled(feeds)[0], cases)


def _differences(run: Callable[[dict[str, np.ndarray]], Any], cases: dict[str, np.ndarray]) -> list[float | None]:
    """Return the largest difference of each case: None if it raises an error, infinity if the shape is wrong."""
    differences: list[float | None] = []
    for i in range(len(CASES)):
        ids, global_mask, expected = (cases[f"{name}_{i}"] for name in ("ids", "global_mask", "expected"))
        try:
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "global_attention_mask": global_mask}
            actual = np.asarray(run(inputs))
        except Exception:
            differences.append(None)
            continue
        differences.append(float(np.abs(actual - expected).max()) if actual.shape == expected.shape else math.inf)
    return differences


def _run_lfx(model: Any, cases: dict[str, np.ndarray], output: Path) -> list[float | None]:
    differences: list[float | None] = []
    with Engine(export(model, output)) as engine:
        for i in range(len(CASES)):
            ids, global_mask, expected = (cases[f"{name}_{i}"] for name in ("ids", "global_mask", "expected"))
            actual = np.asarray(engine.run(ids, global_attention_mask=global_mask)["last_hidden_state"])
            differences.append(float(np.abs(actual - expected).max()))
    return differences


def _run_optimum(python: str, model: Any, cases: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder / "checkpoint")
    np.savez(folder / "cases.npz", **cases)
    script = Path(__file__).with_name("peers_optimum.py")
    command = [python, str(script), str(folder / "checkpoint"), str(folder / "cases.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"right": 0, "error": done.stderr.strip().splitlines()[-1]}
    result = json.loads(done.stdout.splitlines()[-1])
    return {**_verdict(result["differences"]), "versions": result["versions"]}


def _verdict(differences: list[float | None]) -> dict[str, Any]:
    completed = [d for d in differences if d is not None]
    return {
        "right": sum(d <= TOLERANCE for d in completed),
        "crashed": differences.count(None),
        "max_difference": max((d for d in completed if math.isfinite(d)), default=None),
        "differences": differences,
    }


def _try_transformers(model: Any, dynamic: bool) -> dict[str, Any]:
    try:
        from transformers.exporters import OnnxConfig, OnnxExporter

        ids = torch.randint(3, 1000, (2, 64))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exporter = OnnxExporter()
            exporter.export(
                model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, OnnxConfig(dynamic=dynamic)
            )
    except Exception as error:
        return {"dynamic": dynamic, "right": 0, "error": f"{type(error).__name__}: {one_line(error)}"}
    return {"dynamic": dynamic, "right": None, "error": "exported; not checked"}


if __name__ == "__main__":
    main()
