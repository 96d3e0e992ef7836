"""HTTP over `Engine`, for `lfx serve`. The modules import FastAPI and uvicorn; `check_installed` says what is missing.

A request passes through `protocol` (connections, time limits for the client), `gate` (API key, body size, disconnects,
log), a route of `app` (`openai`, `tei` or `native`), `service` (the model, tokenization, the Batcher) and `replies`
(JSON, and errors in the form of each API). `server` runs one process, `supervisor` several.
"""

from __future__ import annotations

from lfx.errors import require

MODULES = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def check_installed() -> None:
    """Raise DependencyError if a package of the extra [serve] is missing."""
    for module in MODULES:
        require(module, "serve")
