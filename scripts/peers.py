"""The table of peers: nine length / batch / global-token cases of each tool against Hugging Face eager, fp32.

    python scripts/peers.py [--optimum-python PYTHON]      # writes docs/records/peers.jsonl

The model has two layers, random weights and attention_window 32. Every tool gets the same model in the same run;
optimum-onnx needs an environment of its own (see peers_optimum.py), and its row is left as it is without one.
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
import record
import torch
import transformers
from transformers import LongformerConfig, LongformerModel

from lfx.errors import one_line
from lfx.export import export
from lfx.runtime import Engine

CASES = [(batch, seqlen, globals_) for batch, globals_ in ((1, 0), (2, 0), (2, 1)) for seqlen in (16, 64, 500)]
TOLERANCE = 1e-4


def main() -> None:
    """Measure, write the record, print a line for each tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum-python", help="the interpreter of an environment with optimum-onnx")
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
            rows.append(
                {**about, "tool": tool, **_attempt(_run_torch, model, cases, Path(folder) / "torch.onnx", dynamo)}
            )
        for batch in (1, 2):
            tool = f"openvino.convert_model, traced at {batch} x 64"
            rows.append({**about, "tool": tool, **_attempt(_run_openvino, model, cases, batch)})
        if options.optimum_python:
            rows.append(
                {
                    **about,
                    "tool": "optimum-onnx",
                    **_run_optimum(options.optimum_python, model, cases, Path(folder)),
                }
            )
        else:
            rows += [row for row in record.read("peers") if row["tool"] == "optimum-onnx"]
    print(record.write("peers", rows))
    for row in rows:
        print({key: row.get(key) for key in ("tool", "right", "crashed", "max_difference", "error")})


def _eager_answers(model: Any) -> dict[str, np.ndarray]:
    """Inputs and Hugging Face's outputs of every case."""
    stored = {}
    for i, (batch, seqlen, globals_) in enumerate(CASES):
        ids = np.random.default_rng(seqlen).integers(3, 1000, (batch, seqlen))
        marks = np.zeros_like(ids)
        marks[:, : 3 * globals_ : 2] = 1
        with torch.inference_mode():
            found = model(torch.from_numpy(ids), global_attention_mask=torch.from_numpy(marks))
        stored |= {f"ids_{i}": ids, f"marks_{i}": marks, f"wanted_{i}": found.last_hidden_state.numpy()}
    return stored


def _inputs(model: Any, batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 1000, (batch, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "global_attention_mask": torch.zeros_like(ids)}


def _attempt(run: Callable[..., list[float | None]], *arguments: Any) -> dict[str, Any]:
    """The verdict on a tool, or the error that its export ends with."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return _verdict(run(*arguments))
    except Exception as error:
        return {"right": 0, "error": f"{type(error).__name__}: {one_line(error)}"}


def _run_torch(model: Any, cases: dict[str, np.ndarray], path: Path, dynamo: bool) -> list[float | None]:
    """PyTorch's exporter, with batch and sequence dynamic."""
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

    def answer(feeds: dict[str, np.ndarray]) -> Any:
        return session.run(["last_hidden_state"], {name: feeds[name] for name in feeds if name in names})[0]

    return _differences(answer, cases)


def _run_openvino(model: Any, cases: dict[str, np.ndarray], batch: int) -> list[float | None]:
    """OpenVINO's converter, traced with one batch size."""
    converted = openvino.convert_model(model, example_input=_inputs(model, batch))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _differences(lambda feeds: compiled(feeds)[0], cases)


def _differences(answer: Callable[[dict[str, np.ndarray]], Any], cases: dict[str, np.ndarray]) -> list[float | None]:
    """Largest difference of each case; None where it crashes, infinite where the shape is another."""
    found: list[float | None] = []
    for i in range(len(CASES)):
        ids, wanted = cases[f"ids_{i}"], cases[f"wanted_{i}"]
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "global_attention_mask": cases[f"marks_{i}"]}
        try:
            output = np.asarray(answer(feeds))
        except Exception:
            found.append(None)
            continue
        found.append(float(np.abs(output - wanted).max()) if output.shape == wanted.shape else math.inf)
    return found


def _run_lfx(model: Any, cases: dict[str, np.ndarray], output: Path) -> list[float | None]:
    with Engine(export(model, output)) as engine:
        found = []
        for i in range(len(CASES)):
            answer = engine.run(cases[f"ids_{i}"], global_attention_mask=cases[f"marks_{i}"])["last_hidden_state"]
            found.append(float(np.abs(np.asarray(answer) - cases[f"wanted_{i}"]).max()))
        return list(found)


def _run_optimum(python: str, model: Any, cases: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder / "checkpoint")
    np.savez(folder / "cases.npz", **cases)
    script = Path(__file__).with_name("peers_optimum.py")
    command = [python, str(script), str(folder / "checkpoint"), str(folder / "cases.npz")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        return {"right": 0, "error": found.stderr.strip().splitlines()[-1]}
    answer = json.loads(found.stdout.splitlines()[-1])
    return {**_verdict(answer["differences"]), "versions": answer["versions"]}


def _verdict(differences: list[float | None]) -> dict[str, Any]:
    known = [d for d in differences if d is not None]
    return {
        "right": sum(d <= TOLERANCE for d in known),
        "crashed": differences.count(None),
        "max_difference": max((d for d in known if math.isfinite(d)), default=None),
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
