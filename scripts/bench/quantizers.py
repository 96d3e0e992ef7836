"""Compare `lfx quantize` (ONNX Runtime's quantizer) with NNCF: base shape, the same text, error and latency.

    pip install nncf
    python -m scripts.bench.quantizers        # docs/records/quantizers.jsonl, ten minutes

Each quantizer calibrates on every second window of the example document; the error against the float32 model is
measured on the others. NNCF runs with the settings of its documentation for transformers, which quantize attention too,
and again with the attention nodes ignored. All weights have 7 bits, since 8 bits overflow on CPUs without VNNI.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from lfx.export import export
from lfx.export.quantize import quantize
from lfx.manifest import MODEL, WEIGHTS
from lfx.runtime import Engine
from lfx.runtime.bench import measure
from lfx.runtime.inputs import prepare
from lfx.runtime.tokenizer import Tokenizer
from scripts import record
from scripts.bench.contenders import Run, engine_run
from scripts.checkpoints import DOCUMENT, save_base_checkpoint

LENGTH, WINDOWS, ROUNDS = 512, 16, 7
# The inliner's names for the nodes of a function body, which are the attention.
ATTENTION = r"n\d+__\d+"


def main() -> None:
    """Quantize, measure error and latency, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    import nncf

    with tempfile.TemporaryDirectory(prefix="lfx-quantizers-") as name:
        folder = Path(name)
        fp32 = export(save_base_checkpoint(folder / "checkpoint"), folder / "fp32")
        float_engine = Engine(fp32, threads=threads)
        windows = text_windows(fp32, float_engine)
        runs = contenders(fp32, float_engine, windows[::2], folder, threads)
        rows = measure(runs, [LENGTH], [1], rounds=ROUNDS, vocab_size=50000)
        about = {**record.environment(), "nncf": nncf.__version__, "shape": "longformer-base", "threads": threads}
        outputs = {name: np.concatenate([run(ids).ravel() for ids in windows[1::2]]) for name, run in runs.items()}
        expected = next(iter(outputs.values()))
        for row in rows:
            actual = outputs[row["contender"]]
            row["cosine"] = float(actual @ expected / np.sqrt((actual @ actual) * (expected @ expected)))
            row["max_abs_error"] = float(np.abs(actual - expected).max())
            figures = f"{row['cosine']:.5f} {row['max_abs_error']:.3f} {row['p50_ms']:.0f} ms"
            print(row["contender"], figures, flush=True)
        record.write("quantizers", [{**about, "windows": len(windows), **row} for row in rows])


def text_windows(bundle: Path, engine: Engine) -> list[np.ndarray]:
    """Return the windows of the example document, each (1, LENGTH) ids."""
    ids = [
        token
        for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
        if line.strip()
        for token in Tokenizer(bundle, engine.signature).encode(line).ids
    ]
    return [np.array([ids[i * LENGTH : (i + 1) * LENGTH]]) for i in range(WINDOWS)]


def contenders(
    fp32: Path, float_engine: Engine, calibration: list[np.ndarray], folder: Path, threads: int
) -> dict[str, Run]:
    """Return the contenders: name -> a function from ids to last_hidden_state; times are relative to the first."""
    import nncf

    text = folder / "windows.jsonl"  # `lfx quantize` calibrates on every second line
    lines = itertools.chain.from_iterable((ids, ids) for ids in calibration)
    text.write_text("".join(json.dumps({"input_ids": ids[0].tolist()}) + "\n" for ids in lines), encoding="utf-8")
    int8 = quantize(fp32, folder / "int8", calibration=text, samples=2 * len(calibration))
    feeds = [prepare(ids, None, None, float_engine.signature)[0] for ids in calibration]
    runs = {
        "float32, ONNX Runtime": engine_run(float_engine),
        "float32, OpenVINO": engine_run(Engine(fp32, "openvino", threads=threads)),
        "lfx quantize, ONNX Runtime": engine_run(Engine(int8, threads=threads)),
        "lfx quantize, OpenVINO": engine_run(Engine(int8, "openvino", threads=threads)),
    }
    for name, scope in (
        ("NNCF", nncf.IgnoredScope()),
        ("NNCF without attention", nncf.IgnoredScope(patterns=[ATTENTION])),
    ):
        model = nncf.quantize(
            inline_local_functions(onnx.load(str(fp32 / MODEL))),
            nncf.Dataset(feeds),
            subset_size=len(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=scope,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
        path = folder / name / MODEL
        path.parent.mkdir()
        onnx.save(model, str(path), save_as_external_data=True, location=WEIGHTS)
        for backend, label in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
            runs[f"{name}, {label}"] = engine_run(Engine(path, backend, threads=threads))
    return runs


if __name__ == "__main__":
    main()
