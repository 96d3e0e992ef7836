"""Load test of `lfx serve` with concurrent clients, compared with `Engine.run` alone on the same documents.

    python -m scripts.bench.serve                                     # docs/records/serve.jsonl, about eight minutes
    python -m scripts.bench.serve --clients 20 --seconds 5 --documents 40 --output /tmp/serve.jsonl

The server is one process, and the clients share another. Each client has one connection, and sends its next request
when the previous one is answered. The documents are slices of the constitution, of log-normal length; the model is a
small random classifier. `Engine.run` gets all documents in one list, which it can batch best. It runs before and after
the clients, so that changes of the machine's speed affect both. Each answer is compared with that of `Engine.run` on
the document alone. The clients use the CPU too; their share of its time is in the record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from scripts import record

# Starts a server, runs the clients, and stops the server, as `load` does.
Load = Callable[[Path, list[str], list[Any], list[int], int, float, int], dict[str, Any]]
CLIENTS = (1, 8, 32, 200)
SHAPE = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 1536}  # of MiniLM
MAX_SEQLEN, DOCUMENTS = 1024, 256


def main() -> None:
    """Measure each number of clients, and write the records."""
    run(str(__doc__), "serve", CLIENTS, load)


def run(description: str, name: str, clients: tuple[int, ...], load_server: Load) -> None:
    """Run the command line of a load test, and write docs/records/NAME.jsonl."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=list(clients))
    parser.add_argument("--seconds", type=float, default=60.0, help="duration for each number of clients")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the Engine")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="number of different documents")
    parser.add_argument("--output", type=Path, help=f"default: docs/records/{name}.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        bundle, texts = make(Path(folder) / "small", options.documents)
        rows = []
        for count in options.clients:
            row = measure(bundle, texts, count, options.seconds, options.threads, load_server)
            rows.append({**record.environment(), **row})
            print(json.dumps(row), flush=True)
    record.write(options.output or name, rows)


def make(folder: Path, documents: int) -> tuple[Path, list[str]]:
    """Export the model, and cut the documents."""
    import torch
    from transformers import LongformerConfig, LongformerForSequenceClassification

    from lfx.export import export
    from scripts.checkpoints import DOCUMENT, trained_tokenizer

    text = DOCUMENT.read_text(encoding="utf-8")
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=4000, attention_window=128, max_position_embeddings=MAX_SEQLEN + 2, type_vocab_size=1, **SHAPE
    )
    bundle = export(LongformerForSequenceClassification(config).eval(), folder, tokenizer=trained_tokenizer(text))
    random, words = np.random.default_rng(0), text.split()
    lengths = np.clip(random.lognormal(5.0, 0.8, documents), 20, 700).astype(int)  # words
    starts = random.integers(0, len(words) - lengths)
    texts = [" ".join(words[start : start + n]) for start, n in zip(starts, lengths, strict=True)]
    return bundle, texts


def measure(
    bundle: Path, texts: list[str], clients: int, seconds: float, threads: int, load_server: Load
) -> dict[str, Any]:
    """Run `clients` for `seconds`, with `Engine.run` before and after them."""
    from lfx.runtime import Engine
    from lfx.runtime.tokenizer import Tokenizer

    with Engine(bundle, threads=threads) as engine:
        reader = Tokenizer(bundle, engine.signature)
        ids = [reader.encode(text).ids for text in texts]
        expected = [np.asarray(engine.run(row)["logits"])[0].tolist() for row in ids]
        tokens = [len(row) for row in ids]
        before, cpu_before = engine_rate(engine, ids, seconds / 3)
        under_load = load_server(bundle, texts, expected, tokens, clients, seconds, threads)
        after, cpu_after = engine_rate(engine, ids, seconds / 3)
    engine_alone = (before + after) / 2
    return {
        "shape": "6 layers, hidden 384, window 64",
        "threads": threads,
        "clients": clients,
        "seconds": seconds,
        "documents": len(texts),
        "shortest": min(tokens),
        "longest": max(tokens),
        "engine_tokens_per_second": {"before": before, "after": after},
        "engine_tokens_per_cpu_second": (cpu_before + cpu_after) / 2,
        "share_of_engine": under_load["tokens_per_second"] / engine_alone,
        **under_load,
    }


def engine_rate(engine: Any, ids: list[list[int]], seconds: float) -> tuple[float, float]:
    """Tokens per second of `Engine.run` on all documents, and tokens per second of CPU time."""
    engine.run(ids)
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        engine.run(ids)
        count += 1
    tokens = count * sum(map(len, ids))
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu)


