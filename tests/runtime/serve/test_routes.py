"""The routes: answers equal to one-by-one runs, in the form of each API, and errors that say what to do."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from lfx.errors import InputError
from lfx.export import export
from lfx.parity import pair_tolerance
from lfx.runtime import Engine
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.serve import limits, native, openai, tei, tgi
from lfx.runtime.serve.body import parse_body
from lfx.runtime.serve.limits import MAX_JSON_NUMBERS, REPLY_BYTES, Memory, ReplySize, Share
from lfx.runtime.serve.replies import RefusalError, dumps
from lfx.runtime.serve.settings import BYTES_PER_TOKEN, OTHER_BYTES
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle
from tests.models import ONE_LAYER, tiny_model, tiny_tokenizer
from tests.runtime.serve.conftest import TASKS
from tests.runtime.serve.running import Running, running

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
TEXTS = [" ".join(WORDS[i % 9 :] + WORDS * (i % 3)) for i in range(24)]
LONG = "fox " * 500
LARGEST_BODY = (128 * BYTES_PER_TOKEN + OTHER_BYTES) * 32  # 128 tokens are the tiny models' longest sequence


def post(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    return client.post(path, content=json.dumps(body).encode())


def answered(client: httpx.Client, path: str, body: Any) -> Any:
    reply = post(client, path, body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return reply.json()


def is_close(actual: Any, expected: Any) -> bool:
    """Whether outputs of a batch are those of a sequence alone, within the tolerance of two runs in float32."""
    expected = np.asarray(expected)
    tolerance = pair_tolerance("fp32", 2, float(np.abs(expected).max()))
    return bool(np.abs(np.asarray(actual) - expected).max() <= tolerance)


def test_concurrent_requests_get_the_answers_of_one_by_one_runs(client: httpx.Client, bundle: MakeBundle) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: answered(client, "/run", {"inputs": text, "outputs": ["logits"]}), TEXTS))
    folder = bundle("text-classification")
    with Engine(folder) as engine:
        reader = Tokenizer(folder, engine.signature)
        for text, reply in zip(TEXTS, replies, strict=True):
            encoded = reader.encode(text)
            outputs = engine.run(encoded.ids)
            expected = Postprocessor(reader).answers(encoded, outputs)  # type: ignore[arg-type]
            (result,) = reply["results"]
            assert result["tokens"] == reply["tokens"] == len(encoded.ids)
            assert [a["label"] for a in result["answers"]] == [a["label"] for a in expected]
            assert np.allclose([a["score"] for a in result["answers"]], [a["score"] for a in expected], atol=1e-5)
            assert is_close(result["outputs"]["logits"], np.asarray(outputs["logits"])[0])


@pytest.mark.parametrize(("route", "name"), [("/embed", "emb"), ("/predict", "cls")])
def test_the_body_may_name_the_model_where_the_path_does_not(route: str, name: str, client: httpx.Client) -> None:
    path, other = f"/models/{name}{route}", "qa"
    expected = answered(client, path, {"inputs": "the fox"})
    for route_or_path in (route, path):
        assert answered(client, route_or_path, {"inputs": "the fox", "model": name}) == expected
    assert post(client, route, {"inputs": "the fox", "model": other}).status_code == 424  # for its task
    assert post(client, route, {"inputs": "the fox", "model": "nope"}).status_code == 404
    refused = post(client, path, {"inputs": "the fox", "model": other})
    assert refused.status_code == 422
    assert f"the path is of the model {name}" in refused.json()["error"]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_and_output_is_served(name: str, client: httpx.Client, bundle: MakeBundle) -> None:
    question, document = "the quick fox", "the lazy dog jumps over the quick brown fox"
    one: dict[str, Any] = {"text": "the fox"}
    if name in ("qa", "choice"):
        one = {"text": question, **({"pair": document} if name == "qa" else {"choices": [document, "dog"]})}
    folder = bundle(TASKS[name])
    with Engine(folder) as engine:
        names = [spec.name for spec in engine.signature.outputs]
        reader = Tokenizer(folder, engine.signature)
        if name == "choice":
            rows = [reader.encode(question, choice).ids for choice in (document, "dog")]
            ids = np.full((2, len(rows[0])), engine.signature.pad_token_id)
            mask = np.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
            outputs = engine.run(ids, mask)
        else:
            outputs = engine.run(reader.encode(one["text"], one.get("pair")).ids)
    body = {"inputs": [one, one], "model": name, "outputs": names, "encoding": "base64"}
    reply = answered(client, "/run", body)
    assert answered(client, f"/models/{name}/run", {**body, "model": None})["model"] == reply["model"] == name
    assert post(client, f"/models/{name}/run", {**body, "model": "another"}).status_code == 422
    assert reply["task"] == TASKS[name]
    for result in reply["results"]:
        assert bool(result["answers"]) == (name not in ("emb", "mask", "org/bare"))
        for output in names:
            sent = result["outputs"][output]
            array = np.frombuffer(base64.b64decode(sent["base64"]), sent["dtype"]).reshape(sent["shape"])
            assert is_close(array, np.asarray(outputs[output])[0])


def test_an_answer_to_a_question_has_its_place_in_the_document(client: httpx.Client) -> None:
    document = "\U0001f98a the lazy dog jumps\nover the quick brown fox"
    for question in TEXTS[:6]:
        reply = answered(client, "/models/qa/run", {"inputs": {"text": question, "pair": document}})
        (answer,) = reply["results"][0]["answers"]
        assert document[answer["start"] : answer["end"]] == answer["answer"]


def test_ids_and_masks_are_those_of_the_engine(client: httpx.Client, bundle: MakeBundle) -> None:
    ids, attention, glob = [0, 5, 6, 7, 2], [1, 1, 1, 1, 0], [0, 1, 0, 0, 0]
    one = {"ids": ids, "attention_mask": attention, "global_attention_mask": glob}
    reply = answered(client, "/models/ner/run", {"inputs": one, "outputs": ["logits"]})
    with Engine(bundle("token-classification")) as engine:
        expected = engine.run(ids, attention, glob)["logits"]
    assert is_close(reply["results"][0]["outputs"]["logits"], np.asarray(expected)[0])
    tokens = [answer["token"] for answer in reply["results"][0]["answers"]]
    assert tokens == ["0", "5", "6", "7"]  # the last id is masked
    nested = {**one, "attention_mask": [attention], "global_attention_mask": [glob]}  # as tokenizers give them
    again = answered(client, "/models/ner/run", {"inputs": nested, "outputs": ["logits"]})
    assert again["results"] == reply["results"]


@pytest.mark.parametrize("name", TASKS)
def test_every_form_of_ids_masks_and_outputs_gets_what_the_engine_gives(
    name: str, client: httpx.Client, bundle: MakeBundle
) -> None:
    row, first, none, left = [0, 5, 6, 7, 2], [1, 0, 0, 0, 0], [0] * 5, [0, 1, 1, 1, 1]
    forms: list[Any] = [row, [row], [row, row], [row[:1]]]
    masks: list[Any] = [None, first, none, left, [left], [left, first], [1], [], [[]], 2 * left]
    with Engine(bundle(TASKS[name])) as engine:
        names = [spec.name for spec in engine.signature.outputs]
        is_choice = engine.signature.has_choices
        for ids, mask, at in itertools.product(forms, masks, (None, first, [left], none)):
            one = {"ids": ids, "attention_mask": mask, "global_attention_mask": at}
            try:
                expected = engine.run(ids, mask, at)
            except InputError:
                expected = None
            for outputs in (None, [], names):
                reply = post(client, "/run", {"inputs": one, "model": name, "outputs": outputs, "encoding": "base64"})
                sent = [one, outputs, reply.text[:200]]
                if expected is None or (np.ndim(ids) == 2 and not is_choice):
                    assert reply.status_code in (413, 422), sent
                    continue
                assert reply.status_code == 200, sent
                (result,) = reply.json()["results"]
                assert list(result["outputs"]) == outputs or outputs is None, sent
                for output, value in result["outputs"].items():
                    array = np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"])
                    assert is_close(array, np.asarray(expected[output])[0]), sent


def test_a_model_without_answers_gives_its_outputs_per_sequence(client: httpx.Client) -> None:
    reply = answered(client, "/models/org/bare/run", {"inputs": ["the fox", "dog"]})
    assert [list(result["outputs"]) for result in reply["results"]] == [["pooler_output"], ["pooler_output"]]
    assert answered(client, "/run", {"inputs": "the fox"})["results"][0]["outputs"] == {}


def test_masked_ids_of_a_model_without_answers_give_its_outputs_per_sequence(client: httpx.Client) -> None:
    inputs = [{"ids": [0, 5, 6, 2]}, {"ids": [0, 5, 6, 2, 1, 1], "attention_mask": [1, 1, 1, 1, 0, 0]}]
    plain, padded = answered(client, "/models/org/bare/run", {"inputs": inputs})["results"]
    assert padded["tokens"] == 4
    assert is_close(padded["outputs"]["pooler_output"], plain["outputs"]["pooler_output"])


class Scorer(torch.nn.Module):
    """One number for each sequence, without an axis of its own; its task's output would be named logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(**ONE_LAYER)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"score": self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0, 0]}


