"""Paired CPU benchmark of lfx's kernels, the function bodies, and Hugging Face eager fp32, base shape, fp32 and int8.

    python -m scripts.bench.kernels                # writes docs/records/kernels.jsonl
    python -m scripts.bench.kernels --lengths 64,300 --layers 2 --rounds 2 --output /tmp/kernels.jsonl    # a dry run

Latency: all contenders run in one process, alternating, after a warm-up of each, on the same ids with one global token.
Attention: the time of its nodes in the fastest of five profiled runs of ONNX Runtime.
Memory: the peak resident set of one process per contender and length, with the interpreter and imports; and the peak
before the run, with the model open. Their difference is the memory of the activations, except for the pages of the file
of weights that are read for the first time.
Each row is written when it is measured, and replaces the older row of the same length and contender.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lfx.export import export
from lfx.export.quantize import quantize
from lfx.runtime import Engine
from lfx.runtime.bench import measure, peak_memory_bytes
from scripts import record
from scripts.bench.backends import is_attention, onnxruntime_counters
from scripts.bench.child import run_child
from scripts.bench.contenders import Run, engine_run, huggingface_run, random_ids
from scripts.checkpoints import DOCUMENT, LAYERS, base_model, trained_tokenizer

# Length -> rounds.
ROUNDS = {512: 9, 1024: 7, 2048: 5, 4096: 5, 8192: 2, 16384: 2}
MAX_SEQLEN = max(ROUNDS)
EAGER = "huggingface-eager"
# Contender -> bundle and kernels.
OURS = {
    f"{precision}-{kernels}": (precision, kernels)
    for precision in ("fp32", "int8")
    for kernels in ("function", "fused")
}
FIGURES = ("p50_ms", "p5_ms", "p95_ms", "tokens_per_second")


def main() -> None:
    """Run the benchmark, or in a child process that it started, measure the memory of one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(ROUNDS))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, help="rounds at each length  [default: 9 to 2]")
    parser.add_argument("--output", type=Path, default=record.RECORDS / "kernels.jsonl")
    parser.add_argument("--work", type=Path, help="keep checkpoint and bundles in this folder, and reuse those in it")
    parser.add_argument("--child", metavar="CONTENDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = _contender(options.child, options.work, options.threads)
        opened = peak_memory_bytes()
        run(random_ids(options.lengths[0]), globals_=1)
        print(json.dumps({"open_memory_bytes": opened, "peak_memory_bytes": peak_memory_bytes()}))
    elif options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        _parent(options, options.work)
    else:
        with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
            _parent(options, Path(folder))


def _parent(options: argparse.Namespace, work: Path) -> None:
    _make_models(work, options.layers)
    about = {
        **record.environment(),
        "shape": "longformer-base",
        "layers": options.layers,
        "threads": options.threads,
        "batch": 1,
        "globals": 1,
    }
    for length in options.lengths:
        memory = {"work": work, "lengths": length, "threads": options.threads}
        peaks = {name: run_child("kernels", child=name, **memory) for name in (EAGER, *OURS)}
        rounds = options.rounds or ROUNDS.get(length, 5)
        rows = _latency(work, length, rounds, options.threads)
        for name, row in rows.items():
            seconds = _attention_seconds(name, work, length, options.threads) if name in OURS else None
            figures = {"rounds": rounds, "attention_ms": seconds and seconds * 1000, **peaks[name]}
            _write(options.output, {**about, "seqlen": length, "contender": name, **row, **figures})
            attention = f", attention {seconds * 1000:.0f} ms" if seconds else ""
            gigabytes = peaks[name]["peak_memory_bytes"] / 1e9
            print(length, name, f"{row['p50_ms']:.0f} ms{attention}, {gigabytes:.2f} GB", flush=True)


def _make_models(work: Path, layers: int) -> None:
    """Save the checkpoint, export it and quantize the bundle, unless they are there."""
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        base_model(MAX_SEQLEN, num_hidden_layers=layers).save_pretrained(checkpoint)
        trained_tokenizer(DOCUMENT.read_text(encoding="utf-8")).save_pretrained(checkpoint)
    if not (work / "fp32").exists():
        export(checkpoint, work / "fp32")
    if not (work / "int8").exists():
        quantize(work / "fp32", work / "int8", calibration=DOCUMENT)


@functools.cache
def _contender(name: str, work: Path, threads: int) -> Run:
    if name == EAGER:
        return huggingface_run(work / "checkpoint", threads)
    precision, kernels = OURS[name]
    return engine_run(Engine(work / precision, threads=threads, kernels=kernels))


def _latency(work: Path, length: int, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each contender, with its largest difference from Hugging Face's output."""
    runs = {name: functools.partial(_contender(name, work, threads), globals_=1) for name in (EAGER, *OURS)}
    outputs = {name: run(random_ids(length)) for name, run in runs.items()}  # the warm-up
    results = measure(runs, [length], [1], rounds=rounds, warm_up=False, vocab_size=50000)
    rows = {row["contender"]: row for row in results}
    return {
        name: {
            **{figure: rows[name][figure] for figure in FIGURES},
            "max_difference": float(np.abs(outputs[name] - outputs[EAGER]).max()),
        }
        for name in runs
    }


def _attention_seconds(name: str, work: Path, length: int, threads: int) -> float:
    precision, kernels = OURS[name]
    ids = random_ids(length)
    mask = np.ones_like(ids)
    feeds = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": mask * (np.arange(length) < 1)}
    runs = onnxruntime_counters(work / precision, feeds, threads, kernels)
    fastest = min(runs, key=lambda nodes: sum(seconds for _, _, seconds in nodes))
    return sum(seconds for node, operator, seconds in fastest if is_attention(node, operator))


def _write(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file, in place of that of the same length and contender."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    key = ("seqlen", "contender")
    kept = [other for other in rows if any(other[k] != row[k] for k in key)]
    record.write(path, sorted([*kept, row], key=lambda item: (item["seqlen"], (EAGER, *OURS).index(item["contender"]))))


if __name__ == "__main__":
    main()
