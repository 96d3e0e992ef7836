"""Benchmarks and load tests of an Engine: documents of mixed length, and many threads for minutes.

    python -m scripts.bench.runtime --measures mixed        # docs/records/mixed.jsonl, about ten minutes
    python -m scripts.bench.runtime --measures soak         # docs/records/soak.jsonl, five minutes
    python -m scripts.bench.runtime --measures storm        # docs/records/storm.jsonl, ten minutes

mixed: throughput of documents of log-normal length, 50 to 4,096 tokens, base shape, alternating with documents of one
length and the same number of tokens, so that changes of the machine's speed affect both. Some documents are run again
one by one, and compared.

soak: 16 threads on one Engine of a small model. Each result must be bit-identical to a single thread's; the resident
memory is recorded after each tenth of the time.

storm: 8 threads submit to Batchers over one Engine, while requests are cancelled, Batchers are closed and replaced, and
the process forks. Each request must end: with a single thread's result, cancelled, or refused by a closed Batcher; each
forked child must be refused at once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import LongformerConfig, LongformerModel

from lfx.errors import LfxError, OverloadError
from lfx.export import export
from lfx.parity import pair_tolerance
from lfx.runtime import Batcher, Engine
from scripts import record
from scripts.checkpoints import base_model

DOCUMENTS, PARTS, ONE_BY_ONE = 200, 4, 12


def main() -> None:
    """Run the tests of --measures and write their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", type=lambda text: text.split(","), default=["mixed", "soak", "storm"])
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--threads", type=int, default=2, help="threads of a run, in mixed")
    parser.add_argument("--minutes", type=float, help="duration; default: 5 for soak, 10 for storm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        if "mixed" in options.measures:
            bundle = export(base_model(), Path(folder) / "base")
            record.write("mixed", [{**record.environment(), **mixed(bundle, options.documents, options.threads)}])
        if {"soak", "storm"} & set(options.measures):
            shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 512}
            config = LongformerConfig(vocab_size=1000, attention_window=64, max_position_embeddings=1026, **shape)
            bundle = export(LongformerModel(config).eval(), Path(folder) / "small")
            if "soak" in options.measures:
                record.write("soak", [{**record.environment(), **soak(bundle, options.minutes or 5.0)}])
            if "storm" in options.measures:
                record.write("storm", [{**record.environment(), **storm(bundle, options.minutes or 10.0)}])


def mixed(bundle: Path, count: int, threads: int) -> dict[str, Any]:
    """Measure the throughput of documents of mixed length and of one length."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.3, 0.9, count), 50, 4096).astype(int)
    documents = [random.integers(3, 50000, n) for n in lengths]
    uniform_length = int(lengths.mean())
    seconds = {"mixed": 0.0, "uniform": 0.0}
    tokens = {"mixed": 0, "uniform": 0}
    ratios, results = [], []
    with Engine(bundle, threads=threads) as engine:
        engine.run(documents[0])
        for part in range(PARTS):
            mixed_part = documents[part::PARTS]
            count_uniform = round(sum(map(len, mixed_part)) / uniform_length)
            uniform_part = [random.integers(3, 50000, uniform_length) for _ in range(count_uniform)]
            rates = {}
            for name, batch in (("mixed", mixed_part), ("uniform", uniform_part)):
                start = time.perf_counter()
                outputs = list(engine.stream(batch))
                elapsed = time.perf_counter() - start
                seconds[name] += elapsed
                tokens[name] += sum(map(len, batch))
                rates[name] = sum(map(len, batch)) / elapsed
                if name == "mixed":
                    results += list(zip(mixed_part, outputs, strict=True))
            ratios.append(rates["mixed"] / rates["uniform"])
            print(f"part {part + 1} of {PARTS}: {rates['mixed']:.0f} and {rates['uniform']:.0f} tokens/s", flush=True)
        largest = 0.0
        for ids, outputs in results[:: max(len(results) // ONE_BY_ONE, 1)]:
            single = engine.run(ids)
            for name, array in outputs.items():
                largest = max(largest, float(np.abs(array - single[name][0]).max()))
    return {
        "shape": "longformer-base",
        "dtype": "fp32",
        "threads": threads,
        "documents": count,
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "uniform_length": uniform_length,
        "tokens": tokens,
        "tokens_per_second": {name: tokens[name] / seconds[name] for name in tokens},
        "mixed_over_uniform": float(np.median(ratios)),
        "one_by_one": {"documents": ONE_BY_ONE, "largest_difference": largest},
    }


def soak(bundle: Path, minutes: float, workers: int = 16) -> dict[str, Any]:
    """Run requests in many threads on one Engine, and compare each result with a single thread's."""
    random = np.random.default_rng(0)
    requests = [random.integers(3, 1000, (int(random.integers(1, 4)), n)) for n in (7, 40, 64, 130, 333, 512)]
    failures: list[str] = []
    counts = [0] * workers
    stop = threading.Event()
    with Engine(bundle, threads=1) as engine:
        expected = [engine.run(ids) for ids in requests]

        def work(worker: int) -> None:
            while not stop.is_set():
                index = (counts[worker] + worker) % len(requests)
                try:
                    outputs = engine.run(requests[index])
                    if not all(np.array_equal(outputs[name], expected[index][name]) for name in outputs):
                        failures.append(f"thread {worker}: the result of request {index} differs")
                except Exception as error:
                    failures.append(f"thread {worker}: {error!r}")
                counts[worker] += 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        for thread in threads:
            thread.start()
        resident = []
        for _ in range(10):
            time.sleep(minutes * 6)
            resident.append(psutil.Process().memory_info().rss)
        stop.set()
        for thread in threads:
            thread.join()
    return {
        "shape": "4 layers, hidden 128",
        "threads": workers,
        "minutes": minutes,
        "requests": sum(counts),
        "failures": failures[:20],
        "bit_identical": not failures,
        "resident_bytes": resident,
    }


