"""Every form of a request, of every task: Triton's model and Batcher answer as Engine.run answers each row alone.

Enumerated are ids (lengths x batch sizes x ids that are none x forms of both masks) and texts (texts x second texts or
choices x parameters x batch sizes), each with another selection of outputs. Requests that the model takes and requests
that it refuses are given together, and a bad one must have an error of its own and harm no other.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError
from lfx.runtime import Batcher, Engine
from lfx.runtime.inputs import pad_choices
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import Tokenizer
from lfx.runtime.triton.requests import ANSWERS, TOKENS, Request, TritonModel, output_specs
from lfx.signature import Signature
from tests.conftest import MakeBundle
from tests.models import LONGFORMER_TASKS

Arrays = dict[str, Any]
MASKS = ("attention_mask", "global_attention_mask")
TEXTS = [b"", b"the fox", b"the quick brown fox </s>", b"fox " * 130, b"\xff", "é 🦊".encode()]
PARAMETERS: list[dict[str, Any]] = [{}, {"truncate": True}, {"truncate": 1}, {"prompt": "the "}, {"prompt": 5}]


def requests_of_ids(signature: Signature, batches: tuple[int, ...]) -> Iterator[Arrays]:
    """Each length, batch size, wrong id and form of both masks; the wrong lengths and ids without masks."""
    for length, batch, wrong in itertools.product((0, 1, 9, 70, 128, 129), batches, (None, -1, 99)):
        ids = np.arange(batch * length).reshape(batch, length) % 90 + 5
        ids[:, :1], ids[:, 2:4], ids[:, -1:] = 0, 2, 2  # two texts
        if wrong is not None:
            ids[-1:, -1:] = wrong
        if signature.has_choices:
            ids = np.stack([ids, ids[::-1]], axis=1)
        ones, right, first = np.ones_like(ids), np.ones_like(ids), np.zeros_like(ids)
        right[-1, ..., length // 2 + 1 :], first[..., :1] = 0, 1
        forms = [None, ones, right, right[..., ::-1], 0 * ones, 2 * ones, ones[..., 1:]]
        forms_of_globals = [None, first, first[..., ::-1], 0 * ones, 2 * ones, ones[..., 1:]]
        if wrong is not None or length in (0, 129):
            forms, forms_of_globals = [None], [None]
        for masks in itertools.product(forms, forms_of_globals):
            given = zip(MASKS, masks, strict=True)
            yield {"input_ids": ids, **{name: mask for name, mask in given if mask is not None}}


def requests_of_texts(signature: Signature) -> Iterator[tuple[list[bytes], list[Any], dict[str, Any]]]:
    """Each text, second text (or choices) and parameter; alone, and as the second of a batch of two."""
    seconds: list[Any] = [[[text], [text, b"a dog"]] for text in TEXTS] if signature.has_choices else [[None, *TEXTS]]
    for text, second, parameters in itertools.product(TEXTS, itertools.chain(*seconds), PARAMETERS):
        yield [text], [second], parameters
        if second is not None:
            yield [b"the lazy dog", text], [second[::-1] if signature.has_choices else b"a fox", second], parameters


def as_bytes(texts: list[Any]) -> Any:
    """Texts, or lists of them, as Triton has them: bytes, with NUL bytes after the shorter ones."""
    nested = np.array(texts, dtype=f"S{max(np.char.str_len(np.array(texts)).max(), 1)}")
    return nested[..., None].view(np.uint8)


def rows_of(arrays: Arrays) -> list[tuple[Any, ...]]:
    """The arguments of Engine.run for each row of a batch."""
    given = [arrays.get(name) for name in ("input_ids", *MASKS)]
    return [tuple(array if array is None else array[i] for array in given) for i in range(len(arrays["input_ids"]))]


class Witness:
    """What Engine.run and Postprocessor give for one row; None where they refuse it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._answers = Postprocessor(tokenizer).answers

    def ids(self, *row: Any) -> tuple[Arrays, int, Any] | None:
        try:
            outputs: Any = self.engine.run(*row)
        except InputError:
            return None
        return outputs, int(row[0].size if row[1] is None else row[1].sum()), None

    def text(self, text: bytes, second: Any, parameters: dict[str, Any]) -> tuple[Arrays, int, Any] | None:
        signature, truncate, prompt = self.engine.signature, parameters.get("truncate", False), parameters.get("prompt")
        if not isinstance(truncate, bool) or (prompt is not None and signature.task != "sentence-embedding"):
            return None
        encode = self.tokenizer.truncate if truncate else self.tokenizer.encode
        try:
            pairs = [None if one is None else one.decode() for one in (second if signature.has_choices else [second])]
            if signature.task == "question-answering" and second is None:
                return None
            encoded = [encode(text.decode(), pair, prompt=prompt) for pair in pairs]
            ids, mask = pad_choices([one.ids for one in encoded], signature.pad_token_id)
            outputs: Any = self.engine.run(ids if signature.has_choices else ids[0], mask if len(mask) > 1 else None)
        except (InputError, UnicodeDecodeError):
            return None
        return outputs, int(mask.sum()), self._answers(encoded[0], outputs)


