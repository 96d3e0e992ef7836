"""Limits: key, size, number and time of requests, slow clients, clients that have gone."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lfx.errors import InputError
from lfx.runtime.batcher import Batcher
from lfx.runtime.engine import Engine
from lfx.runtime.serve import body, limits, native, openai, service, tei
from lfx.runtime.serve.model import ServedModel
from lfx.runtime.serve.server import OTHER_FILES
from lfx.runtime.serve.settings import MAX_HEADER_BYTES, Settings
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle
from tests.runtime.serve.running import WAIT_SECONDS, Running, running, wait_until

BODY = b'{"inputs":"the fox"}'
REQUEST = b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.fixture
def model(bundle: MakeBundle) -> dict[str, Path]:
    return {"cls": bundle("text-classification")}


@contextlib.contextmanager
def connected(server: Running, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection that has sent something."""
    with socket.create_connection(server.socket_address, timeout=WAIT_SECONDS) as connection:
        connection.sendall(sent)
        yield connection


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


class Held:
    """A function that waits until it is let go; by default Tokenizer.encode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any = Tokenizer, name: str = "encode") -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        function = getattr(owner, name)

        def waiting(*arguments: Any, **options: Any) -> Any:
            self.entered.set()
            assert self.go_on.wait(WAIT_SECONDS)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, waiting)


def run(server: Running) -> httpx.Response:
    with server.client() as client:
        return client.post("/run", content=BODY)


def test_a_key_is_required_where_texts_and_models_are(model: dict[str, Path]) -> None:
    with running(model, api_key="s\u00e9same") as server, server.client() as client:
        right = {"Authorization": "Bearer s\u00e9same".encode()}
        for path in ("/", "/health", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "Basic s"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/models", "/v1/models", "/info", "/nope"):
                refused = client.get(path, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            refused = client.post("/v1/embeddings", headers=headers, content=b" " * 10_000_000)
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/run", headers=right, content=BODY).status_code == 200
        assert "HTTPBearer" in client.get("/openapi.json").json()["components"]["securitySchemes"]


@pytest.mark.parametrize(("path", "kind"), [("/run", None), ("/predict", "Overloaded"), ("/v1/embeddings", None)])
def test_texts_above_max_pending_get_429_and_retry_after(
    path: str, kind: str | None, model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with running(model, max_pending=1) as server, ThreadPoolExecutor(1) as pool, server.client() as client:
        first = pool.submit(run, server)
        assert held.entered.wait(WAIT_SECONDS)
        refused = client.post(path, content=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "1 texts are in progress; try again later" in refused.text
        assert refused.json().get("error_type") == kind
        assert client.get("/health").status_code == 200
        held.go_on.set()
        assert first.result().status_code == 200
        assert run(server).status_code == 200


def test_bodies_above_the_memory_for_them_get_429(model: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BODY_BYTES", 3000)
    with running(model) as server, connected(server) as other:
        other.sendall(b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n" + b" " * 1900)
        wait_until(lambda: server.server.service.body_memory.held == 1900)
        with server.client() as client:
            assert client.post("/run", content=b" " * 1500 + BODY).status_code == 429
            assert client.post("/run", content=BODY).status_code == 200
    assert server.server.service.body_memory.held == 0


def test_texts_are_tokenized_one_at_a_time(model: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threading.Lock()
    encode = Tokenizer.encode

    def alone(reader: Tokenizer, *arguments: Any, **options: Any) -> Any:
        assert busy.acquire(blocking=False)
        try:
            return encode(reader, *arguments, **options)
        finally:
            busy.release()

    monkeypatch.setattr(Tokenizer, "encode", alone)
    with running(model) as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: run(server), range(40)))
    assert {reply.status_code for reply in replies} == {200}


def test_the_outputs_of_an_input_are_freed_when_its_answer_is_made(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 32 long texts may have 26 GB."""
    made: list[weakref.ref[Any]] = []
    kept: list[int] = []
    run_together = Engine.run_together

    def alone(engine: Engine, *arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 5
        while alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        kept.append(alive())
        results = run_together(engine, *arguments, **options)
        made.extend(weakref.ref(result["logits"]) for result in results)
        return results

    def alive() -> int:
        return sum(output() is not None for output in made)

    monkeypatch.setattr(Engine, "run_together", alone)
    with running(model, token_budget=1) as server, server.client() as client:
        assert len(client.post("/run", json={"inputs": ["the fox"] * 4}).json()["results"]) == 4
        assert kept == [0] * 4
        wait_until(lambda: not alive())


@pytest.mark.parametrize("end", ["refused", "gone", "late"])
def test_a_request_that_ends_without_its_answers_keeps_no_outputs(
    end: str, model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a refused text may have 800 MB, and Python may not collect cycles for hundreds of requests."""
    made: list[weakref.ref[Any]] = []
    run_together = Engine.run_together
    computing, ended = threading.Event(), threading.Event()

    def noted(engine: Engine, *arguments: Any, **options: Any) -> Any:
        computing.set()
        assert end == "refused" or ended.wait(WAIT_SECONDS)
        results = run_together(engine, *arguments, **options)
        made.extend(weakref.ref(result["logits"]) for result in results)
        return results

    def refused(_: ServedModel, prepared: Any, outputs: Any) -> Any:
        try:
            raise KeyError
        except KeyError as error:
            raise InputError("no answer") from error

    monkeypatch.setattr(Engine, "run_together", noted)
    monkeypatch.setattr(ServedModel, "answers", refused)
    with running(model, answer_seconds=0.3 if end == "late" else WAIT_SECONDS) as server:
        gc.collect()
        gc.disable()
        try:
            if end == "gone":
                with connected(server, REQUEST):
                    assert computing.wait(WAIT_SECONDS)
                wait_until(lambda: server.server.service.in_progress == 0)
            else:
                with server.client() as client:
                    for _ in range(10):
                        reply = client.post("/run", json={"inputs": ["the fox"] * 4})
                        assert reply.status_code == {"refused": 422, "late": 503}[end]
            ended.set()
            wait_until(lambda: bool(made) and all(output() is None for output in made))
        finally:
            gc.enable()


def test_outputs_that_wait_for_a_busy_thread_are_freed_when_their_clients_go(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    run_together = Engine.run_together

    def noted(engine: Engine, *arguments: Any, **options: Any) -> Any:
        results = run_together(engine, *arguments, **options)
        made.extend(weakref.ref(result["logits"]) for result in results)
        return results

    monkeypatch.setattr(Engine, "run_together", noted)
    held = Held(monkeypatch, ServedModel, "answers")
    with running(model) as server, ThreadPoolExecutor(1) as pool:
        gc.collect()
        gc.disable()
        try:
            first = pool.submit(run, server)
            assert held.entered.wait(WAIT_SECONDS)
            with contextlib.ExitStack() as stack:
                for _ in range(5):
                    stack.enter_context(connected(server, REQUEST))
                wait_until(lambda: len(made) == 6)
                wait_until(lambda: server.server.service._answering._work_queue.qsize() == 5)
            wait_until(lambda: [output() is not None for output in made] == [True] + [False] * 5)
        finally:
            gc.enable()
            held.go_on.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("step", ["read", "made"])
def test_the_time_for_an_answer_covers_every_step(
    step: str, model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = {"read": (body, "parse_json"), "made": (native, "json_reply")}[step]
    held = Held(monkeypatch, module, name)
    with running(model, answer_seconds=0.3) as server, server.client() as client:
        late = client.post("/run", content=BODY + b" " * 40_000)
        held.go_on.set()
        assert late.status_code == 503
        assert "not answered within 0.3 s" in late.json()["error"]
        wait_until(lambda: run(server).status_code == 200)


@pytest.mark.parametrize(
    ("module", "path", "options"),
    [
        (native, "/run", {"inputs": "the fox", "outputs": ["sentence_embedding"]}),
        (tei, "/embed", {"inputs": "the fox"}),
        (openai, "/v1/embeddings", {"input": "the fox"}),
    ],
    ids=["native", "tei", "openai"],
)
def test_a_request_counts_until_its_reply_is_made(
    module: Any, path: str, options: dict[str, Any], bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, module, "json_reply")
    with running({"emb": bundle("sentence-embedding")}, max_pending=1) as server, ThreadPoolExecutor(1) as pool:
        with server.client() as client:
            first = pool.submit(client.post, path, json=options)
            assert held.entered.wait(WAIT_SECONDS)
            assert server.server.service.reply_memory.held == 32 * 4
            assert run(server).status_code == 429
            held.go_on.set()
            assert first.result().status_code == 200
        assert (server.server.service.in_progress, server.server.service.reply_memory.held) == (0, 0)


def test_small_replies_do_not_wait_for_large_ones(model: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []  # for each reply, whether it is a large one
    entered, go_on = threading.Event(), threading.Event()
    json_reply = native.json_reply

    def noted(value: Any) -> Any:
        made.append(bool(value["results"][0]["outputs"]))
        entered.set()
        assert go_on.wait(WAIT_SECONDS)
        return json_reply(value)

    with running(model) as server, server.client() as client, ThreadPoolExecutor(8) as pool:

        def ask(outputs: list[str]) -> httpx.Response:
            return client.post("/run", json={"inputs": "the fox", "outputs": outputs})

        monkeypatch.setattr(service, "SMALL_REPLY", service._size_of(ask([]).json()["results"]))
        monkeypatch.setattr(native, "json_reply", noted)
        replies = [pool.submit(ask, ["logits"])]
        assert entered.wait(WAIT_SECONDS)
        waiting = server.server.service._answering._work_queue
        for number, outputs in enumerate((*[["logits"]] * 6, []), 1):
            replies.append(pool.submit(ask, outputs))
            wait_until(lambda number=number: waiting.qsize() == number)
        go_on.set()
        assert {reply.result().status_code for reply in replies} == {200}
    assert made.index(False) < 7  # it came last


def test_outputs_that_wait_for_their_answers_fill_a_bounded_memory(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OUTPUT_BYTES", 1)
    waiting: list[int] = []
    most: list[int] = []
    submit, answers = Batcher.submit, ServedModel.answers

    def submitted(batcher: Batcher, *arguments: Any, **options: Any) -> Any:
        waiting.append(1)
        most.append(len(waiting))
        return submit(batcher, *arguments, **options)

    def answered(model: ServedModel, *arguments: Any) -> Any:
        waiting.pop()
        return answers(model, *arguments)

    monkeypatch.setattr(Batcher, "submit", submitted)
    monkeypatch.setattr(ServedModel, "answers", answered)
    with running({"ner": bundle("token-classification")}) as server, ThreadPoolExecutor(3) as pool:

        def ask(_: int) -> int:
            with server.client() as client:
                return client.post("/run", json={"inputs": ["the fox", "a dog", "the quick fox"]}).status_code

        assert set(pool.map(ask, range(6))) == {200}
    assert most == [1] * 18


def test_other_requests_are_answered_while_a_long_text_is_tokenized(model: dict[str, Path]) -> None:
    """The event loop goes on: the thread that tokenizes does not keep the interpreter for itself."""
    text = "a" * 1_000_000
    with running(model, max_body_bytes=2_000_000) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        tokenizer = server.server.service.models["cls"]._tokenizer
        assert tokenizer is not None
        long = pool.submit(tokenizer.truncate, text)
        answered = 0
        while not long.done():
            assert client.get("/health").status_code == 200
            answered += 1
    assert answered > 5


def test_a_request_that_is_not_answered_in_time_gets_503_and_is_not_computed(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    futures: list[Future[Any]] = []
    submit = Batcher.submit

    def noted(batcher: Batcher, *arguments: Any, **options: Any) -> Any:
        futures.append(submit(batcher, *arguments, **options))
        return futures[-1]

    monkeypatch.setattr(Batcher, "submit", noted)
    with running(model, answer_seconds=0.3, max_delay_ms=1000) as server:
        late = run(server)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert "not answered within 0.3 s" in late.json()["error"]
        assert futures[0].cancelled()
        assert server.server.service.in_progress == 0


@pytest.mark.parametrize("lingering", [False, True], ids=["close", "reset"])
def test_what_a_client_that_has_gone_asked_for_is_not_computed(
    lingering: bool, model: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with running(model, max_delay_ms=2000, log_requests=True) as server:
        metrics = server.server.service.models["cls"].engine.metrics
        with connected(server, REQUEST) as client:
            wait_until(lambda: server.server.service.in_progress == 1)
            if lingering:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: server.server.service.in_progress == 0)
        assert run(server).status_code == 200
        assert metrics.snapshot().sequences == 1
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [("/run", "gone"), ("/run", 200)]
    assert (lines[1]["model"], lines[1]["texts"], lines[1]["client"]) == ("cls", 1, "127.0.0.1")
    assert "fox" not in json.dumps(lines)


def test_a_line_of_the_log_is_one_write(model: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers share stderr: between two writes of one, a line of another may come."""
    written: list[bytes] = []
    with running(model, log_requests=True) as server, monkeypatch.context() as patch:
        patch.setattr("os.write", lambda _, text: written.append(text) or len(text))
        assert run(server).status_code == 200
        wait_until(lambda: b"\n" in b"".join(written))
    (line,) = written
    assert line.endswith(b"\n")
    assert json.loads(line)["path"] == "/run"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b" 408 "),
        (b"POST /run HT", b" 408 "),
        (b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{", b" 408 "),
        (b"POST /run HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", b" 408 "),
        (b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n{", b" 413 "),
        (b"POST /run HTTP/1.0\r\nContent-Length: 999999999\r\n\r\n{", b" 413 "),
    ],
    ids=["nothing", "line", "body", "chunk", "refused", "refused-1.0"],
)
def test_a_client_that_stops_sending_is_disconnected(sent: bytes, status: bytes, model: dict[str, Path]) -> None:
    with running(model, client_seconds=0.5) as server, connected(server, sent) as client:
        assert status in received(client).partition(b"\r\n")[0]
        assert run(server).status_code == 200


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0\r\n", b"HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"], ids=["1.0", "close"]
)
def test_a_client_that_is_refused_while_it_sends_gets_the_reply(head: bytes, server_of_one: Running) -> None:
    """nginx with its defaults speaks HTTP/1.0, and would reply 502 after a reset."""
    body = b"a" * 20_000_000
    with connected(server_of_one, b"POST /run %bContent-Length: %d\r\n\r\n" % (head, len(body))) as client:
        client.sendall(body)
        reply = client.makefile("rb").read()  # to the end of the connection
    assert reply.startswith(b"HTTP/1.1 413 ")
    # Older releases of uvicorn leave it out of replies to HTTP/1.0, whose connections end with the reply anyway.
    assert reply.lower().count(b"connection: close") in ((0, 1) if b"HTTP/1.0" in head else (1,))


def test_a_client_that_sends_byte_by_byte_is_disconnected(model: dict[str, Path]) -> None:
    with running(model, client_seconds=0.6) as server:
        head = b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n"
        with connected(server, head) as client:
            ended = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    while not ended.wait(0.1):
                        client.sendall(b" ")

            thread = threading.Thread(target=drip)
            thread.start()
            received(client)
            ended.set()
            thread.join()
            wait_until(lambda: not server.server.server_state.connections)


def test_a_client_that_does_not_read_its_reply_is_disconnected(model: dict[str, Path]) -> None:
    with running(model, client_seconds=0.5) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with connection:
            connection.connect(server.socket_address)
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):  # of the server, which has ended the connection
                while True:
                    try:
                        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
                    except TimeoutError:
                        if not server.server.server_state.connections:
                            break
            wait_until(lambda: not server.server.server_state.connections)
        assert run(server).status_code == 200


def test_500_slow_connections_do_not_keep_others_from_their_answers(model: dict[str, Path]) -> None:
    with running(model, client_seconds=60) as server, contextlib.ExitStack() as stack:
        heads = (b"", b"POST /run HT", b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        slow = [stack.enter_context(connected(server, heads[i % 3])) for i in range(500)]
        wait_until(lambda: len(server.server.server_state.connections) == 500)
        with ThreadPoolExecutor(4) as pool:
            assert {reply.status_code for reply in pool.map(lambda _: run(server), range(20))} == {200}
        slow[2].sendall(b'"inputs":"the fox"}' + b" " * 30)
        assert b" 200 " in slow[2].recv(4096)


def test_connections_above_the_limit_get_503(model: dict[str, Path]) -> None:
    with running(model, max_connections=2) as server, connected(server), connected(server):
        wait_until(lambda: len(server.server.server_state.connections) == 2)
        with connected(server) as third:
            reply = received(third)
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in reply
        assert b"this server takes 2 connections" in reply


def test_no_more_connections_are_taken_than_the_system_has_files_for(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (OTHER_FILES + 2, OTHER_FILES + 2))
    with running(model) as server, connected(server), connected(server):
        assert any("takes 2 connections" in line for line in server.reports)
        wait_until(lambda: len(server.server.server_state.connections) == 2)
        with connected(server) as third:
            assert received(third).startswith(b"HTTP/1.1 503 ")


def test_headers_without_end_are_refused(model: dict[str, Path]) -> None:
    with running(model) as server, connected(server, b"GET / HTTP/1.1\r\n") as client:
        with contextlib.suppress(OSError):
            for _ in range(3 * MAX_HEADER_BYTES // 1000):
                client.sendall(b"a: " + b"b" * 997)
                time.sleep(0.001)  # so that they come in several parts
        assert received(client).startswith(b"HTTP/1.1 431 ")


def test_headers_that_come_at_once_are_counted(server_of_one: Running) -> None:
    """asyncio reads up to 256 KB at a time; the precision is 4 KB."""
    head = b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * ((MAX_HEADER_BYTES + 8192) // 6) + b"\r\n"
    with connected(server_of_one, head) as client:
        assert received(client).startswith(b"HTTP/1.1 431 ")


def test_headers_of_pipelined_requests_are_counted_apart(server_of_one: Running) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n" % (b"x" * (MAX_HEADER_BYTES - 8192))
    with connected(server_of_one, request * 5) as client:
        data = b""
        while data.count(b"HTTP/1.1 200 ") < 5 or not data.endswith(b"}"):
            data += client.recv(65_536)


@pytest.mark.parametrize("part", [b"a: " + b"b" * 995 + b"\r\n", b"b" * 1000], ids=["many", "one"])
def test_trailers_without_end_are_refused_and_not_kept(part: bytes, model: dict[str, Path]) -> None:
    head = b"POST /run HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\na: b"
    with running(model) as server, connected(server, head) as client:
        with contextlib.suppress(OSError):
            for _ in range(3 * MAX_HEADER_BYTES // 1000):
                client.sendall(part)
                time.sleep(0.001)
        assert received(client).startswith(b"HTTP/1.1 431 ")


UPGRADE = b"Connection: keep-alive, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_for_another_protocol_is_answered_in_http(chunked: bool, server_of_one: Running) -> None:
    """Java's HttpClient asks for HTTP/2 in its first request. The body must not be taken for a request."""
    smuggled = b"GET /nope HTTP/1.1\r\n\r\n"
    body = b'{"inputs":"the fox"}' + b" " * 20 + smuggled
    size = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    with connected(server_of_one, b"POST /run HTTP/1.1\r\nHost: a\r\n" + UPGRADE + size + b"\r\n") as client:
        client.sendall(sent + REQUEST)
        data = b""
        while data.count(b"HTTP/1.1 ") < 2 or not data.endswith(b"}"):
            data += client.recv(65_536)
    assert [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]] == [b"422", b"200"]  # the body is no JSON
    with connected(server_of_one, b"GET /health HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"\r\n" + REQUEST) as client:
        data = b""
        while data.count(b"HTTP/1.1 200 ") < 2 or not data.endswith(b"}"):
            data += client.recv(65_536)
    with connected(server_of_one, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n" + REQUEST) as client:
        assert received(client).startswith(b"HTTP/1.1 400 ")


def test_pipelined_requests_have_a_limit(server_of_one: Running) -> None:
    with connected(server_of_one) as client, contextlib.suppress(OSError):
        client.sendall(REQUEST + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 10_000)
        data = b""
        while part := client.recv(65_536):
            data += part
        assert data.count(b"HTTP/1.1 ") < 1000
    assert run(server_of_one).status_code == 200


def test_replies_that_are_not_read_fill_a_bounded_memory(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as server:
        server.server.service.unread_bytes = lambda: limits.UNREAD_BYTES
        reply = run(server)
        assert reply.status_code == 429
        assert "replies that clients have not read" in reply.json()["error"]
        server.server.service.unread_bytes = server.server._unread_bytes
        assert run(server).status_code == 200


def test_bodies_of_paths_without_a_key_are_not_buffered(model: dict[str, Path]) -> None:
    head = b"%b HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
    held: list[int] = []
    with running(model, api_key="secret", client_seconds=2) as server:
        for request in (b"GET /health", b"POST /health", b"GET /", b"POST /openapi.json"):
            with connected(server, head % request + b"a" * 999_000) as client:
                assert received(client).startswith(b"HTTP/1.1 ")
                held.append(server.server.service.body_memory.held)
    assert held == [0] * 4


@pytest.mark.parametrize("key", ["", " ", "key ", "line\n", "two\nlines", "\udcff"])
def test_keys_that_no_header_can_carry_are_refused(key: str) -> None:
    with pytest.raises(InputError, match="the API key is empty, begins or ends with a space"):
        Settings({"a": "b"}, api_key=key)


def test_trailers_are_dropped(server_of_one: Running) -> None:
    body = b'{"inputs":"the fox"}'
    head = b"POST /run HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n0\r\nAuthorization: none\r\n\r\n" % (len(body), body)
    with connected(server_of_one, head + chunk + REQUEST) as client:
        data = b""
        while data.count(b"HTTP/1.1 200 ") < 2 or not data.endswith(b"}"):
            data += client.recv(65_536)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff" * 50 + b"\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /run HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["bytes", "negative", "letters", "huge", "two-lengths", "chunk"],
)
def test_what_is_no_http_gets_400(sent: bytes, model: dict[str, Path], server_of_one: Running) -> None:
    with connected(server_of_one, sent) as client:
        assert b" 400 " in received(client).partition(b"\r\n")[0]
    assert run(server_of_one).status_code == 200


@pytest.fixture(scope="module")
def server_of_one(bundle: MakeBundle) -> Iterator[Running]:
    with running({"cls": bundle("text-classification")}) as server:
        yield server


def test_pipelined_requests_are_answered_in_order(server_of_one: Running) -> None:
    with connected(server_of_one, b"GET /nope HTTP/1.1\r\nHost: a\r\n\r\n" + REQUEST * 2) as client:
        data = b""
        while data.count(b"HTTP/1.1 ") < 3 or not data.endswith(b"}"):
            data += client.recv(65_536)
    assert [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]] == [b"404", b"200", b"200"]


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (REQUEST + b"\x00\r\n\r\n", [b"200", b"400"]),
        (REQUEST * 2 + b"GET /nope HTTP/1.1\r\nHost: a\r\nX: " + b"b" * 80_000, [b"200", b"200", b"431"]),
        (REQUEST + b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{", [b"200", b"408"]),
        (REQUEST + b"POST /run HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", [b"200", b"400"]),
        (REQUEST + b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n{", [b"200", b"413"]),
    ],
    ids=["bytes", "headers", "slow", "chunk", "large"],
)
def test_a_bad_request_does_not_take_the_reply_to_the_one_before_it(
    sent: bytes, statuses: list[bytes], model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with running(model, client_seconds=0.5) as server, connected(server, sent) as client:
        (connection,) = wait_for_connection(server)
        # The first request is being answered, and the last one was refused, or nothing of it is there to refuse.
        assert held.entered.wait(WAIT_SECONDS)
        if statuses[-1] != b"413":
            wait_until(lambda: connection._refuse_later is not None)
        held.go_on.set()
        replies = received(client).split(b"HTTP/1.1 ")[1:]
    assert [reply[:3] for reply in replies] == statuses


def wait_for_connection(server: Running) -> list[Any]:
    connections = server.server.server_state.connections
    wait_until(lambda: len(connections) == 1)
    return list(connections)


def test_a_client_that_ends_its_sending_gets_its_answers(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nc -N` does so. An interim reply finds out whether it is still there."""
    held = Held(monkeypatch)
    with running(model) as server, connected(server, REQUEST * 2) as client:
        assert held.entered.wait(WAIT_SECONDS)
        client.shutdown(socket.SHUT_WR)
        (connection,) = wait_for_connection(server)
        wait_until(lambda: connection._has_ended)
        held.go_on.set()
        replies = received(client).split(b"HTTP/1.1 ")[1:]
    assert [reply[:3] for reply in replies] == [b"102", b"200", b"200"]


@pytest.mark.parametrize("sent", [b"", b"POST /run HT", REQUEST[:-1]], ids=["nothing", "line", "body"])
def test_a_client_that_ends_its_sending_in_a_request_is_disconnected(sent: bytes, server_of_one: Running) -> None:
    with connected(server_of_one, sent) as client:
        client.shutdown(socket.SHUT_WR)
        assert received(client) == b""


def test_requests_wait_for_the_models_no_longer_than_health_says(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, go_on = threading.Event(), threading.Event()
    make = service.ServedModel

    def waiting(*arguments: Any) -> Any:
        opened.set()
        assert go_on.wait(WAIT_SECONDS)
        return make(*arguments)

    monkeypatch.setattr(service, "ServedModel", waiting)
    statuses: list[int] = []

    def look(address: str) -> None:
        with httpx.Client(base_url=address, timeout=WAIT_SECONDS, trust_env=False) as client:
            health = client.get("/health")
            statuses.append(health.status_code)
            assert health.json() == {"status": "warming up"}
            for reply in (health, client.post("/run", content=BODY), client.get("/models"), client.get("/info")):
                statuses.append(reply.status_code)
                assert reply.headers["retry-after"] == "1"

    def before_ready(address: str) -> None:
        assert opened.wait(WAIT_SECONDS)
        try:
            look(address)
        finally:
            go_on.set()

    with running(model, before_ready=before_ready) as server:
        assert set(statuses) == {503}
        assert run(server).status_code == 200


def test_health_says_that_a_model_takes_no_requests_any_more(model: dict[str, Path]) -> None:
    with running(model) as server, server.client() as client:
        server.server.service.models["cls"].batcher.close()
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert client.post("/run", content=BODY).status_code == 429


def test_health_says_that_the_server_stops(model: dict[str, Path]) -> None:
    with running(model) as server, server.client() as client:
        server.server.service.state = "stopping"
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