def storm(bundle: Path, minutes: float, workers: int = 8) -> dict[str, Any]:
    """Submit requests while some are cancelled, Batchers are closed and the process forks; all requests must end."""
    random = np.random.default_rng(0)
    requests = [random.integers(3, 1000, n) for n in (3, 7, 40, 64, 130, 333)]
    counts: Counter[str] = Counter()
    failures: list[str] = []
    stop = threading.Event()
    with Engine(bundle, threads=1) as engine:
        expected = [engine.run(ids) for ids in requests]
        layers = len(engine.signature.attention_windows)
        current = [Batcher(engine, max_delay_ms=1.0)]

        def is_same(actual: Any, reference: Any) -> bool:
            tolerance = pair_tolerance("fp32", layers, float(np.abs(reference).max()))
            return bool(np.abs(actual - reference).max() <= tolerance)

        def work(worker: int) -> None:
            worker_random = np.random.default_rng(worker)
            while not stop.is_set():
                index = int(worker_random.integers(len(requests)))
                try:
                    future = current[0].submit(requests[index])
                    if worker_random.random() < 0.2:
                        future.cancel()
                    outputs = future.result(timeout=120)
                    same = all(is_same(array, expected[index][name]) for name, array in outputs.items())
                    counts["answered" if same else "wrong"] += 1
                except CancelledError:
                    counts["cancelled"] += 1
                except OverloadError:
                    counts["refused by a closed Batcher"] += 1
                except Exception as error:
                    failures.append(f"thread {worker}: {error!r}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        for thread in threads:
            thread.start()
        resident = []
        for _ in range(10):
            end = time.monotonic() + minutes * 6
            while time.monotonic() < end:
                time.sleep(0.5)
                if _child_is_refused(current[0]):
                    counts["forked children refused"] += 1
                else:
                    failures.append("a forked child was not refused")
                old, current[0] = current[0], Batcher(engine, max_delay_ms=1.0)
                old.close()
                counts["closes"] += 1
            resident.append(psutil.Process().memory_info().rss)
        stop.set()
        for thread in threads:
            thread.join(timeout=300)
            if thread.is_alive():
                failures.append("a request never ended")
        current[0].close()
    return {
        "shape": "4 layers, hidden 128",
        "threads": workers,
        "minutes": minutes,
        **{name: counts[name] for name in sorted({*counts, "wrong"})},
        "failures": failures[:20],
        "resident_bytes": resident,
    }


def _child_is_refused(batcher: Batcher) -> bool:
    """Fork, and return whether the Batcher refuses a request in the child, which does not have its threads."""
    child = os.fork()
    if child == 0:
        try:
            batcher.submit([5, 6])
        except LfxError:
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    main()
