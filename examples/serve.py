"""A small server around an Engine, from the standard library alone.

    python examples/serve.py my-bundle --port 8000
    curl -d '{"text": "A long document …"}' localhost:8000/run
    curl localhost:8000/metrics

Requests that arrive together run together. A bad request gets 400 and the reason, a body that is longer than any text
that the model takes 413, an overload 503. A client that is too slow is disconnected.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lfx.checks import json_text, parse_json
from lfx.errors import InputError, LfxError, OverloadError
from lfx.runtime import Batcher, Engine
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import Tokenizer

# Largest body, in bytes per token of the model's longest sequence. In UTF-8, English has 4 to 5 bytes per token and
# Chinese 3; a character that JSON escapes has 6.
BYTES_PER_TOKEN = 16
OTHER_BYTES = 1024  # of a body besides its text
NO_LIMIT_TOKENS = 16_384  # longest sequence of a model without a limit


class Server(ThreadingHTTPServer):
    """One thread for each connection.

    Args:
        max_requests: largest number of requests that are tokenized, computed or waiting; the next one gets 503.
        client_seconds: time limit for a client to send its request, and again to receive each part of the reply.
    """

    def __init__(self, bundle: Path, port: int, max_delay_ms: float, max_requests: int, client_seconds: float) -> None:
        self.engine = Engine(bundle)
        self.engine.warm_up()
        self.tokenizer = Tokenizer(bundle, self.engine.signature)
        self.postprocessor = Postprocessor(self.tokenizer)
        self.batcher = Batcher(self.engine, max_delay_ms=max_delay_ms)
        self.tokenizing = threading.Lock()  # one text at a time: an encoding takes many times the memory of its text
        self.largest_body = (self.engine.signature.max_seqlen or NO_LIMIT_TOKENS) * BYTES_PER_TOKEN + OTHER_BYTES
        self.client_seconds = client_seconds
        self._slots = threading.BoundedSemaphore(max_requests)
        super().__init__(("127.0.0.1", port), Handler)

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the `max_requests` slots.

        Raises:
            OverloadError: all are taken.
        """
        if not self._slots.acquire(blocking=False):
            raise OverloadError("too many requests are in progress; try again later")
        try:
            yield
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the errors of a client that disconnected."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def setup(self) -> None:
        """Limit the client's time: each wait by a timeout, and the whole request by a timer."""
        self.timeout = self.server.client_seconds
        super().setup()
        self._timer = threading.Timer(self.server.client_seconds, self._stop_reading)
        self._timer.daemon = True
        self._timer.start()

    def finish(self) -> None:
        """Stop the timer with the connection."""
        self._timer.cancel()
        super().finish()

    def _stop_reading(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        """Reply with the metrics, or to a health check."""
        if self.path == "/metrics":
            self._reply(200, self.server.engine.metrics.prometheus(), "text/plain; version=0.0.4")
        else:
            self._reply(200 if self.path == "/health" else 404, "{}")

    def do_POST(self) -> None:
        """Run a text."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/run":
            self._reply(404, "{}")
        elif not (length.isascii() and length.isdigit()):
            self._reply(411, "{}")
        elif len(length) > 9 or int(length) > self.server.largest_body:
            reason = f"the body is above {self.server.largest_body:,} bytes, more than any text that the model takes"
            self._reply(413, json_text({"error": reason}))
            self._discard(int(length[:12]))
        else:
            status, answer = self._answer(int(length))
            self._reply(status, json_text(answer))

    def _discard(self, size: int) -> None:
        """Read and drop a refused body, within the client's time limit: closing earlier would reset the connection."""
        while size > 0 and (part := self.rfile.read1(65_536)):
            size -= len(part)

    def _answer(self, size: int) -> tuple[int, dict[str, Any]]:
        """Status and body of the reply."""
        body = self.rfile.read(size)
        self._timer.cancel()
        if len(body) < size:
            return 408, {"error": f"the body has {len(body)} bytes where Content-Length says {size}"}
        try:
            with self.server.slot():
                return 200, self._run(parse_json(body))
        except OverloadError as error:
            return 503, {"error": str(error)}
        except (InputError, ValueError) as error:
            return 400, {"error": str(error)}
        except LfxError as error:
            return 500, {"error": str(error)}

    def _run(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict) or "text" not in request:
            raise InputError(
                'the body must be a JSON object with the field "text", and "pair" where the task takes one'
            )
        server = self.server
        with server.tokenizing:
            encoded = server.tokenizer.encode(request["text"], request.get("pair"))
        outputs = server.batcher.submit(encoded.ids).result()
        return {"tokens": len(encoded.ids), "answers": server.postprocessor.answers(encoded, outputs)}

    def _reply(self, status: int, body: str, content_type: str = "application/json") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Log nothing; the metrics count the requests."""


def make_server(
    bundle: Path,
    port: int = 8000,
    max_delay_ms: float = 5.0,
    max_requests: int = 64,
    client_seconds: float = 10.0,
) -> Server:
    """A server that is ready to run: `make_server(…).serve_forever()`; arguments as `Batcher`'s and `Server`'s."""
    return Server(bundle, port, max_delay_ms, max_requests, client_seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        make_server(options.bundle, options.port).serve_forever()
