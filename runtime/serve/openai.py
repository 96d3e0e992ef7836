"""OpenAI's embeddings API: POST /v1/embeddings and GET /v1/models."""

from __future__ import annotations

import base64
from typing import Any, Literal

from fastapi import Response
from pydantic import Field

from lfx.runtime.embedding import embedding_size
from lfx.runtime.serve.body import Body, List, read_body
from lfx.runtime.serve.embeddings import Rows, embed
from lfx.runtime.serve.model import Input
from lfx.runtime.serve.replies import RefusalError, json_reply
from lfx.runtime.serve.service import Service


class EmbeddingsRequest(Body):
    """OpenAI's request. The field `truncate` is lfx's."""

    input: str | List[str] | List[int] | List[List[int]] = Field(
        description="give a text, a list of texts, a list of token ids, or a list of lists of token ids"
    )
    model: str | None = Field(None, description="name of a model; the first one if it is left out")
    encoding_format: Literal["float", "base64"] | None = Field("float", description="give float or base64")
    dimensions: int | None = Field(None, description="the model's embedding size; no other number is accepted")
    user: str | None = Field(None, description="give a string; it is not used")
    truncate: bool = Field(False, description="true: a text longer than the model takes is cut")


EXAMPLES: dict[str, Any] = {
    "a text": {"input": "A long document …", "model": "my-embedder"},
    "several texts, in base64": {"input": ["One …", "Another …"], "model": "my-embedder", "encoding_format": "base64"},
    "ids, with special tokens": {"input": [0, 713, 2], "model": "my-embedder"},
}
REPLY: dict[str, Any] = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2]}],
    "model": "my-embedder",
    "usage": {"prompt_tokens": 3, "total_tokens": 3},
}


async def embeddings(service: Service, data: bytes) -> Response:
    """Answer POST /v1/embeddings."""
    body = await read_body(service, data, EmbeddingsRequest)
    model = service.model(body.model)
    items = _inputs(body)
    if not items:
        raise RefusalError(400, "input is empty; give at least one text", "Empty", "invalid_value")
    # A model without embeddings is refused by `embed`.
    if (size := _size(model.signature)) is not None and body.dimensions not in (None, size):
        raise RefusalError(400, f"dimensions is {body.dimensions}, and this model has {size}", code="invalid_value")
    if size is not None:
        model.check_special_tokens([item.ids for item in items if item.ids is not None])

    def reply(rows: Rows, tokens: int) -> Response:
        encoded = [
            base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") if body.encoding_format == "base64" else row
            for row in rows
        ]
        content = {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(encoded)],
            "model": model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return json_reply(content)

    return await embed(service, model, items, reply, body.encoding_format or "float", "encoding_format")


def _size(signature: Any) -> int | None:
    try:
        return embedding_size(signature)
    except Exception:
        return None


def _inputs(body: EmbeddingsRequest) -> list[Input]:
    """The inputs of a request; OpenAI refuses an empty text."""
    given = body.input
    if isinstance(given, str):
        given = [given]
    elif given and isinstance(given[0], int):
        return [Input(ids=given)]
    if "" in given:
        raise RefusalError(400, "input has an empty text; leave it out", "Empty", "invalid_value")
    return [Input(item, truncate=body.truncate) if isinstance(item, str) else Input(ids=item) for item in given]


def models(service: Service) -> dict[str, Any]:
    """The reply to GET /v1/models."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "lfx"} for name in service.settings.models],
    }
