"""Models in a real tritonserver, asked with NVIDIA's client over HTTP and gRPC."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the server of nvidia-pytriton is for Linux", allow_module_level=True)

import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from lfx.runtime import Engine
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import Tokenizer
from lfx.runtime.triton.repository import Settings, write_model
from tests.conftest import MakeBundle
from tests.models import VOCAB_SIZE, WINDOW
from tests.runtime.triton.running import Running, running

pytestmark = pytest.mark.slow
TASKS = {
    "bare": "feature-extraction",
    "cls": "text-classification",
    "emb": "sentence-embedding",
    "qa": "question-answering",
    "choice": "multiple-choice",
}
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 128)
CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


@pytest.fixture(scope="module")
def repository(bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model for each task."""
    folder = tmp_path_factory.mktemp("triton") / "model_repository"
    for name, task in TASKS.items():
        write_model(bundle(task), folder, Settings(name=name, max_delay_ms=200 if name == "bare" else 5, threads=1))
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Running]:
    """A server of all models; it takes commands to load and unload them."""
    with running(repository, "--model-control-mode=explicit", "--load-model=*") as started:
        yield started


def ask(server: Running, model: str, protocol: str = "http", parameters: Any = None, **arrays: Any) -> dict[str, Any]:
    """Send a request with a client of its own, and return the outputs."""
    module = CLIENTS[protocol]
    inputs = []
    for name, array in arrays.items():
        item = module.InferInput(name, list(array.shape), {"int64": "INT64", "uint8": "UINT8"}[str(array.dtype)])
        item.set_data_from_numpy(array)
        inputs.append(item)
    client = server.client(protocol)
    try:
        result = client.infer(model, inputs, parameters=parameters)
        response = result.get_response() if protocol == "http" else result.get_response(as_json=True)
        return {output["name"]: result.as_numpy(output["name"]) for output in response["outputs"]}
    finally:
        client.close()


def utf8(*texts: str) -> Any:
    """Texts as the server takes them: UTF-8 with NUL bytes after the shorter ones."""
    encoded = [text.encode() for text in texts]
    width = max(map(len, encoded))
    return np.frombuffer(b"".join(text.ljust(width, b"\0") for text in encoded), np.uint8).reshape(len(texts), width)


def some_ids(length: int, batch: int = 1) -> Any:
    """Random ids, without special ones."""
    return np.random.default_rng(length).integers(5, VOCAB_SIZE, (batch, length))


def same(outputs: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the outputs of an Engine with those of the server."""
    for name, array in expected.items():
        assert outputs[name].dtype == array.dtype
        np.testing.assert_allclose(outputs[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_the_server_starts_and_all_models_are_ready(server: Running) -> None:
    client = server.client("http")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert all(client.is_model_ready(name) for name in TASKS)
    config = client.get_model_config("bare")
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 200_000
    assert all(item["allow_ragged_batch"] and item["optional"] for item in config["input"])


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_ids_give_what_the_engine_gives(protocol: str, length: int, server: Running, bundle: MakeBundle) -> None:
    ids = some_ids(length, batch=2)
    same(ask(server, "bare", protocol, input_ids=ids), Engine(bundle(TASKS["bare"]), threads=1).run(ids))


def test_masks_are_those_of_the_engine(server: Running, bundle: MakeBundle) -> None:
    ids = some_ids(30, batch=2)
    mask, marks = np.ones_like(ids), np.zeros_like(ids)
    mask[1, 20:], marks[:, [0, 7]] = 0, 1
    outputs = ask(server, "bare", input_ids=ids, attention_mask=mask, global_attention_mask=marks)
    same(outputs, Engine(bundle(TASKS["bare"]), threads=1).run(ids, mask, marks))


def test_concurrent_requests_of_unequal_length_run_together_and_give_what_the_engine_gives(
    server: Running, bundle: MakeBundle
) -> None:
    requests = [some_ids(length) for length in (*range(1, 33), *LENGTHS)]
    before = server.metrics()
    with ThreadPoolExecutor(len(requests)) as pool:
        protocols = [list(CLIENTS)[i % 2] for i in range(len(requests))]
        answers = list(
            pool.map(lambda ids, protocol: ask(server, "bare", protocol, input_ids=ids), requests, protocols)
        )
    engine = Engine(bundle(TASKS["bare"]), threads=1)
    for ids, outputs in zip(requests, answers, strict=True):
        same(outputs, engine.run(ids))
    grown = {
        name: server.metrics()[key] - before[key]
        for name in ("sequences", "batches", "tokens")
        if (key := f'lfx_{name}_total{{model="bare",version="1"}}')
    }
    assert grown["sequences"] == len(requests)
    assert grown["tokens"] == sum(ids.size for ids in requests)
    assert grown["batches"] < len(requests)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": np.full((1, 4), VOCAB_SIZE)}, "outside the vocabulary"),
        ({"input_ids": np.full((1, 4), -1)}, "negative id -1"),
        ({"input_ids": np.full((1, 129), 7)}, "above the model's maximum 128"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, "at least one token"),
        ({"input_ids": np.full((1, 4), 7), "attention_mask": np.full((1, 4), 2)}, "masks hold 0 and 1 only"),
        ({"input_ids": np.full((1, 4), 7), "attention_mask": np.ones((1, 3), int)}, "make them equal"),
        ({"attention_mask": np.ones((1, 3), int)}, "no input_ids"),
        ({"input_ids": np.full((1, 4), 7), "text": utf8("a")}, "give either input_ids with its masks, or text"),
        ({"pair": utf8("a")}, "no text"),
        ({"text": np.full((1, 2), 255, np.uint8)}, "not UTF-8"),
        ({"text": utf8("word " * 200)}, "or give the parameter truncate: true"),
    ],
)
@pytest.mark.parametrize("protocol", CLIENTS)
def test_a_bad_request_is_answered_and_the_others_with_it_are_not_affected(
    protocol: str, arrays: dict[str, Any], message: str, server: Running, bundle: MakeBundle
) -> None:
    good = some_ids(9)
    with ThreadPoolExecutor(3) as pool:
        bad = pool.submit(ask, server, "bare", protocol, **arrays)
        others = [pool.submit(ask, server, "bare", input_ids=good) for _ in range(2)]
    with pytest.raises(InferenceServerException, match=message) as raised:
        bad.result()
    assert raised.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    expected = Engine(bundle(TASKS["bare"]), threads=1).run(good)
    for other in others:
        same(other.result(), expected)


def test_parameters_that_are_not_utf8_are_the_error_of_their_request_alone(server: Running) -> None:
    tensor = {"name": "text", "shape": [1, 3], "datatype": "UINT8", "data": list(b"fox")}
    good = json.dumps({"inputs": [tensor]}).encode()
    bad = json.dumps({"inputs": [tensor], "parameters": {"XX": "a"}}).encode().replace(b"XX", b"\xff\xfe")
    url = f"http://{server.http}/v2/models/bare/infer"
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda body: httpx.post(url, content=body, timeout=60), (good, bad, good, good)))
    assert [reply.status_code for reply in replies] == [200, 400, 200, 200]
    assert "not UTF-8" in replies[1].text


@pytest.mark.parametrize("protocol", CLIENTS)
def test_texts_give_the_outputs_and_the_answers_of_the_task(protocol: str, server: Running, bundle: MakeBundle) -> None:
    texts = ["the quick brown fox", "a"]
    outputs = ask(server, "cls", protocol, text=utf8(*texts))
    engine = Engine(bundle(TASKS["cls"]), threads=1)
    tokenizer = Tokenizer(bundle(TASKS["cls"]), engine.signature)
    for i, text in enumerate(texts):
        encoded = tokenizer.encode(text)
        expected = engine.run(encoded.ids)
        np.testing.assert_allclose(outputs["logits"][i], expected["logits"][0], rtol=0, atol=1e-5)
        assert outputs["num_tokens"][i] == len(encoded.ids)
        answers = json.loads(outputs["answers"][i].tobytes())
        assert [answer["label"] for answer in answers] == [
            answer["label"] for answer in Postprocessor(tokenizer).answers(encoded, expected)
        ]


def test_outputs_per_token_of_texts_are_filled_with_zeros(server: Running, bundle: MakeBundle) -> None:
    outputs = ask(server, "bare", text=utf8("the quick brown fox", "a"))
    long, short = outputs["num_tokens"].ravel()
    assert outputs["last_hidden_state"].shape[1] == long > short
    assert not outputs["last_hidden_state"][1, short:].any()
    assert outputs["last_hidden_state"][1, :short].all(axis=-1).any()


def test_a_question_is_answered_with_its_place_in_the_document(server: Running) -> None:
    document = "the fox is brown and the dog is lazy"
    outputs = ask(server, "qa", text=utf8("who?"), pair=utf8(document))
    (answer,) = json.loads(outputs["answers"][0].tobytes())
    assert document[answer["start"] : answer["end"]] == answer["answer"]
    with pytest.raises(InferenceServerException, match="give both"):
        ask(server, "qa", text=utf8("who?"))


def test_choices_are_ids_or_texts(server: Running, bundle: MakeBundle) -> None:
    outputs = ask(server, "choice", text=utf8("the fox"), choices=utf8("is brown", "is a dog", "x")[None])
    assert outputs["logits"].shape == (1, 3)
    assert {answer["choice"] for answer in json.loads(outputs["answers"][0].tobytes())} == {0, 1, 2}
    ids, marks = some_ids(12, batch=2)[None], np.zeros((1, 2, 12), int)
    expected = Engine(bundle(TASKS["choice"]), threads=1).run(ids, None, marks)
    same(ask(server, "choice", input_ids=ids, global_attention_mask=marks), {"logits": expected["logits"]})


def test_sentence_embeddings_are_those_of_embed_and_long_texts_are_cut_on_request(
    server: Running, bundle: MakeBundle
) -> None:
    engine, text = Engine(bundle(TASKS["emb"]), threads=1), "word " * 200
    outputs = ask(server, "emb", parameters={"truncate": True}, text=utf8(text))
    np.testing.assert_allclose(outputs["sentence_embedding"], engine.embed(text, truncate=True), rtol=0, atol=1e-5)
    outputs = ask(server, "emb", parameters={"prompt": "the "}, text=utf8("fox"))
    np.testing.assert_allclose(outputs["sentence_embedding"], engine.embed("fox", prompt="the "), rtol=0, atol=1e-5)
    with pytest.raises(InferenceServerException, match="takes no prompt"):
        ask(server, "cls", parameters={"prompt": "the "}, text=utf8("fox"))
    with pytest.raises(InferenceServerException, match="prompt is put before a text"):
        ask(server, "emb", parameters={"prompt": "the "}, input_ids=np.array([[0, 5, 2]]))


def test_a_model_is_unloaded_and_the_one_that_replaced_it_is_loaded(
    server: Running, repository: Path, bundle: MakeBundle
) -> None:
    client, ids = server.client("http"), some_ids(9)
    write_model(bundle("text-classification"), repository, Settings(name="other", threads=1))
    client.load_model("other")
    assert ask(server, "other", input_ids=ids)["logits"].shape == (1, 2)
    client.unload_model("other")
    assert not client.is_model_ready("other")
    with pytest.raises(InferenceServerException, match="other"):
        ask(server, "other", input_ids=ids)
    write_model(bundle("feature-extraction"), repository, Settings(name="other", instances=2, link=True))
    client.load_model("other")
    assert client.is_model_ready("other")
    same(ask(server, "other", input_ids=ids), Engine(bundle("feature-extraction"), threads=1).run(ids))
    client.load_model("other")  # while it is loaded
    same(ask(server, "other", input_ids=ids), Engine(bundle("feature-extraction"), threads=1).run(ids))


def test_a_single_onnx_file_is_served(server: Running, repository: Path, bundle: MakeBundle, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(bundle("feature-extraction") / name, tmp_path)
    write_model(tmp_path / "model.onnx", repository, Settings(name="file", threads=1))
    server.client("http").load_model("file")
    ids = some_ids(9)
    same(ask(server, "file", input_ids=ids), Engine(tmp_path / "model.onnx", threads=1).run(ids))


def test_a_changed_bundle_is_not_loaded_and_the_server_says_why(
    server: Running, repository: Path, bundle: MakeBundle
) -> None:
    write_model(bundle("feature-extraction"), repository, Settings(name="changed"))
    config = repository / "changed" / "1" / "bundle" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("{", "{ ", 1))
    try:
        with pytest.raises(InferenceServerException, match=r"config\.json"):
            server.client("http").load_model("changed")
    finally:
        shutil.rmtree(repository / "changed")
