"""A worker process of `lfx serve --workers N`: `python -m lfx.runtime.serve.worker`, started by the supervisor."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfx.errors import LfxError


def main() -> int:
    """Read the settings from stdin, serve, and send messages to the supervisor on stdout; returns the exit status."""
    # Only the messages go to the original stdout; what a library prints to stdout goes to stderr.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        try:
            messages.write(json.dumps(message) + "\n")
            messages.flush()
        except (OSError, ValueError):
            pass  # the supervisor has ended

    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65_536)  # not sys.stdin: a thread that reads from it would block the end of the process
        if not part:
            return 1
        line += part
    given = json.loads(line)
    try:
        from lfx.runtime.serve.memory import memory
        from lfx.runtime.serve.server import Server, start_thread
        from lfx.runtime.serve.settings import Settings

        settings = Settings.from_json(given["settings"])
        server = Server(
            settings,
            lambda text: send({"report": text}),
            worker=given["worker"],
            workers=settings.workers,
            folder=None if given["folder"] is None else Path(given["folder"]),
            early=given["early"],
        )
        start_thread(lambda: _follow_supervisor(server.cancel), "lfx-supervisor")

        def when_ready() -> None:
            identities = {name: model.identity for name, model in server.service.models.items()}
            send({"ready": str(memory() or ""), "identities": identities})

        server.run_on(socket.socket(fileno=given["socket"]), when_ready)
        server.exit_if_opening()
    except LfxError as error:
        send({"error": str(error)})
        return 1
    return 0


def _follow_supervisor(cancel: Callable[[], None]) -> None:
    """Call `cancel` at each byte on stdin, and stop when it is closed: the supervisor has ended, perhaps by SIGKILL."""
    while os.read(0, 1):
        cancel()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