def test_a_module_of_ones_own_with_a_task_gives_one_number_a_sequence(tmp_path: Path) -> None:
    folder = export(Scorer(), tmp_path / "own", task="text-classification", tokenizer=tiny_tokenizer())
    with Engine(folder) as engine:
        expected = engine.run([0, 5, 6, 2])["score"][0]
    with running({"own": folder}) as started, started.client() as client:
        for inputs, outputs in (({"ids": [0, 5, 6, 2]}, None), ({"ids": [0, 5, 6, 2]}, ["score"]), ("the fox", None)):
            (result,) = answered(client, "/run", {"inputs": inputs, "outputs": outputs})["results"]
            assert isinstance(result["outputs"]["score"], float)
            assert result["answers"] == []
            if inputs != "the fox":
                assert is_close(result["outputs"]["score"], expected)
        for raw in (False, True):
            reply = post(client, "/predict", {"inputs": "the fox", "raw_scores": raw})
            assert reply.status_code == 424
            assert "has no output logits of (batch, labels); its outputs are score" in reply.json()["error"]


def test_openai_embeddings_have_openais_form(client: httpx.Client, bundle: MakeBundle) -> None:
    with Engine(bundle("sentence-embedding")) as engine:
        expected = engine.embed(TEXTS[:3])
    body = {"input": TEXTS[:3], "model": "emb", "user": "somebody", "dimensions": 32, "other": None}
    floats = answered(client, "/v1/embeddings", body)
    encoded = answered(client, "/v1/embeddings", {**body, "encoding_format": "base64"})
    assert floats.keys() == {"object", "data", "model", "usage"}
    assert (floats["object"], floats["model"]) == ("list", "emb")
    assert floats["usage"]["prompt_tokens"] == floats["usage"]["total_tokens"] > 0
    for i, (plain, packed) in enumerate(zip(floats["data"], encoded["data"], strict=True)):
        assert (plain["object"], plain["index"]) == ("embedding", i)
        assert is_close(plain["embedding"], expected[i])
        assert is_close(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"), expected[i])


def test_openai_embeddings_take_ids(client: httpx.Client, bundle: MakeBundle) -> None:
    with Engine(bundle("sentence-embedding")) as engine:
        ids = Tokenizer(bundle("sentence-embedding"), engine.signature).encode(TEXTS[0]).ids
        expected = engine.embed(TEXTS[0])[0]
    for given in (ids, [ids], [ids, ids]):
        reply = answered(client, "/v1/embeddings", {"input": given, "model": "emb"})
        assert all(is_close(row["embedding"], expected) for row in reply["data"])
        assert reply["usage"]["prompt_tokens"] == len(ids) * len(reply["data"])


def test_openai_ids_without_the_models_special_tokens_are_refused(client: httpx.Client) -> None:
    """LangChain's OpenAIEmbeddings sends ids of tiktoken unless it is told not to."""
    for given in ([5, 6, 7], [[0, 5, 2], [5, 6, 2]], [0, 5, 6], [[]]):
        reply = post(client, "/v1/embeddings", {"input": given, "model": "emb"})
        assert reply.status_code == 400
        assert "do not begin with [0] and end with [2]" in reply.json()["error"]["message"]


def test_a_compressed_body_is_refused(client: httpx.Client) -> None:
    body = gzip.compress(json.dumps({"inputs": "fox"}).encode())
    reply = client.post("/run", content=body, headers={"Content-Encoding": "gzip"})
    assert (reply.status_code, reply.json()["error"]) == (
        415,
        "the body is compressed; send it without Content-Encoding",
    )


def test_openai_models_are_listed(client: httpx.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == list(TASKS)
    assert client.get("/v1/models/org/bare").json()["id"] == "org/bare"
    assert client.get("/v1/models/nope").json()["error"]["code"] == "model_not_found"


def test_embed_has_the_form_of_text_embeddings_inference(client: httpx.Client, bundle: MakeBundle) -> None:
    with Engine(bundle("sentence-embedding")) as engine:
        expected = engine.embed(TEXTS[:2])
    assert is_close(answered(client, "/models/emb/embed", {"inputs": TEXTS[:2], "normalize": False}), expected)
    body = {
        "inputs": TEXTS[0],
        "truncation_direction": "Right",
        "truncate": None,
        "normalize": None,
        "dimensions": None,
    }
    (normalized,) = answered(client, "/models/emb/embed", body)
    assert math.isclose(float(np.linalg.norm(normalized)), 1.0, abs_tol=1e-5)


def test_predict_has_the_form_of_text_embeddings_inference(client: httpx.Client) -> None:
    one = answered(client, "/predict", {"inputs": "the fox"})
    assert [label.keys() for label in one] == [{"score", "label"}] * 2
    assert one[0]["score"] >= one[1]["score"]
    assert math.isclose(sum(label["score"] for label in one), 1.0, abs_tol=1e-5)
    pair = answered(client, "/predict", {"inputs": ["the fox", "a dog"]})
    batch = answered(client, "/models/cls/predict", {"inputs": [["the fox"], ["the fox", "a dog"]]})
    for alone, together in zip((one, pair), batch, strict=True):
        assert [label["label"] for label in alone] == [label["label"] for label in together]
        assert is_close([label["score"] for label in alone], [label["score"] for label in together])
    raw = answered(client, "/predict", {"inputs": "the fox", "raw_scores": True})
    logits = answered(client, "/run", {"inputs": "the fox", "outputs": ["logits"]})["results"][0]["outputs"]["logits"]
    assert is_close([label["score"] for label in raw], sorted(logits, reverse=True))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/run", {"inputs": LONG}),
        ("/predict", {"inputs": LONG}),
        ("/models/emb/embed", {"inputs": LONG}),
        ("/v1/embeddings", {"input": LONG, "model": "emb"}),
    ],
    ids=["run", "predict", "embed", "openai"],
)
def test_a_text_longer_than_the_model_takes_is_refused_or_cut(client: httpx.Client, path: str, body: Any) -> None:
    reply = post(client, path, body)
    assert reply.status_code == 413
    assert "502 tokens, above the model's maximum 128; shorten it, or give truncate: true" in reply.text
    answered(client, path, {**body, "truncate": True})
    if path == "/run":
        (result,) = answered(client, path, {**body, "truncate": True})["results"]
        assert (result["truncated"], result["tokens"]) == (True, 128)


