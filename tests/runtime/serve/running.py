"""Servers for the tests: in a thread of this process, or as the command in its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lfx.runtime.serve.server import Server, address_of, listen
from lfx.runtime.serve.settings import Settings

WAIT_SECONDS = 120.0  # longer than anything takes; no test measures time


@dataclass
class Running:
    """A server in a thread."""

    address: str
    server: Server
    reports: list[str] = field(default_factory=list)

    @property
    def socket_address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.address.removeprefix("http://").split(":")
        return host, int(port)

    def client(self) -> httpx.Client:
        """A client with a connection pool of its own; it waits."""
        return httpx.Client(base_url=self.address, timeout=WAIT_SECONDS, trust_env=False)


@contextlib.contextmanager
def running(
    models: dict[str, Path], before_ready: Callable[[str], None] | None = None, **settings: Any
) -> Iterator[Running]:
    """A server in a thread, ready; `before_ready` is called with its address before that."""
    chosen = Settings({name: str(path) for name, path in models.items()}, port=0, threads=1, **settings)
    sock = listen(chosen)
    address = address_of(sock)
    reports: list[str] = []
    server = Server(chosen, reports.append)
    ready = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run_on(sock, ready.set)
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        if before_ready is not None:
            before_ready(address)
        assert ready.wait(WAIT_SECONDS)
        assert not failures, failures
        yield Running(address, server, reports)
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
    assert not failures, failures


class Command:
    """`lfx serve` in a process of its own.

    Attributes:
        program: the arguments of Python.
        address: where it answers; port 0 was given.
        lines: what it printed on stderr.
    """

    program: tuple[str, ...] = ("-m", "lfx.cli")

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        command = [sys.executable, *self.program, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = re.findall(r"http://\S+", self.wait_for("is opening "))[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, text: str) -> str:
        """The next line with this text."""
        while (line := self._new.get(timeout=WAIT_SECONDS)) is not None:
            if text in line:
                return line
        raise AssertionError(f"it ended without {text!r}: {self.lines}")

    def client(self) -> httpx.Client:
        """A client that waits."""
        return httpx.Client(base_url=self.address, timeout=WAIT_SECONDS, trust_env=False)

    def announced(self) -> dict[str, Any]:
        """The next line of --json."""
        assert self.process.stdout is not None
        state: dict[str, Any] = json.loads(self.process.stdout.readline())
        return state

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        return status

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread or process."""
    pause = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it never happened")
