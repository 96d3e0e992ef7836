"""The command `lfx`: one module a command. Each imports what is heavy when it runs, so that --help is instant."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import click

from lfx import __version__
from lfx.cli import bench, build_engine, export, inspect, parity, quantize, run, verify
from lfx.cli.terminal import catch_interrupts, drop_stdout, echo, interrupted, prepare_streams, printable, write
from lfx.errors import LfxError, one_line, with_cure


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lfx")
def cli() -> None:
    """Longformer from PyTorch to ONNX and production."""


for _module in (export, quantize, build_engine, run, inspect, verify, parity, bench):
    cli.add_command(_module.command)


_LONGEST_MESSAGE = 2000
_INTERRUPTED = "interrupted; nothing half-written was left"


def main() -> NoReturn:
    """Run the command line: 0 done, 1 one line of error, 2 usage."""
    prepare_streams()
    catch_interrupts()
    try:
        cli(standalone_mode=False)
        write("")  # what others printed to stdout must have got there too
    except click.ClickException as error:
        _show_usage(error)
        _exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(_INTERRUPTED)
    except LfxError as error:
        _fail(_INTERRUPTED if interrupted() else str(error))
    except BrokenPipeError:
        _exit(1)
    except (MemoryError, OSError) as error:  # of the system, which may refuse at any place
        _fail(_INTERRUPTED if interrupted() else with_cure(error))
    except Exception as error:
        if interrupted():
            _fail(_INTERRUPTED)
        if os.environ.get("LFX_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {one_line(error)} (LFX_DEBUG=1 shows where; please report it)")
    _exit(0)


def _show_usage(error: click.ClickException) -> None:
    """Print what click has to say of wrong usage, which quotes the arguments."""
    if type(error).__name__ != "NoArgsIsHelpError":  # whose message is the help; click has it since 8.2
        error.message = printable(error.message)  # type: ignore[misc]  # no other way to the text around it
    text = io.StringIO()
    error.show(text)
    write(text.getvalue(), err=True)


def _fail(message: str) -> NoReturn:
    long = len(message) > _LONGEST_MESSAGE  # its end says what to do
    echo(f"error: {f'{message[:800]} … {message[-800:]}' if long else message}", err=True)
    _exit(1)


def _exit(code: int) -> NoReturn:
    drop_stdout()
    sys.exit(code)
