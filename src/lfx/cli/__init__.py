"""The command `lfx`, one module per command. Commands import torch and backends when they run, so --help is instant."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import click

from lfx import __version__
from lfx.cli import (
    bench,
    build_engine,
    convert,
    explain,
    export,
    inspect,
    map,
    parity,
    push,
    quantize,
    run,
    serve,
    triton,
    verify,
)
from lfx.cli.terminal import catch_interrupts, drop_stdout, echo, interrupted, prepare_streams, printable, write
from lfx.errors import LfxError, one_line, with_cure


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lfx")
def cli() -> None:
    """Export Longformer models to ONNX and TensorRT, run them, and compare them with PyTorch."""


for _module in (
    convert,
    export,
    quantize,
    build_engine,
    run,
    map,
    explain,
    serve,
    triton,
    inspect,
    verify,
    parity,
    bench,
    push,
):
    cli.add_command(_module.command)


_LONGEST_MESSAGE = 2000
_INTERRUPTED = "interrupted; nothing half-written was left"


def main() -> NoReturn:
    """Run the command line; exits with 0 on success, 1 after a one-line error, 2 after a usage error."""
    prepare_streams()
    catch_interrupts()
    try:
        cli(standalone_mode=False)
        write("")  # flush, so that an error of output that libraries printed is reported
    except click.ClickException as error:
        _show_usage(error)
        _exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(_INTERRUPTED)
    except LfxError as error:
        _fail(_INTERRUPTED if interrupted() else str(error))
    except BrokenPipeError:
        _exit(1)
    except (MemoryError, OSError) as error:  # the system may run out of memory or disk anywhere
        _fail(_INTERRUPTED if interrupted() else with_cure(error))
    except Exception as error:
        if interrupted():
            _fail(_INTERRUPTED)
        if os.environ.get("LFX_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {one_line(error)} (LFX_DEBUG=1 shows where; please report it)")
    _exit(0)


def _show_usage(error: click.ClickException) -> None:
    """Print click's usage error; its message quotes arguments, which may hold control characters."""
    if type(error).__name__ != "NoArgsIsHelpError":  # its message is the help text; click has the class since 8.2
        error.message = printable(_shortened(error.message))  # type: ignore[misc]  # error.show() has no other hook
    text = io.StringIO()
    error.show(text)
    write(text.getvalue(), err=True)


def _fail(message: str) -> NoReturn:
    echo(f"error: {_shortened(message)}", err=True)
    _exit(1)


def _shortened(message: str) -> str:
    """Cut the middle of a long message: its end says what to do."""
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:800]} … {message[-800:]}"


def _exit(code: int) -> NoReturn:
    drop_stdout()
    sys.exit(code)
