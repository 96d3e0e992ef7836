"""HTTP connections: uvicorn's protocol, with time limits for clients and limits of headers and connections.

uvicorn waits without limit for the end of a request and for a client that does not read its reply. It also closes a
connection, when the server stops, whose request has not been read yet; here that request is still answered.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lfx.runtime.serve.replies import RETRY_AFTER_SECONDS, dumps
from lfx.runtime.serve.settings import MAX_HEADER_BYTES

# When the server stops, idle connections stay open for so long: a request may be on the way.
STOP_GRACE_SECONDS = 0.5
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


class Protocol(HttpToolsProtocol):
    """One connection. `server` makes a subclass with the two limits.

    Attributes:
        client_seconds: longest time of a request from its first byte to its last, and of a wait for the client to read.
        max_connections: largest number of open connections.
    """

    client_seconds = 20.0
    max_connections = 4096

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        self._received_by: float | None = time.monotonic() + self.client_seconds
        self._in_headers, self._header_bytes = False, 0
        self._unread, self._read_by = 0, 0.0
        self._is_stopping = False
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"this server takes {self.max_connections} connections; try again later")

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the headers have become too long."""
        were_in_headers = self._in_headers
        super().data_received(data)
        if were_in_headers and self._in_headers and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"the headers are above {MAX_HEADER_BYTES:,} bytes; send less")

    def on_message_begin(self) -> None:
        """Start the clock of a request; that of the first one started with the connection."""
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0
        if self._received_by is None:
            self._received_by = time.monotonic() + self.client_seconds

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._in_headers = False
        super().on_headers_complete()
        if self._is_stopping:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Stop the clock of the request."""
        super().on_message_complete()
        self._received_by = None

    def check_time(self, now: float) -> None:
        """End the connection if its client is too slow. The server calls this several times a second."""
        if self._received_by is not None and now > self._received_by and not self.transport.is_closing():
            self._expire()
            return
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread < self._unread or self._unread == 0:
            self._read_by = now + self.client_seconds
        self._unread = unread
        if unread and now > self._read_by:
            self.transport.abort()

    def _expire(self) -> None:
        """End a request that did not come in time, or a connection on which none began."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app stops waiting for the body
            self.cycle.message_event.set()
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()  # it was refused, and does not stop sending
        else:
            self._refuse(408, f"the request did not come within {self.client_seconds:g} s; send it faster")

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
        """Finish the request in progress, or one that comes within a moment, and close."""
        self._is_stopping = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self.loop.call_later(STOP_GRACE_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self._in_headers and not self.transport.is_closing():
            self.transport.close()


def make_protocol(client_seconds: float, max_connections: int) -> type[Any]:
    """The protocol with these limits; see `Protocol`."""
    return type("LimitedProtocol", (Protocol,), {"client_seconds": client_seconds, "max_connections": max_connections})
