"""The example server: right answers to many at once, bad requests refused, metrics that Prometheus reads."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.runtime import Engine
from lfx.runtime.text import Text
from tests.conftest import MakeBundle

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def address(bundle: MakeBundle) -> Iterator[str]:
    pytest.importorskip("prometheus_client")
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.make_server(bundle("text-classification"), port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def post(address: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{address}/run", body, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_many_at_once_get_their_own_answers(address: str, bundle: MakeBundle) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    texts = [" ".join(words[i % 9 :] + words * (i % 3)) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: post(address, json.dumps({"text": text}).encode()), texts))
    folder = bundle("text-classification")
    with Engine(folder) as engine:
        reader = Text(folder, engine.signature)
        for text, (status, reply) in zip(texts, found, strict=True):
            encoded = reader.encode(text)
            right = reader.answers(encoded, engine.run(encoded.ids))  # type: ignore[arg-type]
            assert status == 200
            assert reply["tokens"] == len(encoded.ids)
            assert [a["label"] for a in reply["answers"]] == [a["label"] for a in right]
            assert np.allclose([a["score"] for a in reply["answers"]], [a["score"] for a in right], atol=1e-5)


@pytest.mark.parametrize("length", ["-1", "abc", "99999999999"])
def test_a_body_of_no_known_or_too_great_a_length_is_refused(address: str, length: str) -> None:
    request = urllib.request.Request(f"{address}/run", b"{}", {"Content-Length": length})
    with pytest.raises(urllib.error.HTTPError, match=r"41[13]"):
        urllib.request.urlopen(request, timeout=20)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"{", b"[]", b"{}", b'{"text": 5}', json.dumps({"text": "fox " * 500}).encode()]
)
def test_bad_requests_are_told_why(address: str, body: bytes) -> None:
    status, reply = post(address, body)
    assert status == 400
    assert reply["error"]


def test_prometheus_can_read_the_metrics(address: str) -> None:
    post(address, b'{"text": "the fox"}')
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    assert next(float(line.split()[1]) for line in lines if line.startswith("lfx_requests_total")) >= 1
