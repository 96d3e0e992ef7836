"""A small server around an Engine, from the standard library alone.

    python examples/serve.py my-bundle --port 8000
    curl -d '{"text": "A long document …"}' localhost:8000/run
    curl localhost:8000/metrics

Requests that arrive together run together. A bad request gets 400 and the reason, an overload 503.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lfx.errors import InputError, LfxError, OverloadError
from lfx.runtime import Batcher, Engine
from lfx.runtime.text import Text

LARGEST_BODY = 4_000_000  # bytes


def make_server(bundle: Path, port: int = 8000, max_delay_ms: float = 5.0) -> ThreadingHTTPServer:
    """A server that is ready to run: `make_server(…).serve_forever()`."""
    engine = Engine(bundle)
    engine.warm_up()
    text = Text(bundle, engine.signature)
    batcher = Batcher(engine, max_delay_ms=max_delay_ms)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._reply(200, engine.metrics.prometheus(), "text/plain; version=0.0.4")
            else:
                self._reply(200 if self.path == "/health" else 404, "{}")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            size = int(length) if length.isascii() and length.isdigit() else -1
            if self.path != "/run" or not 0 <= size <= LARGEST_BODY:
                self._reply(404 if self.path != "/run" else 413 if size > 0 else 411, "{}")
                return
            try:
                self._reply(200, json.dumps(self._run(self.rfile.read(size))))
            except OverloadError as error:
                self._reply(503, json.dumps({"error": str(error)}))
            except (InputError, ValueError, TypeError, KeyError, RecursionError) as error:
                self._reply(400, json.dumps({"error": str(error)}))
            except LfxError as error:
                self._reply(500, json.dumps({"error": str(error)}))

        def _run(self, body: bytes) -> dict[str, Any]:
            request = json.loads(body)
            encoded = text.encode(request["text"], request.get("pair"))
            outputs = batcher.submit(encoded.ids).result()
            return {"tokens": len(encoded.ids), "answers": text.answers(encoded, outputs)}

        def _reply(self, status: int, body: str, kind: str = "application/json") -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """The metrics say what happened."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        make_server(options.bundle, options.port).serve_forever()
