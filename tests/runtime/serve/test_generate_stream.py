"""POST /generate_stream: the tokens of /generate, as they come."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Tokenizers

from lfx.errors import ArtifactError, LfxError
from lfx.runtime.generation.graphs import GraphCache
from lfx.runtime.serve.writing import TokenTexts
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.serve.running import WAIT_SECONDS, Running, running, wait_until

TEXT = "the quick brown fox jumps over the lazy dog"
LONG = {"max_new_tokens": 40, "min_new_tokens": 40}


@pytest.fixture(scope="module")
def server(led_bundle: MakeLed, bundle: MakeBundle) -> Iterator[Running]:
    with running({"led": led_bundle()[1], "bare": bundle()}) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


class Steps:
    """Decoder steps, of which those after the first `free` wait for `release`, or raise an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, error: Exception | None = None) -> None:
        self.count, self.release = 0, threading.Event()
        step = GraphCache.step

        def waiting(cache: GraphCache, tokens: Any) -> Any:
            self.count += 1
            if self.count > free:
                if error is not None:
                    raise error
                assert self.release.wait(WAIT_SECONDS)
            return step(cache, tokens)

        monkeypatch.setattr(GraphCache, "step", waiting)


def events_of(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a reply, as they come."""
    assert reply.status_code == 200, reply.read()
    assert reply.headers["content-type"].startswith("text/event-stream")
    for line in reply.iter_lines():
        if line:
            assert line.startswith("data:")
            yield json.loads(line.removeprefix("data:"))


@pytest.mark.parametrize("path", ["/generate", "/models/led/generate"])
@pytest.mark.parametrize(
    "parameters",
    [{"max_new_tokens": 6}, {"max_new_tokens": 12, "do_sample": True, "seed": 4, "temperature": 1.5}, LONG],
    ids=str,
)
def test_the_tokens_are_those_of_generate(parameters: dict[str, Any], path: str, client: httpx.Client) -> None:
    body = {"inputs": TEXT, "parameters": {**parameters, "details": True}}
    whole = client.post(path, json=body).json()
    with client.stream("POST", f"{path}_stream", json=body) as reply:
        events = list(events_of(reply))
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    *others, last = events
    assert all((event["generated_text"], event["details"]) == (None, None) for event in others)
    assert last["generated_text"] == whole["generated_text"]
    written = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert written == whole["generated_text"]
    expected = {key: whole["details"][key] for key in ("finish_reason", "generated_tokens", "seed")}
    assert last["details"] == {**expected, "input_length": 11}
    body["parameters"]["details"] = False
    with client.stream("POST", f"{path}_stream", json=body) as reply:
        assert list(events_of(reply)) == [*others, {**last, "details": None}]


def test_hugging_faces_client_reads_the_stream(server: Running) -> None:
    from huggingface_hub import InferenceClient

    with server.client() as client:
        whole = client.post("/generate", json={"inputs": TEXT, "parameters": {"max_new_tokens": 6}}).json()
    with InferenceClient(model=f"{server.address}/generate_stream") as reader:
        tokens = list(reader.text_generation(TEXT, stream=True, details=True, max_new_tokens=6))
    assert [token.index for token in tokens] == list(range(1, 1 + len(tokens)))
    assert tokens[-1].generated_text == whole["generated_text"]
    assert tokens[-1].details is not None
    assert tokens[-1].details.generated_tokens == len(tokens)


def test_a_token_is_sent_before_the_next_one_is_computed(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, free=3)
    with client.stream("POST", "/generate_stream", json={"inputs": TEXT, "parameters": LONG}) as reply:
        events = events_of(reply)
        assert [next(events)["index"] for _ in range(3)] == [1, 2, 3]
        steps.release.set()
        assert [event["index"] for event in events] == list(range(4, 41))


@pytest.mark.parametrize(
    ("body", "path", "status", "message"),
    [
        ({"inputs": 5}, "/generate_stream", 422, "inputs: give a text"),
        ({"inputs": TEXT, "parameters": {"beams": 2}}, "/generate_stream", 422, "parameters"),
        ({"inputs": TEXT, "parameters": {"num_beams": 2}}, "/generate_stream", 422, "num_beams 2 cannot be streamed"),
        ({"inputs": TEXT, "parameters": {"max_new_tokens": 65}}, "/generate_stream", 413, "max_new_tokens 65 is above"),
        ({"inputs": "the " * 3000}, "/generate_stream", 413, "above the model's maximum"),
        ({"inputs": TEXT}, "/models/bare/generate_stream", 424, "the model bare writes no texts"),
        ({"inputs": TEXT}, "/models/other/generate_stream", 404, "the model 'other' does not exist"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(body: Any, path: str, status: int, message: str, client: httpx.Client) -> None:
    reply = client.post(path, json=body)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json"), reply.text
    assert message in reply.json()["error"]
    assert reply.json()["error_type"] == "validation"


def test_an_error_after_the_first_token_is_the_last_event(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Steps(patch, free=2, error=LfxError("out of memory"))
        with client.stream("POST", "/generate_stream", json={"inputs": TEXT, "parameters": LONG}) as reply:
            *tokens, last = events_of(reply)
    assert len(tokens) == 2
    assert last == {"error": "the model failed: out of memory", "error_type": "generation"}
    assert server.server.service.in_progress == 0
    with monkeypatch.context() as patch:
        Steps(patch, free=0, error=LfxError("out of memory"))
        reply = client.post("/generate_stream", json={"inputs": TEXT, "parameters": LONG})
    assert (reply.status_code, reply.json()["error_type"]) == (500, "generation")


def test_a_text_that_takes_too_long_is_given_up(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = iter([None, None, 0.0])  # for each of the first three tokens
    steps = Steps(monkeypatch, free=2)
    monkeypatch.setattr(asyncio, "timeout_at", lambda deadline: asyncio.timeout(next(limits)))
    with client.stream("POST", "/generate_stream", json={"inputs": TEXT, "parameters": LONG}) as reply:
        *tokens, last = events_of(reply)
    assert len(tokens) == 2
    assert "not answered within 120 s; ask for less, such as fewer texts or a smaller max_new_tokens" in last["error"]
    assert last["error_type"] == "generation"
    steps.release.set()
    assert server.server.service.in_progress == 0
    server.server.service._generating.submit(lambda: None).result(WAIT_SECONDS)  # the thread is free again
    assert steps.count <= 3  # the third may not have begun when the time was over


def test_http_1_0_gets_no_chunks(server: Running) -> None:
    body = json.dumps({"inputs": TEXT, "parameters": {"max_new_tokens": 3}}).encode()
    with socket.create_connection(server.socket_address, WAIT_SECONDS) as client:
        client.sendall(b"POST /generate_stream HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        headers, _, events = client.makefile("rb").read().partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in headers
    assert b"transfer-encoding" not in headers
    *parts, end = events.split(b"\n\n")
    assert end == b""
    assert [json.loads(part.removeprefix(b"data:"))["index"] for part in parts] == [1, 2, 3]


def test_http_1_0_gets_no_interim_reply(server: Running) -> None:
    body = json.dumps({"inputs": TEXT, "parameters": {"max_new_tokens": 3}}).encode()
    with socket.create_connection(server.socket_address, WAIT_SECONDS) as client:
        head = b"POST /generate HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)
        assert client.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_a_client_that_goes_away_ends_the_text(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, free=2)
    service = server.server.service
    body = {"inputs": TEXT, "parameters": LONG}
    with server.client() as client, client.stream("POST", "/generate_stream", json=body) as reply:
        # Reset at the close; a client that has read all may only have stopped sending, until the next token is sent.
        connection = reply.extensions["network_stream"].get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert next(events_of(reply))["index"] == 1
    wait_until(lambda: service.in_progress == 0)
    steps.release.set()
    service._generating.submit(lambda: None).result(WAIT_SECONDS)  # the thread is free again
    assert steps.count <= 3


def test_a_server_that_stops_tells_the_client(led_bundle: MakeLed, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, free=2)
    with running({"led": led_bundle()[1]}, stop_seconds=0.1) as started, started.client() as client:
        with client.stream("POST", "/generate_stream", json={"inputs": TEXT, "parameters": LONG}) as reply:
            events = events_of(reply)
            assert [next(events)["index"] for _ in range(2)] == [1, 2]
            started.server.should_exit = True
            (last,) = events
        steps.release.set()
    assert last == {"error": "the server stopped before the text was written; try again", "error_type": "generation"}


class Reader(Tokenizer):
    """A tokenizer of the library, without a bundle."""

    def __init__(self, tokenizer: Tokenizers) -> None:
        self._tokenizer = tokenizer
        self.folder = Path()


def texts(tokenizer: Tokenizers, ids: list[int]) -> list[str]:
    """The text of each token."""
    tokens = TokenTexts(Reader(tokenizer))
    return [tokens.add(token, last=i == len(ids)).text for i, token in enumerate(ids, 1)]


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    alphabet = ["Ġ", "a", "ð", "Ł", "¦", "Ĭ"]  # of the bytes of " ", "a" and of a fox, F0 9F A6 8A
    tokenizer = Tokenizers(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    assert texts(tokenizer, [1, 0, 1, 2, 3, 4, 5, 1, 6]) == ["a", "", " a", "", "", "", "\U0001f98a", "a", "</s>"]
    assert texts(tokenizer, [1, 2, 3]) == ["a", "", "\ufffd"]
    assert texts(tokenizer, [1, 2, 3, 6]) == ["a", "", "", "</s>"]  # the whole text alone has the U+FFFD, as documented
    with pytest.raises(ArtifactError, match="id 9 is not in the tokenizer's vocabulary"):
        texts(tokenizer, [9])


def test_a_decoder_may_change_the_text_before() -> None:
    vocabulary = {name: i for i, name in enumerate(["[UNK]", "do", "n", "'", "t", "fox", "."])}
    tokenizer = Tokenizers(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    assert "".join(texts(tokenizer, [5, 6])) == "fox."
    assert texts(tokenizer, [1, 2, 3, 4, 5])[-1] == " fox"


def test_texts_of_tokens_keep_the_spaces_that_the_whole_text_loses() -> None:
    """It may lose them after they were sent."""
    reader = Reader(Tokenizers(models.WordLevel({"it": 0, "'": 1, "s": 2, "fox": 3}, unk_token="it")))
    reader._cleans_up = True
    tokens = TokenTexts(reader)
    assert [tokens.add(token).text for token in [0, 1, 3]] == ["it", " '", " fox"]
    assert reader.decode([0, 1, 3]) == "it'fox"
