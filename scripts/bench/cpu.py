"""Paired CPU benchmark of Hugging Face eager fp32 and lfx in ONNX Runtime, base shape; time and memory of an export.

    python -m scripts.bench.cpu            # writes cpu.jsonl, memory.jsonl and export.jsonl in docs/records

Each row is written when it is measured, and replaces the older row of the same length and globals.

Latency: both contenders run in one process, alternating (A B A B), after a warm-up of each, on the same ids. A MatMul
in ONNX Runtime, of the shape of a feed-forward projection, alternates with them: the model's useful FLOP rate over the
MatMul's is the fraction of the attainable speed.
Memory: the peak resident set of one process per contender and length, with the interpreter and imports. Export: one
process; seconds and memory are read before the validation starts, and at its end.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from lfx.runtime import Engine
from lfx.runtime.bench import measure, peak_memory_bytes
from scripts import record
from scripts.bench.band_cases import base_model_flops
from scripts.bench.child import run_child
from scripts.bench.contenders import Run, differences, engine_run, huggingface_run, random_ids
from scripts.checkpoints import BASE_MAX_SEQLEN, HIDDEN, INTERMEDIATE

# Length -> rounds; lengths above 4,096 run on a model with a longer position table.
ROUNDS = {16: 25, 64: 25, 128: 15, 300: 9, 512: 9, 1024: 7, 2048: 5, 4096: 5, 8192: 2, 16384: 2}
LONG_MAX_SEQLEN = 16384
CONTENDERS = ("huggingface-eager", "lfx-onnxruntime")
FIGURES = ("p5_ms", "p95_ms", "tokens_per_second")


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
        _memory_child(options.bundle, options.lengths[0], options.contender, options.threads)
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
            measured = run_child("cpu", child="export", bundle=bundles[size])
            record.update("export", {**about, **measured}, ("max_seqlen",))
    for length in lengths:
        bundle = bundles[_table_size(length)]
        for contender in CONTENDERS if "memory" in measures else ():
            peak = run_child("cpu", child="memory", bundle=bundle, lengths=length, contender=contender, threads=threads)
            row = {**about, "seqlen": length, "contender": contender, **peak}
            record.update("memory", row, ("seqlen", "contender"))
        for globals_ in (0, 1) if length in (512, 4096) else (1,):
            if "latency" in measures:
                row = {**about, **_latency(bundle, length, globals_, threads)}
                record.update("cpu", row, ("seqlen", "globals"))
                print(length, globals_, f"{row['speedup']:.2f}", row["contenders"], flush=True)


def _table_size(length: int) -> int:
    return BASE_MAX_SEQLEN if length <= BASE_MAX_SEQLEN else LONG_MAX_SEQLEN


def _export_child(bundle: Path) -> None:
    """Save a checkpoint, load and export it, and print time and memory before and in the validation."""
    size = int(bundle.name.rpartition("-")[2])
    checkpoint = bundle.parent / f"checkpoint-{size}"
    # In another process, so that the memory for making the weights does not count.
    maker = f"from scripts.checkpoints import base_model; base_model({size}).save_pretrained({str(checkpoint)!r})"
    subprocess.run([sys.executable, "-c", maker], check=True, capture_output=True)
    before_validation: dict[str, Any] = {}

    def note(step: str) -> None:
        if step.startswith("comparing") and not before_validation:
            before_validation.update(seconds=time.perf_counter() - started, peak_bytes=peak_memory_bytes())

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
        "validation_peak_memory_bytes": peak_memory_bytes(),
        "bundle_bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "model_sha256": manifest.source["sha256"],
        "max_abs_error": {name: r["max_abs_error"] for name, r in manifest.validation["outputs"].items()},
    }
    print(json.dumps(result))


def _memory_child(bundle: Path, length: int, contender: str, threads: int) -> None:
    _contender(contender, bundle, threads)(random_ids(length), globals_=1)
    print(json.dumps({"peak_bytes": peak_memory_bytes()}))


@functools.cache
def _contender(name: str, bundle: Path, threads: int) -> Run:
    if name == "lfx-onnxruntime":
        return engine_run(Engine(bundle, threads=threads))
    return huggingface_run(bundle.with_name(bundle.name.replace("base", "checkpoint")), threads)


def _latency(bundle: Path, length: int, globals_: int, threads: int) -> dict[str, Any]:
    eager, ours = CONTENDERS
    runs = {name: functools.partial(_contender(name, bundle, threads), globals_=globals_) for name in CONTENDERS}
    max_difference = differences(runs, length)[ours]
    product = _product(length, threads)
    # Many products in a row, with the weight in the cache and the threads awake as inside a model.
    products, _ = timeit.Timer(product).autorange()
    timed = {ours: runs[ours], eager: runs[eager], "products": lambda _: timeit.timeit(product, number=products)}
    results = measure(timed, [length], [1], rounds=ROUNDS[length], warm_up=False, vocab_size=50000)
    rows = {row["contender"]: row for row in results}
    rate = 2 * length * HIDDEN * INTERMEDIATE * products / rows["products"]["p50_ms"] * 1000
    return {
        "seqlen": length,
        "globals": globals_,
        "rounds": ROUNDS[length],
        "max_difference": max_difference,
        "speedup": rows[eager]["times_the_first"],
        "product_flops_per_second": rate,
        "share_of_product": sum(base_model_flops(length, globals_)) / rows[ours]["p50_ms"] * 1000 / rate,
        "contenders": {
            name: {"median_ms": rows[name]["p50_ms"], **{figure: rows[name][figure] for figure in FIGURES}}
            for name in CONTENDERS
        },
    }


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


if __name__ == "__main__":
    main()
