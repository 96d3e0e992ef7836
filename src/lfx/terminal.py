"""What the command line shows and how it is stopped: tables, a progress bar, interrupts. rich is imported when used."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

_interrupted = threading.Event()


def catch_interrupts() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, so that what is half-written is removed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not on Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    sys.unraisablehook = _dropped


def interrupted() -> bool:
    """Whether a signal came; code that was stopped in the middle may have turned it into another error."""
    return _interrupted.is_set()


def _interrupt(*_: Any) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


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
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table to stdout, wide enough not to wrap where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*header, header_style="bold")
    for row in rows:
        drawn.add_row(*row)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    console.print(drawn)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A bar with the current step on stderr; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _unless_interrupted(lambda step: click.echo(f"… {step}", err=True))
        return
    columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield _unless_interrupted(lambda step: bar.update(task, description=step))
