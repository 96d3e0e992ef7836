"""Output to a terminal: control characters are escaped, and interrupts end a command cleanly."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfx.cli.terminal import catch_interrupts, echo, echo_json, prepare_streams, printable, progress, table
from lfx.errors import LfxError

HOSTILE = "[u]ax[/b] :boom: \x1b[31m\x07\x9b\u202e\u2066\ufeff\udcff\r\n"
SHOWN = r"[u]ax[/b] :boom: \x1b[31m\x07\x9b\u202e\u2066\ufeff\udcff\r\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größe, 日本語\u3000", "plain, größe, 日本語\u3000"),
        (HOSTILE, SHOWN),
        ("".join(map(chr, range(32))), "".join(map(repr, map(chr, range(32)))).replace("'", "")),
        ("\x7f\x80\x9f", r"\x7f\x80\x9f"),
        ("\u200b\u00ad\u2028\u2029\U000e0041", r"\u200b\xad\u2028\u2029\U000e0041"),
        ("\u0645\u06cc\u200c\u062e 👩\u200d🔬", "\u0645\u06cc\u200c\u062e 👩\u200d🔬"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_line_stays_one_line_on_both_streams(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    assert capsys.readouterr() == (f"{SHOWN}\n", f"{SHOWN}\n")


def test_a_table_shows_markup_emoji_and_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table([f"a {HOSTILE}"], [[f"b {HOSTILE}"], ["[/b]"]])
    out = capsys.readouterr().out
    assert f"a {SHOWN}" in out
    assert f"b {SHOWN}" in out
    assert "[/b]" in out
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(out)


@pytest.mark.parametrize("width", [20, 80])
def test_a_table_in_a_narrow_terminal_shows_all_of_its_cells(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich treats stdout as a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    cell = "日本語" * 40
    table(["number", "answer"], [["123456.7", cell]])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert ["".join(line[i].strip() for line in lines) for i in (1, 2)] == ["123456.7", cell]


def test_a_table_says_that_a_very_long_cell_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    table(["files"], [["x" * 2000], ["y" * 2001]])
    out = capsys.readouterr().out
    assert (out.count("x"), out.count("y"), out.count("…")) == (2000, 2000, 1)


def test_the_progress_bar_shows_markup_and_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich treats stderr as a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with progress() as step:
        step(f"step {HOSTILE}")
    err = capsys.readouterr().err
    assert f"step {SHOWN}" in err
    assert not {"\x07", "\x9b", "\u202e"} & set(err)


def test_progress_without_a_terminal_is_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as step:
        step(HOSTILE)
    assert capsys.readouterr().err == f"… {SHOWN}\n"


def test_json_is_ascii_and_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"a": [float("nan"), float("-inf"), 1.5], "b": f"{HOSTILE}\x7f"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": [None, None, 1.5], "b": f"{HOSTILE}\x7f"}
    assert all(" " <= letter <= "~" for letter in out.removesuffix("\n"))


@pytest.mark.parametrize("show", [lambda: echo("x"), lambda: echo_json({}), lambda: table(["a"], [["b"]])])
def test_a_result_that_cannot_be_written_is_an_error(show: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Full())
    with pytest.raises(LfxError, match="stdout cannot be written: No space left on device; make room"):
        show()
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(LfxError, match="stdout cannot be written: it is closed"):
        show()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, None])
def test_a_message_that_cannot_be_written_is_dropped(number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Full(number) if number is not None else None)
    echo("x", err=True)


class _Full(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number: int = errno.ENOSPC) -> None:
        super().__init__()
        self._number = number

    def flush(self) -> None:
        """Raise the error."""
        raise OSError(self._number, os.strerror(self._number))


def test_a_size_that_is_no_number_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "²")
    monkeypatch.setenv("LINES", "9" * 5000)
    prepare_streams()
    assert "COLUMNS" not in os.environ
    assert "LINES" not in os.environ


def test_an_import_is_finished_before_an_interrupt_is_raised(tmp_path: Path) -> None:
    # It represents C++ modules that abort the process if an import inside them is interrupted.
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.3)\nwhole = True\n"
    )
    program = """
import sys, time
from lfx.cli.terminal import catch_interrupts, interrupted
catch_interrupts()
sys.path.insert(0, sys.argv[1])
try:
    import slow
    assert interrupted()
    time.sleep(60)
except KeyboardInterrupt:
    print(sys.modules["slow"].whole)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_one_signal_during_an_import_interrupts_once(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    program = """
import sys, threading
from lfx.cli.terminal import catch_interrupts, progress
catch_interrupts()
sys.path.insert(0, sys.argv[1])
try:
    with progress() as step:
        import stopped
        step("next")
except KeyboardInterrupt:
    for thread in threading.enumerate():  # the timer that sends the signal again
        if thread is not threading.current_thread():
            thread.join()
    print("cleaned up")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("cleaned up\n", "", 0)


@pytest.mark.parametrize("importing", [False, True])
def test_a_signal_in_the_handler_of_another_one_does_not_wait_for_it(importing: bool) -> None:
    program = """
import faulthandler, os, signal, sys, types
from lfx.cli import terminal

faulthandler.dump_traceback_later(60, exit=True)
terminal.catch_interrupts()
terminal.os = types.SimpleNamespace(kill=lambda *_: None, getpid=os.getpid)  # the timer sends nothing
terminal._is_importing = lambda frame: len(sys.argv) > 1

def trace(frame, event, argument):
    global steps
    steps += 1
    if steps == second:
        signal.raise_signal(signal.SIGINT)
    return trace

second = steps = 1
while steps >= second:  # the second signal arrives in each step of the first one's handler
    steps, second = 0, second + 1
    terminal._signals = type(terminal._signals)()
    sys.settrace(trace)
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
    assert terminal.interrupted()
print("done" if second > 5 else second)
"""
    arguments = ["importing"] if importing else []
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_ends_a_command_whose_stderr_nobody_reads() -> None:
    program = """
import os, signal
from lfx.cli.terminal import catch_interrupts, echo
catch_interrupts()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    echo("interrupted", err=True)
    print("done")
"""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, bytes(512)):
                pass
        os.set_blocking(writer, True)
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60, check=False
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.stdout, done.returncode) == ("done\n", 0)


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        catch_interrupts()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
