"""lfx's own endpoint: every task, texts or ids, answers and outputs."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
from fastapi import Response
from pydantic import Field

from lfx.errors import InputError
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.serve.body import List, StrictBody, read_body
from lfx.runtime.serve.limits import ReplySize, Share
from lfx.runtime.serve.model import Input, Prepared, ServedModel
from lfx.runtime.serve.replies import array_reply, json_reply
from lfx.runtime.serve.service import Service

Ids = List[int] | List[List[int]]


class OneInput(StrictBody):
    """A text with its pair or choices, or ids with their masks."""

    text: str | None = Field(None, description="the text; for question answering the question")
    pair: str | None = Field(None, description="the document of a question, or the second text of a pair")
    choices: List[str] | None = Field(None, description="the choices after the text, for multiple choice")
    ids: Ids | None = Field(
        None, description="the model's ids with its special tokens; for multiple choice a list for each choice"
    )
    attention_mask: Ids | None = Field(None, description="for ids: 1 = a real token, 0 = padding")
    global_attention_mask: Ids | None = Field(None, description="for ids: 1 = the token attends globally")


class RunRequest(StrictBody):
    """A request for one or several inputs."""

    inputs: str | OneInput | List[str | OneInput] = Field(
        description="give a text, an object with text (and pair or choices) or with ids, or a list of these"
    )
    model: str | None = Field(None, description="name of a model; the first one if it is left out")
    truncate: bool = Field(False, description="true: a text longer than the model takes is cut")
    prompt: str | None = Field(None, description="for sentence embeddings: a text to put before each text")
    outputs: List[str] | None = Field(
        None,
        description="names of the model's outputs to return. If it is left out: none for a model with answers, and "
        "otherwise the outputs without a sequence axis",
    )
    encoding: Literal["float", "base64"] = Field(
        "float", description="give float, for lists of numbers, or base64, for little-endian bytes"
    )


EXAMPLES: dict[str, Any] = {
    "a text": {"inputs": "A long document …"},
    "a question": {"inputs": {"text": "Who?", "pair": "A long document …"}},
    "several texts, cut if they are too long": {"inputs": ["One …", "Another …"], "truncate": True},
    "ids, and an output": {"inputs": {"ids": [0, 713, 2]}, "outputs": ["logits"]},
    "multiple choice": {"inputs": {"text": "The sky is", "choices": ["blue", "loud"]}},
}
REPLY: dict[str, Any] = {
    "model": "my-bundle",
    "task": "text-classification",
    "results": [
        {"tokens": 3, "truncated": False, "answers": [{"label": "POSITIVE", "score": 0.98}], "outputs": {}},
    ],
    "tokens": 3,
    "latency_ms": 12.5,
}


async def run(service: Service, data: bytes, name: str | None) -> Response:
    """Answer a request with the model `name`; None = the model that the body names, or the first."""
    start = time.perf_counter()
    body = await read_body(service, data, RunRequest)
    model = service.chosen(name, body.model)
    items = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    if not items:
        raise InputError("inputs is an empty list; give at least one")
    names = _output_names(model, body.outputs)
    with Share(service.reply_memory) as share:
        size = ReplySize(share, body.encoding)

        def read(prepared: Prepared, outputs: Outputs) -> dict[str, Any]:
            # With "...", the row of an output of shape (batch,) is an array too, and not one of numpy's scalars.
            row = {name: np.asarray(outputs[name])[0, ...] for name in names}
            size.add(*row.values())
            return {
                "tokens": prepared.tokens,
                "truncated": prepared.truncated,
                "answers": model.answers(prepared, outputs),
                "outputs": row,
            }

        def reply(results: list[dict[str, Any]], tokens: int) -> Response:
            for result in results:
                result["outputs"] = {
                    name: array_reply(array, body.encoding) for name, array in result["outputs"].items()
                }
            latency_ms = round((time.perf_counter() - start) * 1000, 3)
            content = {
                "model": model.name,
                "task": model.signature.task,
                "results": results,
                "tokens": tokens,
                "latency_ms": latency_ms,
            }
            return json_reply(content)

        return await service.answer(model, [_input(item, body, names) for item in items], read, reply)


def _input(item: str | OneInput, body: RunRequest, names: list[str]) -> Input:
    fields = {"text": item} if isinstance(item, str) else dict(item)
    return Input(**fields, prompt=body.prompt, truncate=body.truncate, outputs=tuple(names))


def _output_names(model: ServedModel, requested: list[str] | None) -> list[str]:
    """Names of the outputs to return; the default is that of `RunRequest.outputs`."""
    specs = {spec.name: spec for spec in model.signature.outputs}
    if requested is None:
        return [] if model.has_answers else [name for name, spec in specs.items() if "sequence" not in spec.shape]
    for name in requested:
        if name not in specs:
            raise InputError(f"the model has no output {name[:100]!r}; its outputs are {', '.join(specs)}")
    return list(dict.fromkeys(requested))
