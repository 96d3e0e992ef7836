"""Clients send requests without end and read no reply, so that the replies fill the memory of the server."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
from pathlib import Path

from tests.attacks import make_bundle
from tests.runtime.serve.running import running, wait_until

REQUEST = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"


def attack(folder: Path) -> str:
    """The server ends the connections without an error of its own, and answers others meanwhile."""
    models = {"m": make_bundle(folder / "bundle", "text-classification")}
    errors = io.StringIO()
    handler = logging.StreamHandler(errors)
    logging.getLogger("uvicorn.error").addHandler(handler)
    with running(models, client_seconds=1.0) as server, contextlib.ExitStack() as stack:
        stack.callback(logging.getLogger("uvicorn.error").removeHandler, handler)
        for _ in range(20):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(server.socket_address)
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    connection.sendall(REQUEST)
        with server.client() as client:
            assert client.post("/run", json={"inputs": "the fox"}).status_code == 200
        wait_until(lambda: not server.server.server_state.connections)
    assert not errors.getvalue(), errors.getvalue()
    return "the server closed the connections of 20 clients that do not read"
