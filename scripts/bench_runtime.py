"""What an Engine does in production: documents of mixed length, and many threads for minutes.

    python scripts/bench_runtime.py --measures mixed        # docs/records/mixed.jsonl, about ten minutes
    python scripts/bench_runtime.py --measures soak         # docs/records/soak.jsonl, five minutes

mixed: documents of log-normal length, 50 to 4,096 tokens, base shape; in turns with as many tokens in documents of one
length, so that a machine that slows down slows both. Some are run again one by one, and compared.

soak: 16 threads on one Engine of a small model, each answer compared bit for bit with a single thread's; the resident
memory after each tenth of the time.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
from checkpoints import base_model
from transformers import LongformerConfig, LongformerModel

from lfx.export import export
from lfx.runtime import Engine

DOCUMENTS, PARTS, ONE_BY_ONE = 200, 4, 12


def main() -> None:
    """Run what was asked for; each writes its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", type=lambda text: text.split(","), default=["mixed", "soak"])
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--threads", type=int, default=2, help="of one run, for mixed")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the soak")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        if "mixed" in options.measures:
            bundle = export(base_model(), Path(folder) / "base")
            record.write("mixed", [{**record.environment(), **mixed(bundle, options.documents, options.threads)}])
        if "soak" in options.measures:
            shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 512}
            config = LongformerConfig(vocab_size=1000, attention_window=64, max_position_embeddings=1026, **shape)
            bundle = export(LongformerModel(config).eval(), Path(folder) / "small")
            record.write("soak", [{**record.environment(), **soak(bundle, options.minutes)}])


def mixed(bundle: Path, count: int, threads: int) -> dict[str, Any]:
    """Tokens per second over mixed and over uniform documents."""
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
            mine = documents[part::PARTS]
            total = sum(map(len, mine))
            others = [random.integers(3, 50000, uniform_length) for _ in range(round(total / uniform_length))]
            rates = {}
            for name, batch in (("mixed", mine), ("uniform", others)):
                start = time.perf_counter()
                found = list(engine.stream(batch))
                taken = time.perf_counter() - start
                seconds[name] += taken
                tokens[name] += sum(map(len, batch))
                rates[name] = sum(map(len, batch)) / taken
                if name == "mixed":
                    results += list(zip(mine, found, strict=True))
            ratios.append(rates["mixed"] / rates["uniform"])
            print(f"part {part + 1} of {PARTS}: {rates['mixed']:.0f} and {rates['uniform']:.0f} tokens/s", flush=True)
        largest = 0.0
        for ids, found in results[:: max(len(results) // ONE_BY_ONE, 1)]:
            alone = engine.run(ids)
            for name, array in found.items():
                largest = max(largest, float(np.abs(array - alone[name][0]).max()))
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
    """Many threads on one Engine."""
    random = np.random.default_rng(0)
    requests = [random.integers(3, 1000, (int(random.integers(1, 4)), n)) for n in (7, 40, 64, 130, 333, 512)]
    failures: list[str] = []
    counts = [0] * workers
    stop = threading.Event()
    with Engine(bundle, threads=1) as engine:
        right = [engine.run(ids) for ids in requests]

        def work(worker: int) -> None:
            while not stop.is_set():
                which = (counts[worker] + worker) % len(requests)
                try:
                    found = engine.run(requests[which])
                    if not all(np.array_equal(found[name], right[which][name]) for name in found):
                        failures.append(f"thread {worker}: another answer to request {which}")
                except Exception as error:
                    failures.append(f"thread {worker}: {error!r}")
                counts[worker] += 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        for thread in threads:
            thread.start()
        resident = []
        for _ in range(10):
            time.sleep(minutes * 6)
            resident.append(_resident_bytes())
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


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


if __name__ == "__main__":
    main()
