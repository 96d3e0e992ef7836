"""Lines on stderr: each is written whole, in order, and those that are dropped are counted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from lfx.runtime.serve.lines import _Lines


def test_a_stream_that_does_not_block_gets_all_lines() -> None:
    code = """
from lfx.runtime.serve.lines import flush_lines, write_line
for i in range(500):
    write_line(f"{i} " + "x" * 1000)
while True:
    flush_lines()
"""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=writer)
    os.close(writer)
    try:
        with os.fdopen(reader, encoding="utf-8") as stream:
            lines = [stream.readline() for _ in range(500)]
    finally:
        process.kill()
        process.wait()
    assert lines == [f"{i} {'x' * 1000}\n" for i in range(500)]


def test_a_line_is_counted_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lines = _Lines()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        lines.write("first")
    lines.write("second")
    lines.flush()
    assert capfd.readouterr().err == "lines dropped: 1\nsecond\n"