def without_numbers(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers without their scores, and without an answer's place, which Engine's rows do not have."""
    return [{name: value for name, value in one.items() if name in ("label", "token", "answer")} for one in answers]


def assert_close(name: str, actual: Any, expected: Any) -> None:
    """Compare one row of an output; past the row's own length it must be zero."""
    expected, padded = np.asarray(expected)[0], np.zeros_like(actual)
    padded[tuple(map(slice, expected.shape))] = expected
    np.testing.assert_allclose(actual, padded, rtol=0, atol=2e-5, err_msg=name, strict=True)


@pytest.mark.parametrize("task", LONGFORMER_TASKS)
def test_triton_answers_every_form_of_a_request_as_the_engine_does(task: str, bundle: MakeBundle) -> None:
    with Engine(bundle(task), threads=1) as engine:
        signature, witness = engine.signature, Witness(engine, Tokenizer(bundle(task), engine.signature))
        names = [spec.name for spec in output_specs(signature, has_tokenizer=True)]
        chosen = itertools.cycle([names[i:j] for i, j in itertools.combinations(range(len(names) + 1), 2)])
        requests, expected = [], []
        for arrays in requests_of_ids(signature, (1, 3)):
            requests.append(Request(arrays, frozenset(next(chosen)) - {ANSWERS} or {TOKENS}, {}))
            expected.append([witness.ids(*row) for row in rows_of(arrays)])
        for texts, seconds, parameters in requests_of_texts(signature):
            second = {} if seconds[0] is None else {"choices" if signature.has_choices else "pair": as_bytes(seconds)}
            requests.append(Request({"text": as_bytes(texts), **second}, frozenset(next(chosen)), parameters))
            expected.append([witness.text(*row, parameters) for row in zip(texts, seconds, strict=True)])
        replies = TritonModel(engine, witness.tokenizer).answer(requests)
    assert all(isinstance(reply, InputError) for reply, rows in zip(replies, expected, strict=True) if None in rows)
    for reply, request, rows in zip(replies, requests, expected, strict=True):
        if None in rows:
            continue
        assert isinstance(reply, dict), (reply, request)
        assert reply.keys() == request.outputs
        for i, (outputs, tokens, answers) in enumerate(row for row in rows if row is not None):
            for name, array in reply.items():
                if name == ANSWERS:
                    assert without_numbers(json.loads(array[i].tobytes())) == without_numbers(answers)
                elif name == TOKENS:
                    assert array[i] == tokens
                else:
                    assert_close(name, array[i], outputs[name])


@pytest.mark.parametrize("task", LONGFORMER_TASKS)
def test_batcher_answers_every_form_of_a_request_as_the_engine_does(task: str, bundle: MakeBundle) -> None:
    with Engine(bundle(task), threads=1) as engine, Batcher(engine, max_delay_ms=50, max_pending=10_000) as batcher:
        futures = []
        for arrays in requests_of_ids(engine.signature, (1,)):
            (row,) = rows_of(arrays)
            try:
                expected: Any = engine.run(*row)
            except InputError as error:
                with pytest.raises(InputError, match=re.escape(str(error))):
                    batcher.submit(*row)
                continue
            futures.append((batcher.submit(*row), expected))
        for future, expected in futures:
            for name, array in expected.items():
                assert_close(name, np.asarray(future.result()[name])[0], array)
