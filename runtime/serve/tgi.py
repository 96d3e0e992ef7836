"""The API of text-generation-inference: POST /generate and /generate_stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import Response
from pydantic import Field

from lfx.errors import LfxError
from lfx.runtime.serve.body import Body, StrictBody, read_body
from lfx.runtime.serve.model import ServedModel
from lfx.runtime.serve.replies import EventStream, RefusalError, error_body, event, json_reply, refusal_of, unavailable
from lfx.runtime.serve.service import Service
from lfx.runtime.serve.writing import Written, WrittenToken
from lfx.signature import TEXT_GENERATION


class Parameters(StrictBody):
    """Options of generation; those that are left out or null are the checkpoint's."""

    max_new_tokens: int | None = Field(None, description="give the largest number of generated tokens")
    min_new_tokens: int | None = Field(None, description="give the smallest number of generated tokens (not TGI's)")
    do_sample: bool | None = Field(None, description="give true to sample, or false to search")
    temperature: float | None = Field(None, description="give a number that divides the logits, for sampling")
    top_k: int | None = Field(None, description="give the number of likeliest tokens to sample from")
    top_p: float | None = Field(None, description="give the probability of the likeliest tokens to sample from")
    seed: int | None = Field(None, description="give a whole number, which repeats the tokens of a sampled text")
    repetition_penalty: float | None = Field(
        None, description="give a number; above 1 the tokens of the text become less likely"
    )
    num_beams: int | None = Field(None, description="give the number of beams (not TGI's)")
    length_penalty: float | None = Field(None, description="give a number; above 0 beams prefer long texts (not TGI's)")
    early_stopping: bool | Literal["never"] | None = Field(
        None, description="give true, false or 'never': when beams end (not TGI's)"
    )
    no_repeat_ngram_size: int | None = Field(
        None, description="give the size of n-grams that may not come twice (not TGI's)"
    )
    details: bool | None = Field(False, description="give true for the tokens, their number and the reason of the end")
    truncate: bool | None = Field(
        False, description="give true to have a text cut that is longer than the model takes (TGI: a number)"
    )
    # Options that clients of TGI send, with the values that change nothing.
    best_of: Literal[1] | None = Field(None, description="give null or 1")
    stop: list[str] | None = Field(None, max_length=0, description="give null or an empty list")
    typical_p: None = Field(None, description="give null")
    frequency_penalty: None = Field(None, description="give null")
    top_n_tokens: None = Field(None, description="give null")
    grammar: None = Field(None, description="give null")
    adapter_id: None = Field(None, description="give null")
    return_full_text: Literal[False] | None = Field(None, description="give null or false")
    watermark: Literal[False] | None = Field(None, description="give null or false")
    decoder_input_details: Literal[False] | None = Field(None, description="give null or false")


class GenerateRequest(Body):
    """A request for a text, such as the summary of a document."""

    inputs: str = Field(description="give a text")
    parameters: Parameters | None = Field(None, description="give an object of options, or leave it out")
    model: str | None = Field(None, description="name of a model; the first one if it is left out (not TGI's)")
    stream: bool | None = Field(None, description="give true at /generate_stream alone")


EXAMPLES: dict[str, Any] = {
    "a summary": {"inputs": "A long document …", "parameters": {"max_new_tokens": 128}},
    "beams, with details": {"inputs": "A …", "parameters": {"num_beams": 4, "details": True}},
    "a sample": {"inputs": "A …", "parameters": {"do_sample": True, "top_p": 0.9, "seed": 1}},
}
STREAM_EXAMPLES: dict[str, Any] = {
    "a summary": {"inputs": "A long document …", "parameters": {"max_new_tokens": 128}},
    "a sample, with details": {"inputs": "A …", "parameters": {"do_sample": True, "seed": 1, "details": True}},
}
REPLY: dict[str, Any] = {"generated_text": "A summary."}
STREAM_REPLY = event(
    {
        "index": 1,
        "token": {"id": 83, "text": "A", "logprob": None, "special": False},
        "generated_text": None,
        "details": None,
    }
).decode()
_STREAM_PATH = "/generate_stream"
_OTHERS = {"details", "truncate"}
_UNUSED = {"best_of", "stop", "return_full_text", "watermark", "decoder_input_details"}


async def generate(service: Service, data: bytes, name: str | None) -> Response:
    """Answer POST /generate: the text that the model writes."""
    body, model = await _read(service, data, name)
    if body.stream:
        raise RefusalError(422, f"/generate has no stream; ask {_STREAM_PATH}")
    parameters = body.parameters or Parameters.model_validate({})

    def reply(written: Written) -> Response:
        value: dict[str, Any] = {"generated_text": written.text}
        if parameters.details:
            tokens = [token.to_dict() for token in model.written_tokens(written.ids)]
            value["details"] = {**_details(written, parameters), "prefill": [], "tokens": tokens}
        return json_reply(value)

    truncate = bool(parameters.truncate)
    return await service.generate(model, body.inputs, _options(parameters), reply, truncate=truncate)


async def generate_stream(service: Service, data: bytes, name: str | None) -> Response:
    """Answer POST /generate_stream: the tokens as they come, and with the last one the text."""
    body, model = await _read(service, data, name)
    parameters = body.parameters or Parameters.model_validate({})
    tokens = service.stream(model, body.inputs, _options(parameters), truncate=bool(parameters.truncate))
    # Errors before the first token have their own status.
    first = await anext(tokens)
    return EventStream(_events(service, first, tokens, parameters))


async def _read(service: Service, data: bytes, name: str | None) -> tuple[GenerateRequest, ServedModel]:
    """The body of a request, and its model."""
    body = await read_body(service, data, GenerateRequest)
    model = service.chosen(name, body.model)
    if model.signature.task != TEXT_GENERATION:
        reason = f"the model {model.name} writes no texts: its task is {model.signature.task}"
        raise RefusalError(424, reason, "Backend")
    return body, model


def _options(parameters: Parameters) -> dict[str, Any]:
    """The options of `Engine.generate`."""
    return {key: value for key, value in dict(parameters).items() if key not in _OTHERS | _UNUSED and value is not None}


def _details(written: Written, parameters: Parameters) -> dict[str, Any]:
    return {
        "finish_reason": "eos_token" if written.ended else "length",
        "generated_tokens": len(written.ids),
        "seed": parameters.seed,
    }


async def _events(
    service: Service,
    first: tuple[WrittenToken, Written | None],
    tokens: AsyncGenerator[tuple[WrittenToken, Written | None], None],
    parameters: Parameters,
) -> AsyncGenerator[bytes, None]:
    """Yield an event for each token; an error ends the stream with an event of its own."""
    try:
        (token, written), index = first, 1
        while written is None:
            yield _token_event(index, token)
            (token, written), index = await anext(tokens), index + 1
        details = {**_details(written, parameters), "input_length": written.tokens} if parameters.details else None
        yield _token_event(index, token, written.text, details)
    except RefusalError as refusal:
        yield event(error_body(_STREAM_PATH, refusal))
    except LfxError as error:
        yield event(error_body(_STREAM_PATH, refusal_of(error)))
    except asyncio.CancelledError:  # by the server if it stops, otherwise since the client has gone
        if service.state != "stopping":
            raise
        yield event(error_body(_STREAM_PATH, unavailable("the server stopped before the text was written; try again")))
    finally:
        await tokens.aclose()


def _token_event(
    index: int, token: WrittenToken, text: str | None = None, details: dict[str, Any] | None = None
) -> bytes:
    return event({"index": index, "token": token.to_dict(), "generated_text": text, "details": details})
