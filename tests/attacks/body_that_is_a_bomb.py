"""A small body becomes large where it is read: compressed zeros, nested brackets, a number of a million digits."""

from __future__ import annotations

import gzip
from pathlib import Path

from tests.attacks import make_bundle
from tests.runtime.serve.running import running

DEPTH = 20_000


def attack(folder: Path) -> str:
    """Each is refused as a wrong body, and the next request is answered."""
    bombs = {
        "gzip": gzip.compress(b'{"inputs": "' + b" " * 100_000_000 + b'"}'),
        "lists": b'{"inputs": ' + b"[" * DEPTH + b"]" * DEPTH + b"}",
        "objects": b'{"inputs": ' + b'{"ids": ' * DEPTH + b"1" + b"}" * DEPTH + b"}",
        "digits": b'{"inputs": {"ids": [' + b"9" * 1_000_000 + b"]}}",
    }
    bundle = make_bundle(folder / "bundle", "text-classification")
    with running({"m": bundle}, max_body_bytes=2_000_000) as server, server.client() as client:
        for name, body in bombs.items():
            headers = {"Content-Encoding": name} if name == "gzip" else {}
            reply = client.post("/run", content=body, headers=headers)
            assert reply.status_code in (400, 413, 415, 422), (name, reply.status_code, reply.text)
            assert len(reply.text) < 1000, (name, reply.text)
        assert client.post("/run", json={"inputs": "the fox"}).status_code == 200
    return str(reply.json()["error"])
