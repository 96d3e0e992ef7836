"""`lfx map` in a cluster of two simulated machines, beside `lfx run`: docs/records/ray.jsonl.

    python -m scripts.bench.ray_map                       # about ten minutes
    python -m scripts.bench.ray_map --documents 500 --rounds 1 --output /tmp/ray.jsonl

Ray simulates the machines on this one (ray.cluster_utils): each has two CPUs, so that one, two and four actors fit.
They share this machine's cores, so that more actors than cores are no faster. Documents are pieces of a public text,
20 to 200 characters each. The model is small (4 layers, 128 hidden units), so that the time that Ray adds is a large
part of a document's. Each Engine has one thread.

`lfx run` and the pools take turns in each round. The time of a pool begins when its first actor has opened the model,
and that of `lfx run` when its Engine is open; the start of the first actor is recorded by itself. Documents per second
of a pool are those since all its actors have opened the model. In a last run with two actors one of them is killed
after a third of the documents. The rows of each run are compared with those of `lfx run`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import LongformerConfig, LongformerForSequenceClassification

from lfx.export import export
from lfx.machine import package_versions
from lfx.ray.cluster import PoolSize
from lfx.ray.engine import EngineOptions
from lfx.ray.job import Progress, map_documents
from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.tokenizer import Tokenizer
from scripts import record
from scripts.checkpoints import DOCUMENT, trained_tokenizer

ACTORS = (1, 2, 4)
KILLED_ACTORS = 2
TOLERANCE = 1e-5  # of logits; batches are the same, so that they are usually equal


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the record here instead of docs/records/ray.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as name:
        folder = Path(name)
        bundle, source = make_bundle(folder), write_documents(folder / "documents.jsonl", options.documents)
        with two_machines():
            row = measure(bundle, source, folder, options.rounds)
    record.write(options.output or "ray", [{**record.environment(), **package_versions(["ray"]), **row}])


def make_bundle(folder: Path) -> Path:
    """Export a random classifier of 4 layers, with a tokenizer trained on the documents' text."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 512}
    config = LongformerConfig(vocab_size=4000, attention_window=64, max_position_embeddings=1026, **shape)
    tokenizer = trained_tokenizer(DOCUMENT.read_text(encoding="utf-8"))
    return export(LongformerForSequenceClassification(config).eval(), folder / "bundle", tokenizer=tokenizer)


def write_documents(path: Path, count: int) -> Path:
    """Write pieces of the text of random places and lengths."""
    text, random = DOCUMENT.read_text(encoding="utf-8"), np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            length = int(random.integers(20, 200))
            start = int(random.integers(0, len(text) - length))
            file.write(json.dumps({"id": i, "text": text[start : start + length]}) + "\n")
    return path


@contextmanager
def two_machines() -> Iterator[None]:
    """Start two simulated machines of two CPUs each, and connect to them."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    import ray
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"num_cpus": 2, "num_gpus": 0}
        cluster = Cluster(initialize_head=True, head_node_args={**arguments, "include_dashboard": False})
        cluster.add_node(**arguments)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(bundle: Path, source: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Run `lfx run` and each pool in turns, and then the pool that loses an actor."""
    run_seconds: list[float] = []
    pools: dict[int, list[dict[str, Any]]] = {actors: [] for actors in ACTORS}
    for turn in range(rounds):
        run_seconds.append(run(bundle, source, folder / "run.jsonl"))
        expected = rows_of([folder / "run.jsonl"])
        for actors in ACTORS:
            pools[actors].append(map_once(bundle, source, folder / f"{turn}-{actors}", actors, expected))
    killed = map_once(bundle, source, folder / "killed", KILLED_ACTORS, expected, kill_after=len(expected) // 3)
    ratios = [first["seconds"] / seconds for first, seconds in zip(pools[1], run_seconds, strict=True)]
    return {
        "shape": "4 layers, hidden 128",
        "documents": len(expected),
        "tokens": sum(row.get("tokens", 0) for row in expected.values()),
        "threads": 1,
        "rounds": rounds,
        "machines": 2,
        "run_seconds": run_seconds,
        "pools": [_summary(actors, results) for actors, results in pools.items()],
        "overhead": statistics.median(ratios) - 1,
        "killed": {"actors": KILLED_ACTORS, **killed},
    }


def _summary(actors: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "actors": actors,
        "seconds": [result["seconds"] for result in results],
        "start_seconds": [result["start_seconds"] for result in results],
        "documents_per_second": [result["documents_per_second"] for result in results],
        "same_rows": all(result["same_rows"] for result in results),
        "largest_difference": max(result["largest_difference"] for result in results),
        "timeline": results[0]["timeline"],
    }


def run(bundle: Path, source: Path, output: Path) -> float:
    """Run `lfx run`; returns the seconds from the open Engine to the written output."""
    with Engine(bundle, threads=1) as engine:
        tokenizer = Tokenizer(bundle, engine.signature)
        engine.warm_up([(1, 64)])
        start = time.perf_counter()
        run_documents(engine, tokenizer, source, output)
        return time.perf_counter() - start


def map_once(
    bundle: Path,
    source: Path,
    output: Path,
    actors: int,
    expected: dict[tuple[str, int], Any],
    kill_after: int | None = None,
) -> dict[str, Any]:
    """Run `lfx map`, and compare its rows.

    Args:
        kill_after: an actor is killed after this number of documents.
    """
    timeline: list[tuple[float, int]] = []
    complete: list[tuple[float, int]] = []  # the timeline since all actors have opened the model
    killed: list[float] = []
    begin = time.perf_counter()

    def follow(state: Progress) -> None:
        timeline.append((time.perf_counter(), state.documents))
        if complete or state.actors == actors:
            complete.append(timeline[-1])
        if kill_after is not None and state.documents >= kill_after and not killed:
            killed.append(time.perf_counter())
            _actor_process().kill()

    options = EngineOptions(bundle, threads=1)
    map_documents(source, output, options, PoolSize(actors), file_format="jsonl", progress=follow)
    start = timeline[0][0]
    rows = rows_of(sorted(output.glob("part-*")))
    differences = [_difference(row, expected[key]) for key, row in rows.items() if key in expected]
    largest = max(differences, default=0.0)
    return {
        "seconds": timeline[-1][0] - start,
        "start_seconds": start - begin,
        "documents_per_second": _rate(complete if len(complete) > 1 else timeline),
        "same_rows": rows.keys() == expected.keys() and largest <= TOLERANCE,
        "largest_difference": largest,
        "timeline": [(round(seconds - start, 3), documents) for seconds, documents in timeline],
        **({"killed_at_seconds": round(killed[0] - start, 3)} if killed else {}),
    }


def _rate(timeline: list[tuple[float, int]]) -> float:
    (start, before), (end, after) = timeline[0], timeline[-1]
    return (after - before) / (end - start)


def rows_of(paths: list[Path]) -> dict[tuple[str, int], Any]:
    """The rows of some files, by the file and the number of the document."""
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row.get("file", "documents.jsonl"), row["line"]): row for row in rows}


def _difference(row: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of the logits; infinite if the ids or the numbers of tokens differ."""
    if (row["id"], row["tokens"]) != (other["id"], other["tokens"]):
        return float("inf")
    return float(np.abs(np.subtract(row["outputs"]["logits"], other["outputs"]["logits"])).max())


def _actor_process() -> psutil.Process:
    """The process of one actor of this run. Ray names it for its class, and the system cuts that to 15 characters."""
    processes = psutil.Process().children(recursive=True)
    return next(process for process in processes if process.name().startswith("ray::DocumentAc"))


if __name__ == "__main__":
    main()
