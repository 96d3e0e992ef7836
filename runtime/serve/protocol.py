"""HTTP connections: uvicorn's protocol, with time limits for clients and limits of headers and connections.

uvicorn waits without limit for the end of a request and for a client that does not read its reply. When the server
stops, uvicorn also closes the connections whose request it has not read yet; here such a request is still answered.
"""

from __future__ import annotations

import asyncio
import functools
import select
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lfx.runtime.serve.replies import RETRY_AFTER_SECONDS, dumps
from lfx.runtime.serve.settings import MAX_HEADER_BYTES

# Time that idle connections stay open when the server stops, since a request may be in transit.
STOP_GRACE_SECONDS = 0.5
MAX_PIPELINED = 64  # requests that wait on a connection for the reply to an earlier one
_PARSED_BYTES = 4096  # are parsed at a time; the headers of a request are counted with this precision
_PROBE_SECONDS = 0.05  # between two checks whether a client that has ended its sending has gone
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


class Protocol(HttpToolsProtocol):
    """One connection. `server` makes a subclass with the two limits.

    Attributes:
        client_seconds: longest time from the first byte of a request to its last, and longest wait for the client to
            read its reply.
        max_connections: largest number of open connections.
        is_stopping: whether the server stops.
    """

    client_seconds = 20.0
    max_connections = 4096
    is_stopping: Callable[[], bool] = staticmethod(lambda: False)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        self._receive_deadline: float | None = time.monotonic() + self.client_seconds
        self._in_message, self._in_headers, self._header_bytes = False, False, 0
        self._read_deadline = time.monotonic() + self.client_seconds
        self._is_stopping = False
        self._cycles: list[Any] = []  # requests without a complete reply; uvicorn keeps only the newest
        self._refuse_later: Callable[[], None] | None = None  # called after the replies to earlier requests
        self._has_ended = False  # the client sends no more
        self._closes = False  # as soon as the request that is being received has come
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"this server takes {self.max_connections} connections; try again later")
        elif self.is_stopping():  # it was accepted before, and the server has told the others
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests of the connection that their client has gone."""
        self._disconnect()
        super().connection_lost(exc)

    def _disconnect(self) -> None:
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    def _abort(self) -> None:
        """Close the connection without its unread replies; requests in progress must not write to it any more."""
        self._disconnect()
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that arrived; refuse the request if its headers or its trailers are too long."""
        for start in range(0, len(data), _PARSED_BYTES):
            if self._refuse_later is not None or self.transport.is_closing():
                return
            self._unset_keepalive_if_required()
            part = data[start : start + _PARSED_BYTES]
            self._header_bytes += len(part)
            self._parse(part)
            if self._in_message and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._end_request(431, f"the headers are above {MAX_HEADER_BYTES:,} bytes; send less")

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for replies to complete requests when the client stops sending; returns whether it stays.

        Only the answer to data shows whether the client has gone, so it gets an interim reply, which HTTP/1.1 allows.
        """
        if self._has_ended:
            return True
        is_answered = self.cycle is None or self.cycle.response_complete
        is_cut = self._in_message and self._refuse_later is None
        if is_answered or is_cut or self.cycle.scope["http_version"] != "1.1" or not hasattr(select, "poll"):
            return None  # close
        self._has_ended, self.cycle.keep_alive = True, False
        if not self._replies()[0].response_started:
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        self._probe()
        return True

    def _probe(self) -> None:
        """End the requests of a client that has gone. asyncio does not watch a connection that only writes."""
        if self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)  # errors are always reported
        if poll.poll(0):
            self._abort()
        else:
            self.loop.call_later(_PROBE_SECONDS, self._probe)

    def _replies(self) -> list[Any]:
        """The requests without a complete reply, the first of which is being answered."""
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        return self._cycles

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._end_connection(functools.partial(self.send_400_response, "Invalid HTTP request received."))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse a request that asks for another protocol as one that does not: RFC 9110, section 7.8, allows that.

        httptools takes the bytes after the headers for the other protocol's, and parses the body as the next request.

        Args:
            rest: the bytes after the headers.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._end_connection(functools.partial(self.send_400_response, "CONNECT is for proxies."))
            return
        lines = [method + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode("ascii")]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                lines.append(b"connection: " + b", ".join(token for token in tokens if token.lower() != b"upgrade"))
            elif name != b"upgrade":
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._parse(b"\r\n".join([*lines, b"", b""]) + rest)

    def on_message_begin(self) -> None:
        """Start the time limit of a request; that of the first request started with the connection."""
        super().on_message_begin()
        self._in_message, self._in_headers, self._header_bytes = True, True, 0
        if self._receive_deadline is None:
            self._receive_deadline = time.monotonic() + self.client_seconds

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; drop the trailers of a chunked body, which uvicorn would add to the headers."""
        if self._in_headers:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body; what comes after it counts as headers until the next part."""
        self._header_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Start the app on the request; if the server is stopping, the connection is closed after the reply."""
        if self.parser.should_upgrade():
            return  # `_ignore_upgrade` follows
        self._in_headers = False
        super().on_headers_complete()
        self._replies().append(self.cycle)
        if len(self.pipeline) > MAX_PIPELINED:
            self._abort()
        if self._is_stopping:
            self.cycle.keep_alive = False
        cycle: Any = self.cycle
        cycle.send = functools.partial(self._send, cycle, cycle.send)
        if cycle.scope["http_version"] == "1.0":
            cycle.waiting_for_100_continue = False  # HTTP/1.0 has no interim replies
            cycle.send = functools.partial(_send_until_closed, cycle, cycle.send)

    def on_message_complete(self) -> None:
        """End the time limit of the request."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_message, self._receive_deadline = False, None
        if self._closes:
            self.transport.close()

    async def _send(self, cycle: Any, send: Callable[[Any], Awaitable[None]], message: Any) -> None:
        """Send a part of a reply. The connection is closed after a reply, but not before the rest of its request came.

        The system resets a connection that is closed with unread bytes, and the client may lose the reply.
        """
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        is_early = is_last and cycle is self.cycle and self._in_message and not self._in_headers
        waits = is_early and not cycle.keep_alive
        cycle.keep_alive = cycle.keep_alive or waits  # uvicorn closes the connection if it is false
        await send(message)
        if waits:
            self._closes = True
            if not self._in_message:
                self.transport.close()

    def check_time(self, now: float) -> None:
        """End the connection if its client is too slow. The server calls this several times a second."""
        if self._receive_deadline is not None and now > self._receive_deadline and not self.transport.is_closing():
            self._end_request(408, f"the request was not received within {self.client_seconds:g} s; send it faster")
            return
        if self.unread_bytes == 0:
            self._read_deadline = now + self.client_seconds
        elif now > self._read_deadline:
            self._abort()

    @property
    def unread_bytes(self) -> int:
        """Bytes of replies that the client has not read yet, besides those in the system's buffers."""
        return int(self.transport.get_write_buffer_size())

    def _end_request(self, status: int, message: str) -> None:
        """Refuse the request that is being received, and close the connection."""
        self._end_connection(functools.partial(self._refuse, status, message))

    def _end_connection(self, refuse: Callable[[], None]) -> None:
        """Drop the request that is being received, and refuse it after the replies to earlier ones.

        Args:
            refuse: replies and closes the connection.
        """
        received = self.cycle if self._in_message and not self._in_headers else None
        if received is not None:
            received.disconnected = True  # the app stops waiting for the body
            received.message_event.set()
            self.pipeline = deque(item for item in self.pipeline if item[0] is not received)
        if received is not None and received.response_started:
            self.transport.close()  # the request was refused, and the client is still sending it
        elif any(cycle is not received for cycle in self._replies()):
            self._refuse_later, self._receive_deadline = refuse, None
        else:
            refuse()

    def on_response_complete(self) -> None:
        """Start the next request of the connection, or refuse it."""
        super().on_response_complete()
        is_last = all(cycle.disconnected for cycle in self._replies())  # the refused one is
        if self._refuse_later is not None and is_last and not self.transport.is_closing():
            self._refuse_later()

    def _refuse(self, status: int, message: str) -> None:
        """Reply without the app, and close the connection."""
        body = dumps({"error": message})
        headers = [f"HTTP/1.1 {status} {_REASONS[status]}", "content-type: application/json", "connection: close"]
        if status == 503:
            headers.append(f"retry-after: {RETRY_AFTER_SECONDS}")
        head = "\r\n".join([*headers, f"content-length: {len(body)}", "", ""])
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

    def shutdown(self) -> None:
        """Finish the request in progress, or one that arrives within STOP_GRACE_SECONDS, and close."""
        self._is_stopping = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self.loop.call_later(STOP_GRACE_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self._in_headers and not self.transport.is_closing():
            self.transport.close()


def make_protocol(client_seconds: float, max_connections: int, is_stopping: Callable[[], bool]) -> type[Any]:
    """Make a subclass of `Protocol` with these attributes."""
    attributes = {
        "client_seconds": client_seconds,
        "max_connections": max_connections,
        "is_stopping": staticmethod(is_stopping),
    }
    return type("LimitedProtocol", (Protocol,), attributes)


async def _send_until_closed(cycle: Any, send: Callable[[Any], Awaitable[None]], message: Any) -> None:
    """Send a part of a reply to HTTP/1.0. One of unknown length ends where the connection does, without chunks."""
    if message["type"] == "http.response.start":
        headers = list(message.get("headers", []))
        if not any(name.lower() == b"content-length" for name, _ in headers):
            cycle.chunked_encoding = False
            # Older releases of uvicorn do not say so.
            message = {**message, "headers": [*headers, (b"connection", b"close")]}
    elif cycle.expected_content_length == 0:  # uvicorn compares this with what is sent
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)
