"""Runs several worker processes, which share one listening socket.

A connection that no worker has accepted yet waits in the socket's queue, and so survives the end of a worker. The
supervisor replaces a worker that was killed. The first worker accepts connections while it opens the models, so that
/health can report that; the others, and their replacements, accept connections when their models are ready.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from lfx.errors import DependencyError, LfxError
from lfx.runtime.serve.server import Announce, Report, address_of, listen
from lfx.runtime.serve.settings import Settings

_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0  # after stop_seconds, until the workers are killed
_RESTART_SECONDS = 1.0  # shortest time between two starts of one worker


def supervise(settings: Settings, report: Report, announce: Announce) -> None:
    """Serve with `settings.workers` processes until a SIGTERM or SIGINT.

    Args:
        settings: what is served.
        report: is called with each line for the operator.
        announce: is called when the server listens, and when a worker is ready.
    Raises:
        DependencyError: this system cannot share a socket with other processes.
        InputError: the address cannot be used.
        LfxError: a model cannot be opened.
    """
    if os.name != "posix":
        raise DependencyError("several workers need a POSIX system, such as Linux; leave --workers out")
    if settings.threads is None and settings.backend in ("auto", "onnxruntime", "openvino"):
        threads = max((os.cpu_count() or 1) // settings.workers, 1)
        has_plans = any(path.endswith(".plan") for path in settings.models.values())
        settings = settings if has_plans else replace(settings, threads=threads)
    sock = listen(settings)
    announce({"state": "opening", "address": address_of(sock), "models": list(settings.models)})
    report(f"{address_of(sock)} is opening {', '.join(settings.models)} in {settings.workers} workers")
    with tempfile.TemporaryDirectory(prefix="lfx-serve-") as folder:
        _Supervisor(settings, sock, Path(folder), report, announce).run()
    report("stopped")


class _Supervisor:
    """The workers, and the number of signals that this process got."""

    def __init__(
        self, settings: Settings, sock: socket.socket, folder: Path, report: Report, announce: Announce
    ) -> None:
        self._settings, self._sock, self._folder, self._report = settings, sock, folder, report
        self._announce = announce
        self._workers: list[_Worker] = []
        self._signals = 0

    def run(self) -> None:
        """Start the workers, and replace each one that ends, until a signal arrives."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        not_ignored = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in not_ignored}
        try:
            self._workers = [self._start(number, early=number == 0) for number in range(self._settings.workers)]
            while not self._signals:
                time.sleep(_POLL_SECONDS)
                self._replace_ended()
        finally:
            self._stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _start(self, number: int, *, early: bool) -> _Worker:
        address = address_of(self._sock)

        def when_ready(pid: int) -> None:
            self._announce({"state": "ready", "address": address, "worker": number, "pid": pid})

        return _Worker(number, self._settings, self._sock, self._folder, self._report, when_ready, early=early)

    def _replace_ended(self) -> None:
        for i, worker in enumerate(self._workers):
            status = worker.process.poll()
            if status is None:
                continue
            worker.join_reader()
            if worker.failure is not None:
                raise LfxError(worker.failure)
            reason = f"signal {-status}" if status < 0 else f"status {status}"
            if not worker.was_ready:
                raise LfxError(f"worker {i} ended with {reason} before it was ready")
            self._report(f"worker {i} (pid {worker.process.pid}) ended with {reason}; a new one starts")
            time.sleep(max(0.0, _RESTART_SECONDS - (time.monotonic() - worker.started)))
            self._workers[i] = self._start(i, early=False)

    def _stop(self) -> None:
        """Stop the workers, and kill those that do not end in time."""
        for worker in self._workers:
            worker.ask_to_stop()
        deadline = time.monotonic() + self._settings.stop_seconds + _KILL_SECONDS
        asked_again = False
        while any(worker.process.poll() is None for worker in self._workers):
            if self._signals > 1 and not asked_again:
                asked_again = True  # a worker's second signal cancels its requests
                for worker in self._workers:
                    worker.ask_to_stop()
            if time.monotonic() > deadline:
                for worker in self._workers:
                    worker.process.kill()
            time.sleep(_POLL_SECONDS)
        for worker in self._workers:
            worker.join_reader()


class _Worker:
    """A worker process.

    Attributes:
        started: the time when it was started, of time.monotonic.
        was_ready: whether it became ready.
        failure: the error that it ended with; None if it reported none.
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        sock: socket.socket,
        folder: Path,
        report: Report,
        when_ready: Callable[[int], None],
        *,
        early: bool,
    ) -> None:
        self.started = time.monotonic()
        self.was_ready = False
        self.failure: str | None = None
        self._number, self._report, self._when_ready = number, report, when_ready
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lfx.runtime.serve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[sock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which passes it on
        )
        given = {
            "settings": settings.to_json(),  # on stdin, not the command line: it has the API key
            "socket": sock.fileno(),
            "folder": str(folder),
            "worker": number,
            "early": early,
        }
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(given).encode() + b"\n")
            self.process.stdin.flush()  # stdin stays open: the worker stops when the end of this process closes it
        except BrokenPipeError:
            pass
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Read the worker's messages, one line of JSON each."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if "error" in message:
                self.failure = str(message["error"])
            elif "report" in message:
                self._report(f"worker {self._number} (pid {self.process.pid}) {message['report']}")
            elif "ready" in message:
                self.was_ready = True
                self._when_ready(self.process.pid)
                memory = f": {message['ready']}" if message["ready"] else ""
                self._report(f"worker {self._number} (pid {self.process.pid}) is ready{memory}")

    def join_reader(self) -> None:
        """Wait until all messages of a worker that has ended are read."""
        self._reader.join(5.0)

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
