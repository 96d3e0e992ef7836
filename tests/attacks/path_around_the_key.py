"""A client without the key asks for a path that looks like one that needs none."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.attacks import make_bundle
from tests.runtime.serve.running import WAIT_SECONDS, running

BODY = b'{"inputs": "the fox"}'
TARGETS = (
    "/run",
    "//run",
    "/health/../run",
    "/metrics/..%2frun",
    "/health%2f..%2frun",
    "/health/run",
    "/%2e/run",
    "/run?/health",
    "/run#/health",
    "/run;/health",
    "/run%00/health",
    "/RUN",
    "http://a/run",
    "/models/m/run",
    "/v1/embeddings",
    "*",
)
HEADERS = (
    "",
    "Authorization: Bearer \r\n",
    "Authorization: Bearer secre\r\n",
    "Authorization: Bearer secret0\r\n",
    "Authorization: Basic secret\r\n",
    "Authorization: secret\r\n",
    "Authorization: Bearer wrong\r\nAuthorization: Bearer secret\r\n",
    "X-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n",
    "X-HTTP-Method-Override: GET\r\n",
)


def attack(folder: Path) -> str:
    """No such request is answered with a result or the name of a model."""
    with running({"m": make_bundle(folder / "bundle", "text-classification")}, api_key="secret") as server:
        for target in TARGETS:
            for headers in HEADERS if target == "/run" else HEADERS[:1]:
                head = f"POST {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}"
                head += f"Content-Length: {len(BODY)}\r\n\r\n"
                with socket.create_connection(server.socket_address, timeout=WAIT_SECONDS) as connection:
                    connection.sendall(head.encode() + BODY)
                    reply = b""
                    while part := connection.recv(65_536):
                        reply += part
                assert reply[:13] in (b"HTTP/1.1 401 ", b"HTTP/1.1 400 "), (target, headers, reply)
                assert b"LABEL" not in reply
    return "the API key is missing or wrong"
