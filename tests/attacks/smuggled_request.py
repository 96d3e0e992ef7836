"""A request has two lengths, so that a proxy and the server disagree on its end: a second request hides in its body."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.attacks import make_bundle
from tests.runtime.serve.running import WAIT_SECONDS, running

HIDDEN = b"GET /models HTTP/1.1\r\nHost: a\r\n\r\n"
HEADS = (
    b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    b"Content-Length: 5\r\nContent-Length: %d\r\n",
    b"Content-Length: +%d\r\n",
    b"Transfer-Encoding : chunked\r\nContent-Length: %d\r\n",
    b"Transfer-Encoding: xchunked\r\nContent-Length: %d\r\n",
)


def attack(folder: Path) -> str:
    """Each request gets one reply, and then the end of the connection."""
    body = b"0\r\n\r\n" + HIDDEN
    with running({"m": make_bundle(folder / "bundle", "text-classification")}) as server:
        for head in HEADS:
            with socket.create_connection(server.socket_address, timeout=WAIT_SECONDS) as connection:
                connection.sendall(b"POST /run HTTP/1.1\r\nHost: a\r\n" + head % len(body) + b"\r\n" + body)
                reply = b""
                while part := connection.recv(65_536):
                    reply += part
            assert reply.count(b"HTTP/1.1 ") == 1, reply
            assert reply.startswith(b"HTTP/1.1 400 "), reply
    return reply.partition(b"\r\n")[0].decode()
