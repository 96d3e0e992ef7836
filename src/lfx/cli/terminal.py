"""Output of the command line (text, tables, progress) and handling of interrupts. rich is imported on first use.

lfx passes all text that it prints through `printable`: labels, answers, paths and messages of other libraries come from
untrusted files, and may hold terminal control sequences.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

from lfx.checks import json_text
from lfx.errors import LfxError, with_cure


@dataclass
class _Signals:
    """What the signals did.

    A signal may arrive in the handler of another one. A lock, such as that of a threading.Event, would be taken twice
    then, and the process would wait for ever.
    """

    arrived: bool = False  # a signal arrived
    raised: bool = False  # its KeyboardInterrupt was raised
    waits: bool = False  # a signal is put off, and will be sent again
    sent_again: bool = False  # the next signal is one that was put off


_signals = _Signals()
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file name in its frames
_BLOCKED_MS = 1000  # stderr counts as blocked if it takes nothing for this time after a signal
_LONGEST_CELL = 2000  # characters; rich needs minutes to lay out a label of millions

# Unicode categories: control, format and surrogate characters, and the line and paragraph separators. Format characters
# may reorder a line (U+202E, U+2066) or be invisible (U+200B), so that two different names look the same.
_ESCAPED_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Format characters that are not escaped: the spelling of Persian, Hindi and emoji needs them, and they reorder nothing.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""Replace control characters by escapes such as `\x1b`, `\n` or `\u202e`, so that a terminal shows one line.

    A backslash is not escaped, so that paths stay readable; the result cannot be parsed back, use --json for that.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _ESCAPED_CATEGORIES and character not in _JOINERS
        else character
        for character in text
    )


def echo(text: str, *, err: bool = False) -> None:
    """Print one line to stdout, or to stderr.

    Raises:
        LfxError: stdout cannot be written.
        BrokenPipeError: the reader of stdout has closed it.
    """
    write(f"{printable(text)}\n", err=err)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value as ASCII JSON to stdout, with null for NaN; raises the errors of `echo`."""
    write(json_text(value, indent=indent) + "\n")


def write(text: str, *, err: bool = False) -> None:
    """Write text without escaping it; raises the errors of `echo`. Errors of stderr are ignored."""
    if not err:
        with _stdout() as stream:
            stream.write(text)
            stream.flush()
    elif sys.stderr is not None:
        with suppress(OSError):  # there is no stream left to report it on
            sys.stderr.write(text)
            sys.stderr.flush()


@contextmanager
def _stdout() -> Iterator[TextIO]:
    if sys.stdout is None:
        raise LfxError("stdout cannot be written: it is closed")
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LfxError(f"stdout cannot be written: {with_cure(error)}") from error


def prepare_streams() -> None:
    """Prepare stdin, stdout and stderr.

    stdout and stderr escape characters that their encoding does not have. The descriptors 0, 1 and 2 are opened if they
    are closed, so that no file of lfx gets their numbers. Invalid terminal sizes are removed from the environment.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free descriptor, which is `number`
    for name in ("COLUMNS", "LINES"):  # rich accepts any isdigit() string, superscripts too, and fails on it
        size = os.environ.get(name, "1")
        if not (size.isascii() and size.isdigit() and len(size) < 6 and int(size) > 0):
            del os.environ[name]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_stdout() -> None:
    """Redirect stdout to the null device, so that Python's flush at exit does not raise again."""
    if sys.stdout is not None:
        with suppress(OSError):  # there may be no free descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def catch_interrupts() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, so that partial files are removed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        # A signal that the parent process ignores stays ignored: nohup ignores SIGHUP.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _interrupt)
    sys.unraisablehook = _on_unraisable


def interrupted() -> bool:
    """Return whether a signal arrived; a library may have turned its KeyboardInterrupt into another error."""
    return _signals.arrived


def _interrupt(number: int, frame: FrameType | None) -> None:
    _signals.arrived = True
    if _signals.sent_again:
        _signals.sent_again = False
        if _signals.raised:  # by a step meanwhile: a second interrupt would end the clean-up
            return
    if _is_importing(frame):
        _signals.raised = False
        _send_again(number)
        return
    _signals.raised = True
    _drop_blocked_stderr()
    raise KeyboardInterrupt


def _drop_blocked_stderr() -> None:
    """Redirect stderr to the null device if its pipe is full and nobody reads it: a write would block the end."""
    with suppress(OSError, AttributeError):  # Windows has no poll; there may be no free descriptor
        stderr = select.poll()
        stderr.register(2, select.POLLOUT)
        if not stderr.poll(_BLOCKED_MS):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import is running. Some C++ modules abort the process if it is interrupted."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """Send a signal to this process again after 0.1 s, unless its KeyboardInterrupt was raised by then."""
    if _signals.waits:
        return
    _signals.waits = True  # first, since a timer's start takes a lock

    def send() -> None:
        _signals.waits = False
        if not _signals.raised:
            _signals.sent_again = True
            os.kill(os.getpid(), number)

    timer = threading.Timer(0.1, send)
    timer.daemon = True
    timer.start()


def _unless_interrupted(show: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap a progress function to raise KeyboardInterrupt at the next step, if a library caught the interrupt."""

    def step(name: str) -> None:
        if _signals.arrived:
            _signals.raised = True
            raise KeyboardInterrupt
        show(name)

    return step


def _on_unraisable(error: Any) -> None:
    """Print the exception of a finalizer; send an interrupt again, since Python drops it in a finalizer."""
    if not isinstance(error.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(error)
        return
    _signals.raised = False
    _send_again(signal.SIGINT)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout, at least 160 columns wide if stdout is no terminal; raises the errors of `echo`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rich_table = Table(header_style="bold")
    for name in header:
        rich_table.add_column(Text(printable(name)), overflow="fold")  # rich would cut a long number or path
    for row in rows:
        rich_table.add_row(*(Text(_cell(cell)) for cell in row))
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    with _stdout():
        console.print(rich_table)


def _cell(text: str) -> str:
    return printable(text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show the current step on stderr: in a progress bar, or as lines if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _unless_interrupted(lambda step: echo(f"… {step}", err=True))
        return
    columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield _unless_interrupted(lambda step: bar.update(task, description=printable(step)))
