"""Paired CPU benchmark of Hugging Face eager fp32 and lfx in ONNX Runtime, base shape; time and memory of an export.

    python scripts/bench_cpu.py            # writes cpu.jsonl, memory.jsonl and export.jsonl in docs/records

Each row is written when it is measured, and replaces the older row of the same length and globals.

Latency: both contenders run in one process, alternating (A B A B), after a warm-up of each, on the same ids. A MatMul
in ONNX Runtime, of the shape of a feed-forward projection, alternates with them: the model's useful FLOP rate over the
MatMul's is the fraction of the attainable speed.
Memory: the peak resident set of one process per contender and length, with the interpreter and imports. Export: one
process; seconds and memory are read before the validation starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import record
from checkpoints import BASE_MAX_SEQLEN

# Length -> rounds; lengths above 4,096 run on a model with a longer position table.
ROUNDS = {16: 25, 64: 25, 128: 15, 300: 9, 512: 9, 1024: 7, 2048: 5, 4096: 5, 8192: 2, 16384: 2}
LONG_MAX_SEQLEN = 16384
# The base shape; the window is one-sided.
LAYERS, HIDDEN, INTERMEDIATE, WINDOW = 12, 768, 3072, 256
CONTENDERS = ("huggingface-eager", "lfx-onnxruntime")


def main() -> None:
    """Run the benchmarks, or in a child process that they started, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(ROUNDS))
    parser.add_argument("--measures", type=lambda text: text.split(","), default=["latency", "memory"])
    parser.add_argument("--work", type=Path, help="keep checkpoints and bundles in this folder, and reuse those in it")
    parser.add_argument("--child", choices=["export", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "export":
        _export_child(options.bundle)
    elif options.child == "memory":
        _memory_child(options.contender, options.lengths[0], options.bundle, options.threads)
    elif options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        _parent(options.lengths, options.measures, options.threads, options.work)
    else:
        with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
            _parent(options.lengths, options.measures, options.threads, Path(folder))


def _parent(lengths: list[int], measures: list[str], threads: int, work: Path) -> None:
    about = {**record.environment(), "shape": "longformer-base", "dtype": "fp32", "threads": threads, "batch": 1}
    bundles = {size: work / f"base-{size}" for size in (BASE_MAX_SEQLEN, LONG_MAX_SEQLEN)}
    for size in sorted({_table_size(length) for length in lengths}):
        if not bundles[size].exists():
            record.update("export", {**about, **_child("export", bundles[size], max_seqlen=size)}, ("max_seqlen",))
    for length in lengths:
        bundle = bundles[_table_size(length)]
        for contender in CONTENDERS if "memory" in measures else ():
            peak = _child("memory", bundle, length, contender, threads)
            row = {**about, "seqlen": length, "contender": contender, **peak}
            record.update("memory", row, ("seqlen", "contender"))
        for globals_ in (0, 1) if length in (512, 4096) else (1,):
            if "latency" in measures:
                row = {**about, **_latency(bundle, length, globals_, threads)}
                record.update("cpu", row, ("seqlen", "globals"))
                print(length, globals_, f"{row['speedup']:.2f}", row["contenders"], flush=True)


def _table_size(length: int) -> int:
    return BASE_MAX_SEQLEN if length <= BASE_MAX_SEQLEN else LONG_MAX_SEQLEN


def _child(
    measure: str, bundle: Path, length: int = 0, contender: str = "", threads: int = 2, max_seqlen: int = 0
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", measure, "--bundle", str(bundle), "--contender", contender]
    command += ["--lengths", str(length or max_seqlen), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _peak_bytes() -> int:
    # Not getrusage: a child inherits the maximum of its parent.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _export_child(bundle: Path) -> None:
    """Save a checkpoint, load and export it, and print time and memory before and in the validation."""
    size = int(bundle.name.rpartition("-")[2])
    checkpoint = bundle.parent / f"checkpoint-{size}"
    # In another process, so that the memory for making the weights does not count.
    maker = f"from checkpoints import base_model; base_model({size}).save_pretrained({str(checkpoint)!r})"
    subprocess.run([sys.executable, "-c", maker], check=True, cwd=Path(__file__).parent, capture_output=True)
    before_validation: dict[str, float] = {}

    def note(step: str) -> None:
        if step.startswith("comparing") and not before_validation:
            before_validation.update(seconds=time.perf_counter() - started, peak_bytes=_peak_bytes())

    started = time.perf_counter()
    from lfx.export import export
    from lfx.manifest import Manifest

    export(checkpoint, bundle, progress=note)
    total_seconds = time.perf_counter() - started
    manifest = Manifest.read(bundle)
    result = {
        "max_seqlen": size,
        "export_seconds": before_validation["seconds"],
        "export_peak_memory_bytes": before_validation["peak_bytes"],
        "validation_seconds": total_seconds - before_validation["seconds"],
        "bundle_bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "model_sha256": manifest.source["sha256"],
        "max_abs_error": {name: r["max_abs_error"] for name, r in manifest.validation["outputs"].items()},
    }
    print(json.dumps(result))


def _memory_child(contender: str, length: int, bundle: Path, threads: int) -> None:
    run = _contender(contender, bundle, _table_size(length), threads)
    run(*_inputs(length, 1))
    print(json.dumps({"peak_bytes": _peak_bytes()}))


def _inputs(length: int, globals_: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(length).integers(3, 50000, (1, length))
    global_mask = np.zeros_like(ids)
    global_mask[:, :globals_] = 1
    return ids, global_mask


def _contender(name: str, bundle: Path, table_size: int, threads: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    if name == "lfx-onnxruntime":
        from lfx.runtime import Engine

        engine = Engine(bundle, threads=threads)
        return lambda ids, mask: np.asarray(engine.run(ids, global_attention_mask=mask)["last_hidden_state"])
    import torch
    from transformers import LongformerModel, logging

    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = LongformerModel.from_pretrained(bundle.parent / f"checkpoint-{table_size}").eval()

    def run(ids: np.ndarray, global_mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs = model(torch.from_numpy(ids), global_attention_mask=torch.from_numpy(global_mask))
        return np.asarray(outputs.last_hidden_state)

    return run


_LOADED: dict[tuple[str, Path], Callable[[np.ndarray, np.ndarray], Any]] = {}


def _latency(bundle: Path, length: int, globals_: int, threads: int) -> dict[str, Any]:
    contenders = {}
    for name in CONTENDERS:
        key = (name, bundle)
        if key not in _LOADED:
            _LOADED[key] = _contender(name, bundle, _table_size(length), threads)
        contenders[name] = _LOADED[key]
    ids, global_mask = _inputs(length, globals_)
    outputs = {name: run(ids, global_mask) for name, run in contenders.items()}  # the warm-up
    difference = float(np.abs(outputs["lfx-onnxruntime"] - outputs["huggingface-eager"]).max())
    product = _product(length, threads)
    product()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    product_seconds = []
    for _ in range(ROUNDS[length]):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(ids, global_mask)
            seconds[name].append(time.perf_counter() - started)
        product_seconds.append(_repeated(product))
    rate = 2 * length * HIDDEN * INTERMEDIATE / statistics.median(product_seconds)
    ratios = [a / b for a, b in zip(seconds["huggingface-eager"], seconds["lfx-onnxruntime"], strict=True)]
    return {
        "seqlen": length,
        "globals": globals_,
        "rounds": ROUNDS[length],
        "max_difference": difference,
        "speedup": statistics.median(ratios),
        "product_flops_per_second": rate,
        "share_of_product": _useful_flops(length, globals_) / statistics.median(seconds["lfx-onnxruntime"]) / rate,
        "contenders": {name: _summary(times, length) for name, times in seconds.items()},
    }


def _repeated(run: Callable[[], Any], least_s: float = 0.1) -> float:
    """Seconds of one of many runs in a row, with the weight in the cache and the threads awake as inside a model."""
    runs, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < least_s:
        run()
        runs += 1
    return passed / runs


def _product(length: int, threads: int) -> Callable[[], Any]:
    """Return a function that runs one MatMul in ONNX Runtime: (length, hidden) by a weight (hidden, intermediate)."""
    shapes = f"float[{length},{HIDDEN}] x, float[{HIDDEN},{INTERMEDIATE}] w"
    text = f'<ir_version: 10, opset_import: ["" : 17]> g ({shapes}) => (float[{length},{INTERMEDIATE}] y) {{ '
    model = onnx.parser.parse_model(text + "y = MatMul(x, w) }")
    random = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(random.standard_normal((HIDDEN, INTERMEDIATE), dtype=np.float32), "w")
    model.graph.initializer.append(weight)
    del model.graph.input[1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {"x": random.standard_normal((length, HIDDEN), dtype=np.float32)}
    return lambda: session.run(None, feeds)


def _useful_flops(length: int, globals_: int) -> float:
    """Return the FLOP of the linear layers, and of both attention products over the unmasked pairs."""
    linear = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INTERMEDIATE  # multiply-adds per token and layer
    positions = np.arange(length)
    keys = np.minimum(positions, WINDOW) + np.minimum(length - 1 - positions, WINDOW) + 1 + globals_
    return float(2 * LAYERS * (length * linear + 2 * np.minimum(keys, length).sum() * HIDDEN))


def _summary(seconds: list[float], length: int) -> dict[str, float]:
    p5, p95 = np.percentile(seconds, [5, 95])
    median = statistics.median(seconds)
    return {
        "median_ms": 1000 * median,
        "p5_ms": 1000 * float(p5),
        "p95_ms": 1000 * float(p95),
        "tokens_per_second": length / median,
    }


if __name__ == "__main__":
    main()
