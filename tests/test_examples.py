"""The example server: correct answers to concurrent requests, bad requests refused, metrics that Prometheus reads."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import struct
import sys
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
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load_example() -> Any:
    """The module examples/serve.py."""
    pytest.importorskip("prometheus_client")
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running(bundle: Path, **options: Any) -> Iterator[Any]:
    """A server that answers."""
    server = load_example().make_server(bundle, port=0, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address_of(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(scope="module")
def address(bundle: MakeBundle) -> Iterator[str]:
    with running(bundle("text-classification")) as server:
        yield address_of(server)


def post(address: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{address}/run", body, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_concurrent_requests_get_their_own_answers(address: str, bundle: MakeBundle) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    texts = [" ".join(words[i % 9 :] + words * (i % 3)) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: post(address, json.dumps({"text": text}).encode()), texts))
    folder = bundle("text-classification")
    with Engine(folder) as engine:
        reader = Tokenizer(folder, engine.signature)
        for text, (status, reply) in zip(texts, replies, strict=True):
            encoded = reader.encode(text)
            expected = Postprocessor(reader).answers(encoded, engine.run(encoded.ids))  # type: ignore[arg-type]
            assert status == 200
            assert reply["tokens"] == len(encoded.ids)
            assert [a["label"] for a in reply["answers"]] == [a["label"] for a in expected]
            assert np.allclose([a["score"] for a in reply["answers"]], [a["score"] for a in expected], atol=1e-5)


@pytest.mark.parametrize("length", ["-1", "abc", "99999999999", "9" * 5000])
def test_a_body_of_no_known_or_too_great_a_length_is_refused(address: str, length: str) -> None:
    request = urllib.request.Request(f"{address}/run", b"{}", {"Content-Length": length})
    with pytest.raises(urllib.error.HTTPError, match=r"41[13]"):
        urllib.request.urlopen(request, timeout=20)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 3000,
        b"{",
        b"[]",
        b"{}",
        b"",
        b'{"text": 5}',
        b'{"text": "fox", "text": "dog"}',
        json.dumps({"text": "fox " * 500}).encode(),
    ],
)
def test_bad_requests_get_the_reason(address: str, body: bytes) -> None:
    status, reply = post(address, body)
    assert status == 400
    assert reply["error"]


def test_a_body_larger_than_any_text_of_the_model_is_refused_unread(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load_example()
    largest = 128 * example.BYTES_PER_TOKEN + example.OTHER_BYTES  # 128 tokens are the tiny model's longest sequence
    assert post(address, b" " * (largest - 16) + b'{"text": "fox" }')[0] == 200
    monkeypatch.setattr(Tokenizer, "encode", None)
    for size in (largest + 1, 3_800_000):
        status, reply = post(address, b" " * size)
        assert status == 413
        assert f"above {largest:,} bytes" in reply["error"]


def test_requests_above_max_requests_get_503_and_retry_after(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    encode = Tokenizer.encode

    def waiting(reader: Tokenizer, *arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(60)
        return encode(reader, *arguments)

    monkeypatch.setattr(Tokenizer, "encode", waiting)
    with running(bundle("text-classification"), max_requests=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, address_of(server), b'{"text": "the fox"}')
        assert entered.wait(60)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address_of(server)}/run", b'{"text": "the fox"}', timeout=60)
        assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "1")
        go_on.set()
        assert first.result()[0] == 200
        assert post(address_of(server), b'{"text": "the fox"}')[0] == 200


def test_texts_are_tokenized_one_at_a_time(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threading.Lock()
    encode = Tokenizer.encode

    def alone(reader: Tokenizer, *arguments: Any) -> Any:
        assert busy.acquire(blocking=False)
        try:
            return encode(reader, *arguments)
        finally:
            busy.release()

    monkeypatch.setattr(Tokenizer, "encode", alone)
    with running(bundle("text-classification")) as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: post(address_of(server), b'{"text": "the quick fox"}'), range(40)))
    assert {status for status, _ in replies} == {200}


@pytest.mark.parametrize("sent", [b"", b"POST /run HT", b"POST /run HTTP/1.0\r\nContent-Length: 50\r\n\r\n{"])
def test_a_client_that_stops_sending_is_disconnected(
    sent: bytes, bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        running(bundle("text-classification"), client_seconds=0.3) as server,
        socket.create_connection(server.server_address, timeout=60) as client,
    ):
        client.sendall(sent)
        reply = b"".join(iter(lambda: client.recv(4096), b""))  # ends when the server closes
        assert reply == b"" or b" 400 " in reply or b" 408 " in reply
    assert "Traceback" not in capsys.readouterr().err


def test_a_client_that_sends_byte_by_byte_is_disconnected(bundle: MakeBundle) -> None:
    with (
        running(bundle("text-classification"), client_seconds=0.5) as server,
        socket.create_connection(server.server_address, timeout=60) as client,
    ):
        client.sendall(b"POST /run HTTP/1.0\r\nContent-Length: 2000\r\n\r\n")
        ended = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not ended.wait(0.1):  # each byte comes well within the timeout of one read
                    client.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):
                pass
        ended.set()
        thread.join()


def test_a_client_that_breaks_the_connection_prints_no_traceback(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entered, broken, ended = threading.Event(), threading.Event(), threading.Event()
    encode = Tokenizer.encode

    def waiting(reader: Tokenizer, *arguments: Any) -> Any:
        entered.set()
        assert broken.wait(60)
        return encode(reader, *arguments)

    monkeypatch.setattr(Tokenizer, "encode", waiting)
    with running(bundle("text-classification")) as server:
        shutdown, failures = server.shutdown_request, []
        handle_error = server.handle_error

        def noted(request: Any, client: Any) -> None:
            failures.append(sys.exc_info()[0])
            handle_error(request, client)

        def closed(request: Any) -> None:
            shutdown(request)
            ended.set()

        server.handle_error, server.shutdown_request = noted, closed
        client = socket.create_connection(server.server_address, timeout=60)
        client.sendall(b'POST /run HTTP/1.0\r\nContent-Length: 19\r\n\r\n{"text": "the fox"}')
        assert entered.wait(60)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # sends a reset
        broken.set()
        assert ended.wait(60)
    assert len(failures) == 1
    assert issubclass(failures[0], ConnectionError)
    assert capsys.readouterr().err == ""


def test_prometheus_can_read_the_metrics(address: str) -> None:
    post(address, b'{"text": "the fox"}')
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    assert next(float(line.split()[1]) for line in lines if line.startswith("lfx_requests_total")) >= 1
