"""The memory of a server under loads that would fill it without limits."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from lfx.export import export
from tests.models import ONE_LAYER, tiny_model
from tests.runtime.serve.running import WAIT_SECONDS, Command, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of a process's memory"),
]
MB = 1 << 20
VOCAB, TOKENS = 20_000, 128
LIMITS = {"limits.OUTPUT_BYTES": 20 * MB, "service.REPLY_BYTES": 40 * MB, "service.UNREAD_BYTES": 20 * MB}
IDS = {"ids": [0, *range(5, TOKENS + 3), 2]}  # its logits have 10 MB, in base64 13 MB
LOADS = {
    "nothing asked for": {"inputs": [IDS] * 16},
    "base64": {"inputs": IDS, "outputs": ["logits"], "encoding": "base64"},
    "base64 of many": {"inputs": [IDS] * 8, "outputs": ["logits"], "encoding": "base64"},
    "too many numbers": {"inputs": [IDS] * 16, "outputs": ["logits"]},
}
# A batch and its copy, what waits, what replies keep, the reply that is being made as text and as bytes, and the unread
# ones: 20 + 20 + 20 + 10 + 40 + 3 * 13 + 20 + 13, and as much again for the allocators of C and Python.
MOST_BYTES = 2 * 182 * MB


class SmallServer(Command):
    """`lfx serve` with small limits of memory, whose answers take longer than its model."""

    program = (
        "-c",
        "\n".join(
            [
                "import time",
                "from lfx.cli import main",
                "from lfx.runtime.serve import limits, model, service",
                *(f"{name} = {size}" for name, size in LIMITS.items()),
                "model.ServedModel.answers = lambda *_: time.sleep(0.02) or []",
                "main()",
            ]
        ),
    )

    def memory(self, field: str) -> int:
        """VmRSS or VmHWM, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

    def forget_peak(self) -> None:
        """Let VmHWM begin again."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SmallServer]:
    model = tiny_model("fill-mask", vocab_size=VOCAB, **ONE_LAYER)
    bundle = export(model, tmp_path / "mask")
    with SmallServer(bundle, "--token-budget", str(2 * TOKENS)) as started:
        started.wait_for("is ready")
        yield started


def test_requests_of_every_kind_fill_a_bounded_memory(server: SmallServer) -> None:
    with server.client() as client:
        assert client.post("/run", json=LOADS["base64"]).status_code == 200
    before = server.memory("VmRSS")
    server.forget_peak()
    host, port = server.address.removeprefix("http://").split(":")
    statuses: Counter[tuple[str, int]] = Counter()

    def ask(load: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(f"{server.address}/run", json=LOADS[load], timeout=WAIT_SECONDS)
            statuses[load, reply.status_code] += 1

    def send(load: str) -> socket.socket:
        body = json.dumps(LOADS[load]).encode()
        connection = socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
        connection.sendall(b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return connection

    with ThreadPoolExecutor(16) as pool:
        for load in LOADS:
            for _ in range(4):
                send(load).close()
        list(pool.map(ask, itertools.islice(itertools.cycle(LOADS), 64)))
        assert statuses["nothing asked for", 200]
        assert statuses["base64", 200]
        assert statuses["too many numbers", 413]
        with contextlib.ExitStack() as stack:
            for _ in range(48):
                stack.enter_context(send("base64"))  # nobody reads the reply
            list(pool.map(ask, itertools.islice(itertools.cycle(LOADS), 16)))
    assert server.memory("VmHWM") - before < MOST_BYTES, statuses
    with server.client() as client:
        wait_until(lambda: client.post("/run", json=LOADS["base64"]).status_code == 200)