def test_a_document_before_choices_is_cut_and_no_choice_is(client: httpx.Client) -> None:
    body = {"inputs": {"text": LONG, "choices": ["the fox", "the dog"]}, "model": "choice", "truncate": True}
    (result,) = answered(client, "/run", body)["results"]
    assert (result["truncated"], result["tokens"]) == (True, 2 * 128)
    assert len({answer["score"] for answer in result["answers"]}) == 2


BAD_REQUESTS: list[tuple[str, Any, int, str]] = [
    ("/run", b"", 422, "the body is not JSON"),
    ("/run", b"{", 422, "the body is not JSON"),
    ("/run", b"[" * 3000, 422, "the body is not JSON"),
    ("/run", b"\xff\xfe{", 422, "the body is not JSON"),
    ("/run", b'{"inputs": "fox", "inputs": "dog"}', 422, "appears twice"),
    ("/run", b'{"inputs": NaN}', 422, "NaN is not JSON"),
    ("/run", b'{"inputs": {"ids": [' + b"9" * 5000 + b"]}}", 422, "the body is not JSON"),
    ("/run", [], 422, "the body is list; give a JSON object"),
    ("/run", {}, 422, "inputs: Field required"),
    ("/run", {"inputs": 5}, 422, "inputs: give a text, an object with text"),
    ("/run", {"inputs": []}, 422, "inputs is an empty list"),
    ("/run", {"inputs": "fox", "truncate": 1}, 422, "truncate: "),
    ("/run", {"inputs": "fox", "input": "dog"}, 422, "input: "),
    ("/run", {"inputs": "fox", "outputs": ["nope"]}, 422, "the model has no output 'nope'; its outputs are logits"),
    ("/run", {"inputs": "fox", "model": "nope"}, 404, "the model 'nope' does not exist; the models are: cls, emb"),
    ("/run", {"inputs": "\ud800"}, 422, "not UTF-8"),
    ("/run", {"inputs": {}}, 422, "neither text nor ids"),
    ("/run", {"inputs": {"text": "a", "ids": [5]}}, 422, "both ids and a text"),
    ("/run", {"inputs": {"ids": []}}, 422, "empty"),
    ("/run", {"inputs": {"ids": [0, 5, 2]}, "model": "emb", "prompt": "query: "}, 422, "prompt is put before a text"),
    ("/run", {"inputs": {"ids": [[0, 5], [0, 6]]}}, 422, "each sequence as an input of its own"),
    ("/run", {"inputs": {"ids": [99]}}, 422, "outside the vocabulary of 99"),
    ("/run", {"inputs": {"ids": [-1]}}, 422, "negative"),
    ("/run", {"inputs": {"ids": [10**40]}}, 422, "does not fit"),
    ("/run", {"inputs": {"ids": [5] * 129}}, 413, "129 tokens, above the model's maximum 128"),
    ("/run", {"inputs": {"text": "a", "attention_mask": [1]}}, 422, "a mask and no ids"),
    ("/run", {"inputs": {"text": "a", "choices": ["b"]}}, 422, "takes no choices"),
    ("/run", {"inputs": "a", "prompt": "b"}, 422, "takes no prompt"),
    ("/models/qa/run", {"inputs": "a"}, 422, "needs the question as text, and the document as pair"),
    ("/models/choice/run", {"inputs": "a"}, 422, "needs the prompt as text, and a list of choices"),
    ("/models/choice/run", {"inputs": {"text": "a", "choices": ["b"] * 33}}, 413, "33 choices, above the 32"),
    ("/run", {"inputs": ["fox"] * 33}, 413, "33 inputs, above the 32 that this server takes"),
    ("/run", '{"inputs": "fox"}'.encode("utf-16"), 422, "the body is not JSON"),
    ("/run", '{"inputs": "fox"}'.encode("utf-32-le"), 422, "the body is not JSON"),
    ("/models/cls/run", {"inputs": "fox", "model": "emb"}, 422, "the path is of the model cls, and model is 'emb'"),
    ("/models//run", {"inputs": "fox"}, 404, "the model '' does not exist"),
    ("/nope", {}, 404, "there is no route '/nope'"),
    ("/health", {}, 405, "/health does not take 'POST' requests"),
    ("/predict", {"inputs": ["a", "b", "c"]}, 422, "give a text, a pair"),
    ("/predict", {"inputs": ["a", ["b"]]}, 422, "give a text, a pair"),
    ("/predict", {"inputs": [[]]}, 422, "give a text, a pair"),
    ("/predict", {"inputs": ""}, 400, "cannot be empty"),
    ("/models/emb/predict", {"inputs": "a"}, 424, "its task is sentence-embedding"),
    ("/embed", {"inputs": "a"}, 424, "its task is text-classification"),
    ("/models/emb/embed", {"inputs": []}, 400, "cannot be empty"),
    ("/models/emb/embed", {"inputs": "a", "truncation_direction": "Left"}, 422, "truncation_direction: right"),
    ("/models/emb/embed", {"inputs": "a", "prompt_name": "query"}, 422, "prompt_name: null"),
    ("/models/emb/embed", {"inputs": "a", "dimensions": 8}, 422, "dimensions: null"),
    ("/models/nope/embed", {"inputs": "a"}, 404, "the model 'nope' does not exist"),
    ("/v1/embeddings", b"{", 400, "the body is not JSON"),
    ("/v1/embeddings", {"input": 5}, 400, "input: give a text, a list of texts"),
    ("/v1/embeddings", {"input": ["a", 5]}, 400, "input: give a text, a list of texts"),
    ("/v1/embeddings", {"input": [], "model": "emb"}, 400, "input is empty"),
    ("/v1/embeddings", {"input": ["a", ""], "model": "emb"}, 400, "input has an empty text"),
    ("/v1/embeddings", {"input": "a", "model": "emb", "dimensions": 8}, 400, "dimensions is 8, and this model has 32"),
    ("/v1/embeddings", {"input": "a", "model": "emb", "encoding_format": "int8"}, 400, "encoding_format: give float"),
    ("/v1/embeddings", {"input": "a", "model": "cls"}, 424, "its task is text-classification"),
    ("/v1/embeddings", {"input": "a", "model": "cls", "dimensions": 8}, 424, "its task is text-classification"),
    ("/v1/embeddings", {"input": "a", "model": "nope"}, 404, "the model 'nope' does not exist"),
]


@pytest.mark.parametrize(
    ("path", "inputs"), [("/run", ["fox"] * 32), ("/models/choice/run", {"text": "a", "choices": ["b"] * 32})]
)
def test_as_many_inputs_and_choices_as_the_limit_are_answered(client: httpx.Client, path: str, inputs: Any) -> None:
    reply = client.post(path, json={"inputs": inputs})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("path", "body", "status", "reason"), BAD_REQUESTS)
def test_a_bad_request_gets_the_reason_in_its_apis_form(
    client: httpx.Client, path: str, body: Any, status: int, reason: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(path, content=content)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    if path.startswith("/v1/"):
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        error = error["message"]
    assert ("error_type" in reply.json()) == path.endswith(("/embed", "/predict"))
    assert reason in error
    assert len(error) < 400
    answered(client, "/run", {"inputs": "the fox"})  # on the same connection


@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_ids_do_not_count_for_answers(client: httpx.Client, side: str) -> None:
    question, document = [0, 10, 11, 2, 2], [(7 * i) % 40 + 5 for i in range(12)]
    ids, marks = [*question, *document, 2], [1, 1, 1] + [0] * 15

    def padded(row: list[int], fill: int) -> list[int]:
        return [fill] * 20 + row if side == "left" else row + [fill] * 20

    for path in ("/models/qa/run", "/models/ner/run"):
        plain = {"ids": ids, "global_attention_mask": marks}
        masked = {
            "ids": padded(ids, 1),
            "attention_mask": padded([1] * len(ids), 0),
            "global_attention_mask": padded(marks, 0),
        }
        expected, actual = (answered(client, path, {"inputs": one})["results"][0] for one in (plain, masked))
        assert actual["tokens"] == expected["tokens"] == len(ids)
        for one, other in zip(actual["answers"], expected["answers"], strict=True):
            assert one.keys() == other.keys()
            assert {**one, "score": 0} == {**other, "score": 0}
            assert one.get("score", 0) == pytest.approx(other.get("score", 0), abs=1e-5)


@pytest.mark.parametrize("form", [native.RunRequest, openai.EmbeddingsRequest, tei.EmbedRequest, tei.PredictRequest])
def test_a_list_is_checked_up_to_its_first_wrong_item(form: Any) -> None:
    """Each wrong item of a list is an error of some hundred bytes, and of a microsecond, in pydantic."""
    name = "input" if "input" in form.model_fields else "inputs"
    for wrong in ([0.5] * 1000, [[0.5] * 1000], [[0.5]] * 1000, [{"ids": [0.5] * 1000}] * 2):
        with pytest.raises(ValidationError) as caught:
            form.model_validate({name: wrong})
        assert caught.value.error_count() <= 12


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_refused_and_the_connection_is_kept(client: httpx.Client, chunked: bool) -> None:
    def sent(size: int) -> httpx.Response:
        body = b" " * (size - 16) + b'{"inputs":"fox"}'
        return client.post("/run", content=iter([body[:1000], body[1000:]]) if chunked else body)

    assert sent(LARGEST_BODY).status_code == 200
    for size in (LARGEST_BODY + 1, 3_800_000):
        reply = sent(size)
        assert reply.status_code == 413
        assert f"above {LARGEST_BODY:,} bytes" in reply.json()["error"]
    answered(client, "/run", {"inputs": "the fox"})


def test_requests_share_a_connection(server: Running) -> None:
    with server.client() as client:
        for _ in range(3):
            answered(client, "/run", {"inputs": "the fox"})
        streams = {reply.extensions["network_stream"] for reply in (client.get("/health"), client.get("/models"))}
        assert len(streams) == 1


def test_health_metrics_and_info_describe_the_models(client: httpx.Client) -> None:
    answered(client, "/run", {"inputs": "the fox"})
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ready"})
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    requests = {sample.labels["model"]: sample.value for sample in families["lfx_requests"].samples}
    assert set(requests) == set(TASKS)
    assert requests["cls"] >= 1
    replies = {(s.labels["route"], s.labels["status"]): s.value for s in families["lfx_http_replies"].samples}
    assert replies["/run", "200"] >= 1
    if sys.platform != "win32":
        assert families["lfx_resident_bytes"].samples[0].value > 1e6
    assert [model["name"] for model in client.get("/models").json()["models"]] == list(TASKS)
    info = client.get("/info").json()
    assert (info["model_id"], info["max_input_length"], info["model_type"]) == ("cls", 128, {"classifier": {}})


def test_load_balancers_may_ask_with_head(client: httpx.Client) -> None:
    for path in ("/health", "/"):
        reply, full = client.head(path), client.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert reply.headers["content-length"] == full.headers["content-length"]
    assert "head" not in client.get("/openapi.json").json()["paths"]["/health"]


def test_a_path_and_its_body_may_name_one_model(client: httpx.Client) -> None:
    answered(client, "/models/cls/run", {"inputs": "the fox", "model": "cls"})


def test_openapi_has_an_example_of_every_request_that_the_server_takes(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    forms = {"run": native.RunRequest, "embeddings": openai.EmbeddingsRequest, "embed": tei.EmbedRequest}
    forms |= {"predict": tei.PredictRequest, "generate": tgi.GenerateRequest}
    posts = {path: methods["post"] for path, methods in described["paths"].items() if "post" in methods}
    assert len(posts) == 11
    for path, operation in posts.items():
        content = operation["requestBody"]["content"]["application/json"]
        assert "$ref" not in json.dumps(content["schema"])
        assert len(content["examples"]) >= 2
        for example in content["examples"].values():
            form = forms[path.rsplit("/", 1)[-1].removesuffix("_stream")]
            parse_body(json.dumps(example["value"]).encode(), form, 32)  # type: ignore[type-var]
        reply = "text/event-stream" if path.endswith("_stream") else "application/json"
        assert "example" in operation["responses"]["200"]["content"][reply]
        assert {"413", "422", "429", "503"} <= set(operation["responses"])


def test_numbers_that_json_does_not_have_become_null() -> None:
    array = np.array([[1.5, np.nan], [np.inf, -np.inf]], np.float32)
    value = {"array": array, "ids": np.array([1, 2]), "list": [float("nan"), 1.0], "text": "\ud800\u2028"}
    assert json.loads(dumps(value)) == {
        "array": [[1.5, None], [None, None]],
        "ids": [1, 2],
        "list": [None, 1.0],
        "text": "\ud800\u2028",
    }


def reply_size(encoding: str) -> ReplySize:
    return ReplySize(Share(Memory(REPLY_BYTES, "the outputs")), encoding)


def test_outputs_that_are_too_large_for_a_reply_are_refused() -> None:
    class Large(np.ndarray[Any, Any]):
        size = MAX_JSON_NUMBERS + 1
        nbytes = 65 << 20

    with pytest.raises(RefusalError, match=r'500,001 numbers.*give encoding: "base64"'):
        reply_size("float").add(np.zeros(1).view(Large))
    with pytest.raises(RefusalError, match="68,157,440 bytes or more, above the 67,108,864 of a reply"):
        reply_size("base64").add(np.zeros(1).view(Large))


def test_the_outputs_of_all_inputs_are_counted_for_a_reply() -> None:
    size, row = reply_size("float"), np.zeros(MAX_JSON_NUMBERS // 2, np.float32)
    size.add(row)
    size.add(row)
    with pytest.raises(RefusalError, match="500,001 numbers or more"):
        size.add(np.zeros(1, np.float32))


def test_what_all_requests_hold_has_a_limit() -> None:
    memory = Memory(100, "the outputs")
    with Share(memory) as first:
        first.take(60)
        with Share(memory) as second, pytest.raises(RefusalError, match="the outputs are above 100 bytes") as caught:
            second.take(60)
        assert caught.value.status == 429
    first.take(60)  # by a thread that goes on after its request has ended
    with Share(memory) as third:
        third.take(60)
        assert memory.held == 60
    assert memory.held == 0


@pytest.mark.parametrize("item", [{}, "", "fox", [], ["fox"], None, {"a": 1}])
def test_inputs_are_counted_before_they_are_checked(item: Any) -> None:
    """To check hundreds of thousands takes seconds, in which no other thread runs."""
    for form in (native.RunRequest, tei.PredictRequest, tei.EmbedRequest):
        with pytest.raises(RefusalError, match="the request has 33 inputs, above the 32"):
            parse_body(json.dumps({"inputs": [item] * 33}).encode(), form, 32)
    with pytest.raises(RefusalError, match="the request has 33 inputs, above the 32"):
        parse_body(json.dumps({"inputs": None, "input": [item] * 33}).encode(), openai.EmbeddingsRequest, 32)


def test_ids_and_a_pair_are_one_input() -> None:
    parse_body(json.dumps({"input": [5] * 100}).encode(), openai.EmbeddingsRequest, 1)
    parse_body(json.dumps({"inputs": ["fox", "dog"]}).encode(), tei.PredictRequest, 1)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/embeddings", {"input": ["a", "b"], "model": "emb"}, 'give encoding_format: "base64", or ask'),
        ("/models/emb/embed", {"inputs": ["a", "b"]}, "of a JSON reply; ask for fewer"),
        ("/run", {"inputs": ["a", "b"], "model": "emb"}, 'give encoding: "base64", or ask'),
    ],
    ids=["openai", "tei", "run"],
)
def test_base64_is_named_where_a_route_has_it(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, message: str
) -> None:
    monkeypatch.setattr(limits, "MAX_JSON_NUMBERS", 63)
    reply = post(client, path, body)
    assert reply.status_code == 413
    error = reply.json()["error"]
    assert message in (error["message"] if path.startswith("/v1") else error)


def test_openai_embeddings_in_base64_may_have_more_numbers_than_json(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_JSON_NUMBERS", 63)
    body = {"input": ["a", "b"], "model": "emb"}
    assert len(answered(client, "/v1/embeddings", {**body, "encoding_format": "base64"})["data"]) == 2
    assert answered(client, "/v1/embeddings", {"input": "a", "model": "emb", "encoding_format": None})["data"]
