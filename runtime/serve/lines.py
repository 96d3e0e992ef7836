"""Lines on stderr. A thread writes them, so that no request waits for a reader that has stopped reading."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import threading

_MAX_WAITING = 1000  # lines that are not written yet; later ones are dropped
_FLUSH_SECONDS = 1.0


class _Lines:
    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()  # a signal handler may call `put`
        self._dropped = 0
        self._writer: threading.Thread | None = None

    def write(self, line: str) -> None:
        if self._writer is None:
            writer = threading.Thread(target=self._write_all, name="lfx-stderr", daemon=True)
            try:
                writer.start()
            except RuntimeError:  # the system gives no thread now
                self._dropped += 1
                return
            self._writer = writer
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put(line)
        else:
            self._dropped += 1

    def flush(self) -> None:
        if self._writer is not None:
            written = threading.Event()
            self._waiting.put(written)
            written.wait(_FLUSH_SECONDS)

    def _write_all(self) -> None:
        while True:
            line = self._waiting.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            dropped, self._dropped = self._dropped, 0
            if dropped:
                _write(f"lines dropped: {dropped}")
            _write(line)


def _write(line: str) -> None:
    """Write a line, in one write where the stream takes it whole, since workers share stderr.

    Not to sys.stderr, whose lock would keep the process from its end while this waits for the reader.
    """
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    data = f"{line}\n".encode(encoding, "backslashreplace")
    with contextlib.suppress(OSError):  # there is no stream left to report it on
        while data:
            try:
                data = data[os.write(2, data) :]
            except BlockingIOError:  # another process has set the stream to non-blocking
                select.select([], [2], [])


_lines = _Lines()


def write_line(line: str) -> None:
    """Write a line to stderr some time later; it is dropped if too many wait."""
    _lines.write(line)


def flush_lines() -> None:
    """Wait until the lines are written, for a second at most."""
    _lines.flush()
