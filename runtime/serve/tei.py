"""The API of text-embeddings-inference: POST /embed and /predict, GET /info."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Response
from numpy.typing import NDArray
from pydantic import Field

import lfx
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.postprocess import answer_outputs
from lfx.runtime.serve.body import Body, List, read_body
from lfx.runtime.serve.embeddings import Rows, embed
from lfx.runtime.serve.model import Input, Prepared
from lfx.runtime.serve.replies import RefusalError, json_reply
from lfx.runtime.serve.service import Service

_MODEL = "name of a model; the first one if it is left out (not TEI's)"
_DIRECTION = "right: cut the end of a text, or the side that the tokenizer's truncation_side names. No other value"


class EmbedRequest(Body):
    """A request for embeddings."""

    inputs: str | List[str] = Field(description="give a text or a list of texts")
    model: str | None = Field(None, description=_MODEL)
    truncate: bool | None = Field(False, description="true: a text longer than the model takes is cut")
    truncation_direction: str = Field("Right", description=_DIRECTION, pattern="^[Rr]ight$")
    normalize: bool | None = Field(True, description="true: each embedding has length 1")
    prompt_name: None = Field(None, description="null: the checkpoint's default prompt. No other value")
    dimensions: None = Field(None, description="null: the model's embedding size. No other value")


class PredictRequest(Body):
    """A request for labels."""

    inputs: str | List[str] | List[List[str]] = Field(
        description="give a text, a pair [text, text], or a batch [[text], [text, text], …]"
    )
    model: str | None = Field(None, description=_MODEL)
    truncate: bool | None = Field(False, description="true: a text longer than the model takes is cut")
    truncation_direction: str = Field("Right", description=_DIRECTION, pattern="^[Rr]ight$")
    raw_scores: bool = Field(False, description="true: the scores are logits")


EMBED_EXAMPLES: dict[str, Any] = {
    "a text": {"inputs": "A long document …"},
    "several texts": {"inputs": ["One …", "Another …"], "truncate": True, "normalize": False},
}
EMBED_REPLY: Any = [[0.1, -0.2]]
PREDICT_EXAMPLES: dict[str, Any] = {
    "a text": {"inputs": "A long document …"},
    "a pair": {"inputs": ["A question", "A long document …"], "raw_scores": True},
    "a batch": {"inputs": [["One …"], ["Another …"]]},
}
PREDICT_REPLY: Any = [{"score": 0.98, "label": "POSITIVE"}]


async def embeddings(service: Service, data: bytes, name: str | None) -> Response:
    """Answer POST /embed: a list of embeddings."""
    body = await read_body(service, data, EmbedRequest)
    model = service.chosen(name, body.model)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    _check_not_empty(texts)

    def reply(rows: Rows, _: int) -> Response:
        return json_reply(rows if body.normalize is False else [_normalized(row) for row in rows])

    return await embed(service, model, [Input(text, truncate=bool(body.truncate)) for text in texts], reply)


async def predictions(service: Service, data: bytes, name: str | None) -> Response:
    """Answer POST /predict: the labels and scores of a text, best first, or a list of these for a batch."""
    body = await read_body(service, data, PredictRequest)
    model = service.chosen(name, body.model)
    if model.signature.task != "text-classification":
        reason = f"the model {model.name} is no classifier of texts: its task is {model.signature.task}"
        raise RefusalError(424, reason, "Backend")
    if not answer_outputs(model.signature):
        outputs = ", ".join(spec.name for spec in model.signature.outputs)
        reason = f"the model {model.name} has no output logits of (batch, labels); its outputs are {outputs}"
        raise RefusalError(424, reason, "Backend")
    is_batch = isinstance(body.inputs, list) and any(isinstance(item, list) for item in body.inputs)
    pairs = [_pair(item) for item in (body.inputs if is_batch else [body.inputs])]
    _check_not_empty([text for text, _ in pairs])

    def read(prepared: Prepared, outputs: Outputs) -> list[dict[str, Any]]:
        scores = model.raw_scores(outputs) if body.raw_scores else model.answers(prepared, outputs)
        return [{"score": score["score"], "label": score["label"]} for score in scores]

    def reply(results: list[list[dict[str, Any]]], _: int) -> Response:
        return json_reply(results if is_batch else results[0])

    inputs = [Input(text, pair, truncate=bool(body.truncate)) for text, pair in pairs]
    return await service.answer(model, inputs, read, reply)


def _pair(item: str | list[str] | Any) -> tuple[str, str | None]:
    """A text and the second text of a pair, from "text", ["text"] or ["text", "text"]."""
    parts = [item] if isinstance(item, str) else item
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) for part in parts):
        raise RefusalError(422, "inputs: give a text, a pair [text, text], or a batch [[text], [text, text], …]")
    return parts[0], parts[1] if len(parts) == 2 else None


def _check_not_empty(texts: list[str]) -> None:
    if not texts or not all(texts):
        raise RefusalError(400, "`inputs` cannot be empty, nor can a text; give at least one text", "Empty")


def _normalized(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale an embedding to length 1; a zero vector stays zero."""
    length = float(np.linalg.norm(row))
    return row / np.float32(length) if length > 0 else row


def info(service: Service) -> dict[str, Any]:
    """The reply to GET /info."""
    name = next(iter(service.settings.models))
    model = service.model(name)
    kinds = {"sentence-embedding": "embedding", "text-classification": "classifier"}
    return {
        "model_id": name,
        "model_sha": model.engine.identity,
        "model_dtype": model.engine.precision,
        "model_type": {kinds.get(model.signature.task, model.signature.task): {}},
        "max_concurrent_requests": service.settings.max_pending,
        "max_input_length": model.signature.max_seqlen,
        "max_batch_tokens": model.engine.token_budget,
        "max_client_batch_size": service.settings.max_inputs,
        "auto_truncate": False,
        "version": lfx.__version__,
    }
