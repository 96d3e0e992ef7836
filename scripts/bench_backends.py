"""The backends of the CPU beside PyTorch: base shape, in turns, in one process.

    python scripts/bench_backends.py                      # batch 1 and 8: half an hour
    python scripts/bench_backends.py --batch 1 --lengths 512

Writes docs/records/backends.jsonl, a row for each contender, length and batch as soon as it is measured. The int8 model
is calibrated on the example document. A precision that this CPU has no arithmetic for is not measured in lfx, which
refuses it; Hugging Face's bfloat16 runs everywhere.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from checkpoints import DOCUMENT, save_base_checkpoint
from transformers import LongformerModel, logging

from lfx.errors import DependencyError
from lfx.export import export
from lfx.export.quantize import quantize
from lfx.runtime import Engine
from lfx.runtime.bench import Run, measure

LENGTHS = (512, 1024, 2048, 4096)
ROUNDS = {1: 3, 8: 1}  # at batch 8 one run of all contenders takes minutes
EAGER, EAGER_BF16 = "Hugging Face eager fp32", "Hugging Face eager bf16"


def main() -> None:
    """Measure, and write each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=list(ROUNDS))
    parser.add_argument("--skip", action="append", default=[], help="a contender to leave out")
    options = parser.parse_args()
    about = {**record.environment(), "shape": "longformer-base", "threads": options.threads}
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        runs = contenders(Path(folder), options.threads)
        for name in options.skip:
            del runs[name]
        for batch in options.batch:
            for length in options.lengths:
                rounds = ROUNDS.get(batch, 1)
                differences = _differences(runs, length) if batch == 1 else {}
                rows = measure(runs, [length], [batch], rounds=rounds, warm_up=False, vocab_size=50000)
                for row in rows:
                    row["max_difference"] = differences.get(row["contender"])
                    record.update("backends", {**about, **row}, ("batch", "seqlen", "contender"))
                    print(batch, length, row["contender"], f"{row['p50_ms']:.0f} ms", f"{row['times_the_first']:.3f}")


def contenders(folder: Path, threads: int) -> dict[str, Run]:
    """Name -> a run of ids; the first is what the others are compared with."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    checkpoint = save_base_checkpoint(folder / "checkpoint")
    fp32 = export(checkpoint, folder / "fp32")
    int8 = quantize(fp32, folder / "int8", calibration=DOCUMENT)
    runs: dict[str, Run] = {
        EAGER: _torch_run(checkpoint, torch.float32),
        EAGER_BF16: _torch_run(checkpoint, torch.bfloat16),
    }
    for name, bundle, backend, precision in (
        ("ONNX Runtime fp32", fp32, "onnxruntime", None),
        ("ONNX Runtime int8", int8, "onnxruntime", None),
        ("OpenVINO fp32", fp32, "openvino", "fp32"),
        ("OpenVINO bf16", fp32, "openvino", "bf16"),
        ("OpenVINO int8", int8, "openvino", None),
    ):
        try:
            engine = Engine(bundle, backend, precision=precision, threads=threads)
        except DependencyError as error:
            print(f"{name} is not measured: {error}")
            continue
        runs[f"lfx, {name}"] = _engine_run(engine)
    return runs


def _torch_run(checkpoint: Path, dtype: torch.dtype) -> Run:
    model = LongformerModel.from_pretrained(checkpoint, dtype=dtype).eval()

    def run(ids: np.ndarray) -> Any:
        tensor = torch.from_numpy(ids)
        with torch.inference_mode():
            return model(tensor).last_hidden_state.float().numpy()

    return run


def _engine_run(engine: Engine) -> Callable[[np.ndarray], Any]:
    return lambda ids: engine.run(ids)["last_hidden_state"]


def _differences(runs: dict[str, Run], length: int) -> dict[str, float]:
    """Largest difference of each from the first; and their warm-up."""
    ids = np.random.default_rng(length).integers(3, 50000, (1, length))
    found = {name: np.asarray(run(ids)) for name, run in runs.items()}
    return {name: float(np.abs(array - found[EAGER]).max()) for name, array in found.items()}


if __name__ == "__main__":
    main()
