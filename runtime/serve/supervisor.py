"""Runs several worker processes, which share one listening socket.

A connection that no worker has accepted yet waits in the socket's queue, and so survives the end of a worker. The
supervisor replaces a worker that was killed. The first worker accepts connections while it opens the models, so that
/health can report that; the others, and their replacements, accept connections when their models are ready.

A replacement opens the files that are there at that time. If they are of another model than those of the older workers,
the supervisor restarts the older workers, one by one.
"""

from __future__ import annotations

import contextlib
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

from lfx.errors import DependencyError, LfxError, one_line
from lfx.machine import usable_cores
from lfx.runtime.serve.server import Announce, Report, address_of, listen
from lfx.runtime.serve.settings import Settings

# -P keeps the current folder off sys.path: a bundle from elsewhere may lie there, with Python files.
WORKER = [sys.executable, "-P", "-m", "lfx.runtime.serve.worker"]
_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0  # after stop_seconds, until the workers are killed
_RESTART_SECONDS = 1.0  # shortest time between two starts of one worker
_MAX_DOUBLINGS = 6  # of the pause after a replacement that did not become ready: 2, 4, 8, … 64 s


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
        threads = max(usable_cores() // settings.workers, 1)
        has_plans = any(path.endswith(".plan") for path in settings.models.values())
        settings = settings if has_plans else replace(settings, threads=threads)
    sock = listen(settings)
    announce({"state": "opening", "address": address_of(sock), "models": list(settings.models)})
    report(f"{address_of(sock)} is opening {', '.join(settings.models)} in {settings.workers} workers")
    with contextlib.ExitStack() as stack:
        _Supervisor(settings, sock, _private_folder(stack, report), report, announce).run()
    report("stopped")


def _private_folder(stack: contextlib.ExitStack, report: Report) -> Path | None:
    """A folder for the workers' sockets; None if no folder for temporary files can be written."""
    try:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lfx-serve-")))
    except OSError as error:
        report(f"/metrics has the counters of one worker only: {one_line(error)}; set TMPDIR to a folder with room")
        return None


class _Supervisor:
    """The workers, and the number of signals that this process got."""

    def __init__(
        self, settings: Settings, sock: socket.socket, folder: Path | None, report: Report, announce: Announce
    ) -> None:
        self._settings, self._sock, self._folder, self._report = settings, sock, folder, report
        self._announce = announce
        self._workers: list[_Worker] = []
        self._were_ready = False  # whether all workers were ready once
        self._signals = 0

    def run(self) -> None:
        """Start the workers, and replace each one that ends, until a signal arrives."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        not_ignored = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in not_ignored}
        try:
            self._workers = [self._start(number, early=number == 0) for number in range(self._settings.workers)]
            while True:
                time.sleep(_POLL_SECONDS)
                if self._signals:  # workers that have ended may have got one too
                    break
                self._were_ready = self._were_ready or all(worker.was_ready for worker in self._workers)
                self._replace_ended()
                self._restart_outdated()
        finally:
            self._stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _start(self, number: int, *, early: bool, failed_starts: int = 0) -> _Worker:
        address = address_of(self._sock)

        def when_ready(pid: int) -> None:
            self._announce({"state": "ready", "address": address, "worker": number, "pid": pid})

        worker = _Worker(number, self._settings, self._sock, self._folder, self._report, when_ready, early=early)
        worker.failed_starts = failed_starts
        return worker

    def _replace_ended(self) -> None:
        for i, worker in enumerate(self._workers):
            status = worker.process.poll()
            if status is None:
                continue
            if worker.replace_at is None:
                worker.replace_at = self._note_end(worker, status)
            if time.monotonic() >= worker.replace_at:
                try:
                    self._workers[i] = self._start(i, early=False, failed_starts=worker.failed_starts)
                except (OSError, RuntimeError, MemoryError) as error:  # the system gives no file, process or thread
                    worker.replace_at = self._note_failed_start(worker, f"worker {i} cannot start: {one_line(error)}")

    def _note_end(self, worker: _Worker, status: int) -> float:
        """Report the end of a worker, and return the time when another replaces it.

        Raises:
            LfxError: the worker did not become ready at the start of the server.
        """
        worker.join_reader()
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        if worker.was_ready:
            worker.failed_starts = 0
            self._report(f"{worker} ended with {reason}; a new one starts")
            return worker.started + _RESTART_SECONDS
        if not self._were_ready:
            raise LfxError(worker.failure or f"worker {worker.number} ended with {reason} before it was ready")
        failure = f": {worker.failure}" if worker.failure else ""
        return self._note_failed_start(worker, f"{worker} ended with {reason} before it was ready{failure}")

    def _note_failed_start(self, worker: _Worker, problem: str) -> float:
        """Report that a replacement of a worker did not start, and return the time of the next one."""
        worker.failed_starts += 1
        pause = _RESTART_SECONDS * (1 << min(worker.failed_starts, _MAX_DOUBLINGS))
        self._report(f"{problem}; a new one starts in {pause:g} s")
        return time.monotonic() + pause

    def _restart_outdated(self) -> None:
        """Stop one worker whose models differ from those of the newest, unless a worker is opening or stopping."""
        running = [worker for worker in self._workers if worker.process.poll() is None]
        if not running or not all(worker.was_ready and not worker.is_stopping for worker in running):
            return
        newest = max(running, key=lambda worker: worker.started)
        for worker in running:
            names = [name for name in newest.identities if worker.identities[name] != newest.identities[name]]
            if names:
                self._report(f"{worker} is restarted: {newest} has opened other files of {', '.join(names)}")
                worker.ask_to_stop()
                return

    def _stop(self) -> None:
        """Stop the workers, and kill those that do not end in time."""
        # Otherwise the system would go on queueing connections, which no worker takes any more.
        self._sock.close()
        for worker in self._workers:
            if not worker.is_stopping:
                worker.ask_to_stop()
        deadline = time.monotonic() + self._settings.stop_seconds + _KILL_SECONDS
        asked_again = False
        while any(worker.process.poll() is None for worker in self._workers):
            if self._signals > 1 and not asked_again:
                asked_again = True
                for worker in self._workers:
                    worker.ask_to_cancel()
            if time.monotonic() > deadline:
                for worker in self._workers:
                    worker.process.kill()
            time.sleep(_POLL_SECONDS)
        for worker in self._workers:
            worker.join_reader()


class _Worker:
    """A worker process.

    Attributes:
        number: its index among the workers.
        started: the time when it was started, of time.monotonic.
        was_ready: whether it became ready.
        identities: name -> `ServedModel.identity` of each model, once it was ready.
        is_stopping: whether it was asked to stop.
        failure: the error that it ended with; None if it reported none.
        failed_starts: number of workers in a row, up to this one, that ended before they were ready.
        replace_at: the time when another replaces it, of time.monotonic; None until its end was seen.
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        sock: socket.socket,
        folder: Path | None,
        report: Report,
        when_ready: Callable[[int], None],
        *,
        early: bool,
    ) -> None:
        self.started = time.monotonic()
        self.was_ready = self.is_stopping = False
        self.identities: dict[str, str] = {}
        self.failure: str | None = None
        self.failed_starts = 0
        self.replace_at: float | None = None
        self.number, self._report, self._when_ready = number, report, when_ready
        self.process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[sock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which passes it on
        )
        given = {
            "settings": settings.to_json(),  # on stdin, not the command line: it has the API key
            "socket": sock.fileno(),
            "folder": None if folder is None else str(folder),
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
                self._report(f"{self} {message['report']}")
            elif "ready" in message:
                self._when_ready(self.process.pid)
                memory = f": {message['ready']}" if message["ready"] else ""
                self._report(f"{self} is ready{memory}")
                self.identities = message["identities"]
                self.was_ready = True

    def join_reader(self) -> None:
        """Wait until all messages of a worker that has ended are read."""
        self._reader.join(5.0)

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        self.is_stopping = True
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def ask_to_cancel(self) -> None:
        """Cancel the requests in progress of a worker that was asked to stop."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            os.write(self.process.stdin.fileno(), b"\n")

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.process.pid})"
