"""What the command line shows, and how it is stopped: text, tables, progress, interrupts. rich is imported when used.

All text that lfx prints goes through `printable`: labels, answers, paths and messages of other libraries come from
files that anybody may have written, and a terminal obeys what stands in them.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from lfx.checks import json_text
from lfx.errors import LfxError, with_cure

_interrupted = threading.Event()
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file name in its frames
_LONGEST_CELL = 2000  # letters; a label may have millions, which rich takes minutes to lay out

# Control, format and surrogate characters, and the two separators of lines that are none of ASCII's. Format
# characters reorder a line (U+202E, U+2066) or are not to be seen (U+200B), so that two names look the same.
_SHOWN_AS_ESCAPES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Format characters too, but they belong to the spelling of Persian and Hindi and to emoji, and move nothing.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""One line that a terminal shows as it is: control characters become escapes such as `\x1b`, `\n` or `\u202e`.

    A backslash stays one, so that paths can be read: the escapes are for people, and JSON is for programs.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _SHOWN_AS_ESCAPES and letter not in _JOINERS
        else letter
        for letter in text
    )


def echo(text: str, *, err: bool = False) -> None:
    """Print one line to stdout, or to stderr.

    Raises:
        LfxError: stdout cannot be written. BrokenPipeError: its reader has gone.
    """
    write(f"{printable(text)}\n", err=err)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON to stdout; it is ASCII, and has null in the place of NaN. Raises as `echo` does."""
    write(json_text(value, indent=indent) + "\n")


def write(text: str, *, err: bool = False) -> None:
    """Write text that is printable already. Raises as `echo` does; what stderr does not take is dropped."""
    if not err:
        with _stdout() as stream:
            stream.write(text)
            stream.flush()
    elif sys.stderr is not None:
        with suppress(OSError):  # nobody could be told
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
    """Make stdout and stderr take every character, and keep the numbers of closed ones from files that are opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
    for name in ("COLUMNS", "LINES"):  # rich takes any digits, superscripts too, for a size
        size = os.environ.get(name, "1")
        if not (size.isascii() and size.isdigit() and len(size) < 6 and int(size) > 0):
            del os.environ[name]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_stdout() -> None:
    """Send what stdout still buffers nowhere, so that Python does not fail on it once more when it ends."""
    if sys.stdout is not None:
        with suppress(OSError):  # no file can be opened any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def catch_interrupts() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, so that what is half-written is removed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not on Windows
        # What the parent said to ignore stays so: nohup ignores SIGHUP.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _interrupt)
    sys.unraisablehook = _dropped


def interrupted() -> bool:
    """Whether a signal came; code that was stopped in the middle may have turned it into another error."""
    return _interrupted.is_set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    if _is_importing(frame):
        _send_again(number)
        return
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an import is under way. Some C++ modules abort the process when one that they import is interrupted."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """Send a signal to this process again, shortly."""
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _unless_interrupted(show: Callable[[str], None]) -> Callable[[str], None]:
    """Stop at the next step where a library swallowed the interrupt."""

    def step(name: str) -> None:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        show(name)

    return step


def _dropped(error: Any) -> None:
    """Print what a finalizer raised; send an interrupt again, since Python drops one that arrives inside it."""
    if not isinstance(error.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(error)
        return
    _send_again(signal.SIGINT)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout, wide enough not to wrap where stdout is no terminal. Raises as `echo` does."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(header_style="bold")
    for name in header:
        drawn.add_column(Text(printable(name)))
    for row in rows:
        drawn.add_row(*(Text(printable(cell[:_LONGEST_CELL])) for cell in row))
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    with _stdout():
        console.print(drawn)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A bar with the current step on stderr; plain lines where stderr is no terminal."""
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
