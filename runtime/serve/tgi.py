"""The API of text-generation-inference: POST /generate."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Response
from pydantic import Field

from lfx.runtime.serve.body import Body, StrictBody, read_body
from lfx.runtime.serve.replies import RefusalError, dumps
from lfx.runtime.serve.service import Service
from lfx.signature import TEXT_GENERATION


class Parameters(StrictBody):
    """Options of generation; those that are left out or null are the checkpoint's."""

    max_new_tokens: int | None = Field(None, description="largest number of generated tokens")
    min_new_tokens: int | None = Field(None, description="smallest number of generated tokens (not TGI's)")
    do_sample: bool | None = Field(None, description="true: sample; false: search")
    temperature: float | None = Field(None, description="divides the logits, for sampling")
    top_k: int | None = Field(None, description="number of likeliest tokens to sample from")
    top_p: float | None = Field(None, description="probability of the likeliest tokens to sample from")
    seed: int | None = Field(None, description="a seed repeats the tokens of a sampled text")
    repetition_penalty: float | None = Field(None, description="above 1: tokens of the text become less likely")
    num_beams: int | None = Field(None, description="number of beams (not TGI's)")
    length_penalty: float | None = Field(None, description="above 0: beams prefer long texts (not TGI's)")
    early_stopping: bool | Literal["never"] | None = Field(None, description="when beams end (not TGI's)")
    no_repeat_ngram_size: int | None = Field(None, description="no n-gram of this size twice (not TGI's)")
    details: bool | None = Field(False, description="true: with the tokens, their number and the reason of the end")
    truncate: bool | None = Field(False, description="true: a text longer than the model takes is cut (TGI: a number)")
    return_full_text: Literal[False] | None = Field(None, description="null or false. No other value")
    watermark: Literal[False] | None = Field(None, description="null or false. No other value")
    decoder_input_details: Literal[False] | None = Field(None, description="null or false. No other value")


class GenerateRequest(Body):
    """A request for a text, such as the summary of a document."""

    inputs: str = Field(description="give a text")
    parameters: Parameters | None = Field(None, description="give an object of options, or leave it out")


EXAMPLES: dict[str, Any] = {
    "a summary": {"inputs": "A long document …", "parameters": {"max_new_tokens": 128}},
    "beams, with details": {"inputs": "A …", "parameters": {"num_beams": 4, "details": True}},
    "a sample": {"inputs": "A …", "parameters": {"do_sample": True, "top_p": 0.9, "seed": 1}},
}
REPLY: dict[str, Any] = {"generated_text": "A summary."}
_OTHERS = {"details", "truncate", "return_full_text", "watermark", "decoder_input_details"}


async def generate(service: Service, data: bytes, name: str | None) -> Response:
    """Answer POST /generate: the text that the model writes."""
    body = await read_body(service, data, GenerateRequest)
    model = service.model(name)
    if model.signature.task != TEXT_GENERATION:
        reason = f"the model {model.name} writes no texts: its task is {model.signature.task}"
        raise RefusalError(424, reason, "Backend")
    parameters = body.parameters or Parameters.model_validate({})
    options = {key: value for key, value in dict(parameters).items() if key not in _OTHERS and value is not None}
    written = await service.generate(model, body.inputs, options, truncate=bool(parameters.truncate))
    reply: dict[str, Any] = {"generated_text": written.text}
    if parameters.details:
        reply["details"] = {
            "finish_reason": "eos_token" if written.ended else "length",
            "generated_tokens": len(written.ids),
            "seed": parameters.seed,
            "prefill": [],
            "tokens": [{"id": token, "text": text} for token, text in zip(written.ids, written.pieces, strict=True)],
        }
    return await service.render(lambda: Response(dumps(reply), media_type="application/json"))