def load(
    bundle: Path, texts: list[str], expected: list[Any], tokens: list[int], clients: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Start a server, run the clients for `seconds`, and stop the server; returns what was measured."""
    command = [sys.executable, "-m", "lfx.cli", "serve", str(bundle), "--port", "0", "--threads", str(threads)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        port = 0
        for line in server.stderr:
            if match := re.search(r":(\d+) is ready", line):
                port = int(match[1])
                break
        requests = [_request(text) for text in texts]
        measured = load_process(server.pid, port, requests, _logits, expected, tokens, clients, seconds)
    finally:
        server.terminate()
        server.wait()
    return {**measured, "exit_status": server.returncode}


def _request(text: str) -> bytes:
    body = json.dumps({"inputs": text, "outputs": ["logits"]}).encode()
    return f"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _logits(body: bytes) -> list[float]:
    logits: list[float] = json.loads(body)["results"][0]["outputs"]["logits"]
    return logits


def load_process(
    pid: int,
    port: int,
    requests: list[bytes],
    read: Callable[[bytes], list[float]],
    expected: list[Any],
    tokens: list[int],
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    """Run the clients of a server for `seconds`; returns what was measured.

    Args:
        pid: of the server; the memory and the CPU time of its child processes count too.
        requests: an HTTP request for each document.
        read: reads the logits from the body of a reply; a function of a module.
        expected, tokens: the logits and the number of tokens of each document.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    client_process = context.Process(
        target=run_clients, args=(sender, port, requests, read, expected, clients, seconds)
    )
    cpu_before = _usage(pid)[0]
    client_process.start()
    resident = []
    for _ in range(10):
        time.sleep(seconds / 10)
        resident.append(_usage(pid)[1])
    counts = receiver.recv()
    client_process.join()
    server_cpu = _usage(pid)[0] - cpu_before
    latencies = sorted(latency for _, latency in counts["answers"])
    answered = sum(tokens[index] for index, _ in counts["answers"])
    return {
        "answered": len(latencies),
        "tokens_per_second": answered / counts["elapsed"],
        "tokens_per_cpu_second": answered / server_cpu,
        "latency_ms": {
            name: float(np.percentile(latencies, share)) * 1000
            for name, share in (("p50", 50), ("p95", 95), ("p99", 99))
        },
        "statuses": counts["statuses"],
        "broken_connections": counts["broken"],
        "largest_difference": counts["largest_difference"],
        "resident_bytes": resident,
        "client_share_of_cpu": counts["cpu"] / (counts["cpu"] + server_cpu),
    }


def _usage(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process and its children."""
    parent = psutil.Process(pid)
    processes = [parent, *parent.children(recursive=True)]
    seconds = sum(sum(process.cpu_times()[:2]) for process in processes)
    return seconds, sum(process.memory_info().rss for process in processes)


def run_clients(
    sender: Any,
    port: int,
    requests: list[bytes],
    read: Callable[[bytes], list[float]],
    expected: list[Any],
    clients: int,
    seconds: float,
) -> None:
    """Run all clients in one event loop, in a child process, and send what they measured to the parent."""
    sender.send(asyncio.run(_run_clients(port, requests, read, expected, clients, seconds)))


async def _run_clients(
    port: int,
    requests: list[bytes],
    read: Callable[[bytes], list[float]],
    expected: list[Any],
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    answers: list[tuple[int, float]] = []
    statuses: Counter[str] = Counter()
    seen: dict[str, float] = {"broken": 0, "difference": 0.0}
    start = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        index = number * 7
        while time.perf_counter() - start < seconds:
            index = (index + 1) % len(requests)
            sent = time.perf_counter()
            writer.write(requests[index])
            try:
                status, body = await _reply(reader)
            except (OSError, asyncio.IncompleteReadError):
                seen["broken"] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
                continue
            statuses[status] += 1
            if status == "200":
                answers.append((index, time.perf_counter() - sent))
                difference = max(abs(a - b) for a, b in zip(read(body), expected[index], strict=True))
                seen["difference"] = max(seen["difference"], difference)
            else:
                await asyncio.sleep(1)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return {
        "answers": answers,
        "statuses": dict(statuses),
        "broken": int(seen["broken"]),
        "largest_difference": seen["difference"],
        "elapsed": time.perf_counter() - start,
        "cpu": sum(psutil.Process().cpu_times()[:2]),
    }


async def _reply(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = int(re.findall(r"content-length: (\d+)", head, re.IGNORECASE)[0])
    return head.split(" ", 2)[1], await reader.readexactly(length)


if __name__ == "__main__":
    main()
