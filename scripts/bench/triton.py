"""Load test of NVIDIA's Triton with an lfx model, compared with `Engine.run` alone on the same documents.

    python -m scripts.bench.triton                                    # docs/records/triton.jsonl, about four minutes
    python -m scripts.bench.triton --clients 20 --seconds 5 --documents 40 --output /tmp/triton.jsonl

Model, documents, clients and measurements are those of `scripts.bench.serve`. `lfx triton` writes the repository, and
the tests' tritonserver serves it over HTTP, with one instance in its Python backend. Each document is a request of its
own, a text. Memory and CPU time are those of the server and of the process of its instance.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lfx.runtime.triton.repository import Settings, write_model
from scripts.bench.serve import load_process, run
from tests.runtime.triton.running import running

CLIENTS = (8, 200)
NAME = "small"


def main() -> None:
    """Measure each number of clients, and write the records."""
    run(str(__doc__), "triton", CLIENTS, load)


def load(
    bundle: Path, texts: list[str], expected: list[Any], tokens: list[int], clients: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Start a server, run the clients for `seconds`, and stop the server; returns what was measured."""
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        repository = Path(folder) / "models"
        write_model(bundle, repository, Settings(name=NAME, threads=threads))
        with running(repository) as server:
            requests = [_request(text) for text in texts]
            port = server.ports["http"]
            measured = load_process(server.process.pid, port, requests, _logits, expected, tokens, clients, seconds)
            sequences, batches = (_counter(server.metrics(), f"lfx_{name}_total") for name in ("sequences", "batches"))
    return {**measured, "sequences": sequences, "batches": batches}


def _request(text: str) -> bytes:
    data = text.encode()
    item = {"name": "text", "shape": [1, len(data)], "datatype": "UINT8"}
    item["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps({"inputs": [item], "outputs": [{"name": "logits"}]}).encode()
    lines = [
        f"POST /v2/models/{NAME}/infer HTTP/1.1",
        "Host: a",
        f"Inference-Header-Content-Length: {len(header)}",
        f"Content-Length: {len(header) + len(data)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + header + data


def _logits(body: bytes) -> list[float]:
    logits: list[float] = json.loads(body)["outputs"][0]["data"]
    return logits


def _counter(metrics: dict[str, float], name: str) -> int:
    return int(sum(value for labels, value in metrics.items() if labels.startswith(name)))


if __name__ == "__main__":
    main()
