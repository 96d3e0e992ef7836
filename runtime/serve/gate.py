"""ASGI middleware in front of the routes: API key, body size, disconnected clients, counters and the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from lfx.runtime.serve.limits import Share
from lfx.runtime.serve.lines import write_line
from lfx.runtime.serve.replies import RefusalError, error_reply, late, unavailable
from lfx.runtime.serve.service import Service, log_fields
from lfx.runtime.serve.stats import Stats

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
# Paths that need no key, for browsers and monitoring. They reveal no texts; /metrics has the names of the models.
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/openapi.json"})
# Paths under which a request is counted that is refused before it reaches a route. Other paths are counted as "other",
# so that clients cannot create labels.
KNOWN_PATHS = OPEN_PATHS | {
    "/run",
    "/embed",
    "/predict",
    "/generate",
    "/generate_stream",
    "/info",
    "/models",
    "/v1/models",
    "/v1/embeddings",
}


_COMPRESSED = frozenset({b"gzip", b"x-gzip", b"deflate", b"br", b"zstd"})


class Gate:
    """Passes a request to the routes when its body is complete, and cancels it when its client disconnects."""

    def __init__(self, app: App, service: Service, stats: Stats) -> None:
        self._app, self._service, self._stats = app, service, stats

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, reply = time.perf_counter(), _Reply(send)
        log_fields.set({})
        try:
            await self._answer(scope, receive, reply)
        finally:
            # A request that was refused before it reached the routes has no route.
            path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
            route = getattr(scope.get("route"), "path", path)
            self._stats.count(route, reply.status)
            if self._service.settings.log_requests:
                _log(scope, reply.status, time.perf_counter() - start)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: _Reply) -> None:
        try:
            self._check_key(scope)
            takes_body = scope["method"] == "POST" and scope["path"] not in OPEN_PATHS
            if takes_body:
                self._service.check_ready()
                _check_encoding(scope)
            # The body counts as buffered until the request is answered, since the task holds it until then.
            with Share(self._service.body_memory) as share:
                body = _Body(share, self._service.max_body_bytes)
                if takes_body and not await body.read(scope, receive):
                    return
                seconds = self._service.settings.answer_seconds
                async with send.within(seconds if takes_body else None):
                    await _run_while_connected(lambda: self._app(scope, body.replay, send), receive)
        except RefusalError as refusal:
            await error_reply(scope["path"], refusal)(scope, receive, send)
        except asyncio.CancelledError:  # the server stops, and stop_seconds are over
            if self._service.state != "stopping":
                raise
            if send.status:  # a stream, which has told its client
                return
            stopped = unavailable("the server stopped before the request was answered; try again")
            await error_reply(scope["path"], stopped)(scope, receive, send)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        """Raise RefusalError if the request needs the key and does not have it."""
        key = self._service.settings.api_key
        if key is None or scope["path"] in OPEN_PATHS:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if not hmac.compare_digest(token.strip(), key.encode()) or scheme.lower() != b"bearer":
            raise RefusalError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )


def _check_encoding(scope: MutableMapping[str, Any]) -> None:
    """Raise RefusalError for a compressed body."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() in _COMPRESSED:
            raise RefusalError(415, "the body is compressed; send it without Content-Encoding")


class _Reply:
    """Sends a reply.

    Attributes:
        status: 0 = it has not started.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0
        self._limit: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._limit is not None:
                self._limit.reschedule(None)  # raises RuntimeError if the time is over
            self.status = message["status"]
        await self._send(message)

    @contextlib.asynccontextmanager
    async def within(self, seconds: float | None) -> AsyncIterator[None]:
        """Cancel what is in the block if the reply has not started after some seconds; None = no limit.

        Raises:
            RefusalError: it has not.
        """
        try:
            async with asyncio.timeout(seconds) as limit:
                self._limit = limit
                yield
        except TimeoutError as error:
            if seconds is None or not limit.expired():
                raise
            raise late(seconds) from error
        finally:
            self._limit = None


class _Body:
    """The body of one request.

    Args:
        share: the request's, of the memory for bodies.
        limit: largest number of bytes.
    """

    def __init__(self, share: Share, limit: int) -> None:
        self._share, self._limit, self._data, self._replayed = share, limit, bytearray(), False

    async def read(self, scope: MutableMapping[str, Any], receive: Receive) -> bool:
        """Read the whole body; returns False if the client disconnects.

        Raises:
            RefusalError: the body is too large, or the bodies of all requests together are.
        """
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > self._limit):
                raise _too_large(self._limit)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part, more = message.get("body", b""), message.get("more_body", False)
            if self._share.size + len(part) > self._limit:
                raise _too_large(self._limit)
            self._share.take(len(part))
            self._data += part
        return True

    async def replay(self) -> Message:
        """Give the body to the app at the first call, then wait forever: `_run_while_connected` sees a disconnect."""
        if not self._replayed:
            self._replayed = True
            body = bytes(self._data)
            self._data.clear()
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError


def _too_large(limit: int) -> RefusalError:
    return RefusalError(413, f"the body is above {limit:,} bytes, the limit of this server; send less in a request")


async def _run_while_connected(run_app: Callable[[], Awaitable[None]], receive: Receive) -> None:
    """Run the app; cancel it when the client closes the connection."""
    answer = asyncio.ensure_future(run_app())
    disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            await answer
    finally:
        for task in (answer, disconnect):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _log(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """Print a request as a line of JSON on stderr, without its text and its key."""
    client = scope.get("client")
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status or "gone",
        "ms": round(seconds * 1000, 3),
        **log_fields.get(),
    }
    write_line(json.dumps(line))
