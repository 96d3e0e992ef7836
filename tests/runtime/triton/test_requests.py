"""Requests that a model answers for Triton, without a server."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError, LfxError
from lfx.manifest import Manifest
from lfx.runtime import Engine
from lfx.runtime.tokenizer import Tokenizer
from lfx.runtime.triton import requests as requests_module
from lfx.runtime.triton.requests import ANSWERS, Request, TritonModel, output_specs
from tests.conftest import MakeBundle


@pytest.mark.parametrize("task", ["question-answering", "token-classification"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_ids_do_not_count_for_answers(task: str, side: str, bundle: MakeBundle) -> None:
    row = np.array([[0, 10, 11, 2, 2, *((7 * i) % 40 + 5 for i in range(12)), 2]])
    width = ((0, 0), (20, 0) if side == "left" else (0, 20))
    plain = {"input_ids": row, "attention_mask": np.ones_like(row), "global_attention_mask": (row == 10).astype(int)}
    padded = {name: np.pad(array, width) for name, array in plain.items()}
    padded["input_ids"][padded["attention_mask"] == 0] = 1
    with Engine(bundle(task), threads=1) as engine:
        model = TritonModel(engine, Tokenizer(bundle(task), engine.signature))
        replies = model.answer([Request(inputs, frozenset({ANSWERS})) for inputs in (plain, padded)])
    expected, actual = (json.loads(reply[ANSWERS][0].tobytes()) for reply in replies if isinstance(reply, dict))
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert {**one, "score": 0} == {**other, "score": 0}
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_batch_that_fails_is_the_error_of_its_requests_alone(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(bundle(), threads=1, token_budget=20) as engine:
        infer = type(engine._backend).infer

        def fail_on_long(backend: object, feeds: dict[str, np.ndarray], *names: object, **options: object) -> object:
            if feeds["input_ids"].shape[1] > 20:
                raise LfxError("out of memory")
            return infer(backend, feeds, *names, **options)

        monkeypatch.setattr(type(engine._backend), "infer", fail_on_long)
        inputs = [{"input_ids": np.full((1, seqlen), 5)} for seqlen in (7, 40, 9)]
        requests = [Request(one, frozenset({"pooler_output"})) for one in inputs]
        replies = TritonModel(engine, None).answer(requests)
    assert [isinstance(reply, LfxError) for reply in replies] == [False, True, False]


def test_an_unexpected_error_is_that_of_its_request_alone(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_seven(prepare: Any, inputs: Any, *masks: Any) -> Any:
        if inputs.shape[1] == 7:
            raise RuntimeError("a bug")
        return prepare(inputs, *masks)

    prepare = requests_module.prepare
    monkeypatch.setattr(requests_module, "prepare", lambda *args: fail_on_seven(prepare, *args))
    ids = [{"input_ids": np.full((1, seqlen), 5)} for seqlen in (6, 7, 9)]
    requests = [Request(one, frozenset({"pooler_output"})) for one in ids]
    unread = InputError("a parameter of the request is not UTF-8; convert it first")
    with Engine(bundle(), threads=1) as engine:
        replies = TritonModel(engine, None).answer([*requests, unread])
    assert [isinstance(reply, LfxError) for reply in replies] == [False, True, False, True]
    assert str(replies[1]) == "RuntimeError in lfx: a bug; please report it"
    assert replies[3] is unread


def test_choices_of_different_lengths_are_refused_by_a_model_without_attention_mask(bundle: MakeBundle) -> None:
    with Engine(bundle("multiple-choice"), threads=1) as engine:
        inputs = tuple(spec for spec in engine.signature.inputs if spec.name != "attention_mask")
        engine.signature = replace(engine.signature, inputs=inputs)
        model = TritonModel(engine, Tokenizer(bundle("multiple-choice"), engine.signature))
        choices = np.frombuffer(b"fox\0\0\0\0\0lazy dog", np.uint8).reshape(1, 2, 8)
        texts = {"text": np.frombuffer(b"the", np.uint8)[None], "choices": choices}
        (reply,) = model.answer([Request(texts, frozenset({"logits"}))])
    assert isinstance(reply, InputError)
    assert "takes no attention_mask" in str(reply)


@pytest.mark.parametrize(("name", "task"), [("num_tokens", "feature-extraction"), ("answers", "fill-mask")])
def test_an_output_with_a_name_of_lfx_is_refused(name: str, task: str, bundle: MakeBundle) -> None:
    signature = Manifest.read(bundle(task)).signature
    renamed = replace(signature, outputs=(*signature.outputs, replace(signature.outputs[0], name=name)))
    with pytest.raises(InputError, match=f"the model has an output {name}, a name that lfx gives"):
        output_specs(renamed, has_tokenizer=True)
    assert output_specs(renamed, has_tokenizer=False) == list(renamed.outputs)
