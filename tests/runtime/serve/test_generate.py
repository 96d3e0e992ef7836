"""POST /generate: the text that `Engine.generate` writes, in the form of text-generation-inference."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lfx.errors import InputError
from lfx.manifest import MANIFEST
from lfx.runtime import Engine
from lfx.runtime.generation.graphs import GraphCache
from lfx.runtime.serve.model import ServedModel
from lfx.runtime.serve.settings import Settings
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.serve.running import WAIT_SECONDS, running, wait_until

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def client(led_bundle: MakeLed, bundle: MakeBundle) -> Iterator[httpx.Client]:
    with running({"led": led_bundle()[1], "bare": bundle()}) as server, server.client() as opened:
        yield opened


def post(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    return client.post(path, content=json.dumps(body).encode())


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_the_body_may_name_the_model_where_the_path_does_not(route: str, client: httpx.Client) -> None:
    body = {"inputs": TEXT, "parameters": {"max_new_tokens": 3}}
    expected = post(client, route, body).text
    assert post(client, route, {**body, "model": "led"}).text == expected
    assert post(client, route, {**body, "model": "bare"}).status_code == 424  # for its task
    assert post(client, route, {**body, "model": "nope"}).status_code == 404
    assert post(client, f"/models/led{route}", {**body, "model": "bare"}).status_code == 422


@pytest.mark.parametrize("path", ["/generate", "/models/led/generate"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
        {"max_new_tokens": 6, "do_sample": True, "seed": 4, "top_p": 0.9, "temperature": 1.5},
    ],
    ids=str,
)
def test_the_text_is_the_engines(
    parameters: dict[str, Any], path: str, client: httpx.Client, led_bundle: MakeLed
) -> None:
    folder = led_bundle()[1]
    with Engine(folder, threads=1) as engine:
        tokens = engine.generate(TEXT, **parameters)[0].tolist()
        expected = Tokenizer(folder, engine.signature).decode(tokens)
    assert post(client, path, {"inputs": TEXT, "parameters": parameters}).json() == {"generated_text": expected}
    details = post(client, path, {"inputs": TEXT, "parameters": {**parameters, "details": True}}).json()["details"]
    assert [token["id"] for token in details["tokens"]] == tokens[1:]
    assert details["generated_tokens"] == len(tokens) - 1
    assert details["finish_reason"] == ("eos_token" if tokens[-1] == 2 else "length")
    assert details["seed"] == parameters.get("seed")


def test_parameters_may_be_left_out(client: httpx.Client) -> None:
    unused = dict.fromkeys(("typical_p", "frequency_penalty", "top_n_tokens", "grammar", "best_of", "seed"))
    bodies: tuple[dict[str, Any], ...] = ({}, {"parameters": None}, {"parameters": {**unused, "stop": []}})
    texts = [post(client, "/generate", {"inputs": TEXT, **body}).json() for body in bodies]
    written = post(client, "/generate", {"inputs": TEXT, "parameters": {"max_new_tokens": 20}}).json()
    assert texts == [written] * 3


def test_the_checkpoints_options_are_those_at_the_start(led_bundle: MakeLed, tmp_path: Path) -> None:
    folder = tmp_path / "led"
    shutil.copytree(led_bundle()[1], folder)
    (folder / MANIFEST).unlink()
    path, file = str(folder / "encoder_model.onnx"), folder / "generation_config.json"
    settings = Settings({"led": path}, threads=1)
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_length": 12}))
    with contextlib.closing(ServedModel("led", path, settings)) as first:
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_length": 4}))
        with contextlib.closing(ServedModel("led", path, settings)) as second:
            texts = [model.generate(TEXT, {}, lambda: False, truncate=False) for model in (first, second)]
            assert [len(text.ids) for text in texts] == [11, 3]
            assert first.identity != second.identity  # so that the older worker is restarted


@pytest.mark.parametrize(
    ("body", "path", "status", "message"),
    [
        ({"inputs": 5}, "/generate", 422, "inputs: give a text"),
        ({"inputs": TEXT, "parameters": {"beams": 2}}, "/generate", 422, "parameters.beams is not supported; leave it"),
        ({"inputs": TEXT, "parameters": {"typical_p": 0.9}}, "/generate", 422, "parameters.typical_p: "),
        ({"inputs": TEXT, "parameters": {"stop": ["a"]}}, "/generate", 422, "give null or an empty list"),
        (
            {"inputs": TEXT, "parameters": {"top_k": "5"}},
            "/generate",
            422,
            "parameters.top_k: Input should be",
        ),
        ({"inputs": TEXT, "parameters": {"truncate": 100}}, "/generate", 422, "give true to have a text cut"),
        ({"inputs": TEXT, "parameters": [1]}, "/generate", 422, "parameters: give an object of options"),
        ({"inputs": TEXT, "stream": True}, "/generate", 422, "/generate has no stream; ask /generate_stream"),
        ({"inputs": TEXT, "parameters": {"num_beams": 0}}, "/generate", 422, "num_beams 0 is out of range"),
        ({"inputs": TEXT, "parameters": {"num_beams": 17}}, "/generate", 422, "num_beams 17 is above the 16 that this"),
        ({"inputs": TEXT, "parameters": {"max_new_tokens": 65}}, "/generate", 413, "max_new_tokens 65 is above"),
        ({"inputs": "the " * 3000}, "/generate", 413, "above the model's maximum"),
        ({"inputs": TEXT}, "/models/bare/generate", 424, "the model bare writes no texts"),
        ({"inputs": TEXT}, "/models/other/generate", 404, "the model 'other' does not exist"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(body: Any, path: str, status: int, message: str, client: httpx.Client) -> None:
    reply = post(client, path, body)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]
    assert reply.json()["error_type"] == "validation"


def test_as_many_beams_as_the_limit_are_answered(client: httpx.Client) -> None:
    parameters = {"num_beams": 16, "max_new_tokens": 3}
    assert post(client, "/generate", {"inputs": TEXT, "parameters": parameters}).status_code == 200


def test_a_long_text_is_cut_if_asked(client: httpx.Client) -> None:
    parameters = {"truncate": True, "max_new_tokens": 3}
    assert post(client, "/generate", {"inputs": "the " * 3000, "parameters": parameters}).status_code == 200


def test_a_client_that_goes_away_ends_a_search_with_beams(led_bundle: MakeLed, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, released, steps, step = threading.Event(), threading.Event(), itertools.count(1), GraphCache.step

    def waiting(cache: GraphCache, tokens: Any) -> Any:
        if next(steps) == 2:
            reached.set()
            assert released.wait(WAIT_SECONDS)
        return step(cache, tokens)

    monkeypatch.setattr(GraphCache, "step", waiting)
    with running({"led": led_bundle()[1]}) as server:
        service = server.server.service
        parameters = {"num_beams": 3, "max_new_tokens": 40, "min_new_tokens": 40}
        body = json.dumps({"inputs": TEXT, "parameters": parameters}).encode()
        with socket.create_connection(server.socket_address) as client:
            client.sendall(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert reached.wait(WAIT_SECONDS)
        wait_until(lambda: service.in_progress == 0)
        released.set()
        service._generating.submit(lambda: None).result(WAIT_SECONDS)  # the thread is free again
        assert next(steps) == 3


def test_a_text_that_takes_too_long_is_given_up(led_bundle: MakeLed, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def endless(self: Any, text: str, options: Any, is_cancelled: Callable[[], bool], *, truncate: bool) -> Any:
        while not is_cancelled():
            time.sleep(0.01)
        ended.set()
        raise InputError("cancelled")

    monkeypatch.setattr(ServedModel, "generate", endless)
    with running({"led": led_bundle()[1]}, answer_seconds=0.05) as server, server.client() as client:
        reply = post(client, "/generate", {"inputs": TEXT})
        assert reply.status_code == 503
        assert "not answered within 0.05 s" in reply.json()["error"]
        assert reply.json()["error_type"] == "generation"
        assert ended.wait(60)
