"""JSON replies, and errors in the form that each API's clients expect."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from fastapi import Response
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray

from lfx.errors import ArtifactError, InputError, LengthError, LfxError, OverloadError

RETRY_AFTER_SECONDS = 1


class RefusalError(Exception):
    """A request that is refused with an HTTP status.

    Args:
        status: HTTP status.
        message: what was given, what is allowed and what to do.
        error_type: the field error_type of text-embeddings-inference.
        code: the field error.code of OpenAI's API.
    """

    def __init__(self, status: int, message: str, error_type: str = "Validation", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.error_type, self.code = status, message, error_type, code


def busy(message: str) -> RefusalError:
    """Too many requests: status 429."""
    return RefusalError(429, message, "Overloaded", "rate_limit_exceeded")


def unavailable(message: str) -> RefusalError:
    """The server cannot answer now: status 503."""
    return RefusalError(503, message, "Unhealthy", "server_unavailable")


def late(seconds: float) -> RefusalError:
    """The answer took too long: status 503."""
    return unavailable(
        f"the request was not answered within {seconds:g} s; ask for less, such as fewer texts or a smaller "
        "max_new_tokens, or try again later"
    )


def too_many_inputs(count: int, most: int) -> RefusalError:
    """A request with too many inputs: status 413."""
    return RefusalError(
        413, f"the request has {count} inputs, above the {most} that this server takes; send several requests"
    )


def refusal_of(error: LfxError) -> RefusalError:
    """The refusal for an error of lfx."""
    message = str(error)
    if isinstance(error, OverloadError):
        return busy(message)
    if isinstance(error, LengthError):
        return RefusalError(413, message, "Validation", "context_length_exceeded")
    if isinstance(error, InputError):
        return RefusalError(422, message, "Tokenizer")
    problem = "the model's outputs are wrong" if isinstance(error, ArtifactError) else "the model failed"
    return RefusalError(500, f"{problem}: {message}", "Backend", "server_error")


def error_body(path: str, refusal: RefusalError) -> dict[str, Any]:
    """The body of an error: OpenAI's below /v1, those of Hugging Face's servers for their routes, else lfx's own."""
    if path.startswith("/v1/"):
        types = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 500: "server_error"}
        error_type = types.get(refusal.status, "invalid_request_error")
        return {"error": {"message": refusal.message, "type": error_type, "param": None, "code": refusal.code}}
    if path.endswith(("/embed", "/predict")):
        return {"error": refusal.message, "error_type": refusal.error_type}
    if path.endswith(("/generate", "/generate_stream")):
        types = {429: "overloaded", 500: "generation", 503: "generation"}
        return {"error": refusal.message, "error_type": types.get(refusal.status, "validation")}
    return {"error": refusal.message}


def error_reply(path: str, refusal: RefusalError) -> Response:
    """The reply to a request that is refused."""
    # OpenAI's API replies 400 to a request that does not match the schema.
    status = 400 if refusal.status == 422 and path.startswith("/v1/") else refusal.status
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(dumps(error_body(path, refusal)), status, headers, "application/json")


class EventStream(StreamingResponse):
    """Server-sent events, as they come. `Gate` cancels the reply when its client disconnects."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        # A proxy such as nginx would collect the events.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events; when the reply is cancelled, their source is closed."""
        try:
            await self.stream_response(send)
        finally:
            await self._events.aclose()


def event(value: Any) -> bytes:
    """A server-sent event whose data is JSON."""
    return b"data:" + dumps(value) + b"\n\n"


def dumps(value: Any) -> bytes:
    """Serialize to JSON. Arrays become lists; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":")).encode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or np.isfinite(value).all():
            return value.tolist()
        plain = value.astype(object)
        plain[~np.isfinite(value)] = None
        return plain.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_reply(value: Any, status: int = 200) -> Response:
    """A reply of JSON."""
    return Response(dumps(value), status, media_type="application/json")


def array_reply(array: NDArray[Any], encoding: str) -> Any:
    """Encode an output for a reply: as the array itself, which `dumps` turns into lists, or as its bytes in base64."""
    if encoding == "float":
        return array
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }
