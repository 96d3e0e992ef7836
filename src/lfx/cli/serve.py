"""`lfx serve`: answer requests over HTTP."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import click

from lfx.cli.engine import add_engine_options
from lfx.cli.options import MOST_TOKENS, Command, FilePath, FilledText
from lfx.cli.terminal import echo, echo_json, interrupted, printable
from lfx.errors import LfxError

MOST_SECONDS = 86_400.0
_Seconds = click.FloatRange(0.05, MOST_SECONDS)


@click.command("serve", cls=Command)
@click.argument("models", nargs=-1, required=True, type=FilledText(), metavar="[NAME=]BUNDLE_OR_PLAN…")
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address; 0.0.0.0 = all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="Listen on this port; 0 = a free one.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Set the number of processes."
)
@click.option(
    "--api-key",
    type=FilledText(),
    envvar="LFX_API_KEY",
    show_envvar=True,
    help="Require the header Authorization: Bearer KEY. The environment variable hides KEY from other users' ps.",
)
@click.option(
    "--max-delay",
    "max_delay_ms",
    type=click.FloatRange(0, 3_600_000),
    default=5.0,
    show_default=True,
    help="Let a text wait up to this many ms for others to run with it.",
)
@click.option(
    "--token-budget",
    type=click.IntRange(1, MOST_TOKENS),
    help="Bound the tokens of a batch, padding included.  [default: 8192]",
)
@click.option(
    "--max-pending",
    type=click.IntRange(1, 1_000_000),
    default=512,
    show_default=True,
    help="Answer 429 when a worker has this many texts in progress.",
)
@click.option(
    "--max-inputs", type=click.IntRange(1, 100_000), default=32, show_default=True, help="Bound the texts of a request."
)
@click.option(
    "--max-beams",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Bound the beams of a generated text.",
)
@click.option(
    "--max-body",
    "max_body_bytes",
    type=click.IntRange(1, 1 << 28),
    help="Bound the bytes of a request.  [default: 16 for each token of --max-inputs texts of maximal length]",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 1_000_000),
    default=4096,
    show_default=True,
    help="Bound the open connections of a worker.",
)
@click.option(
    "--answer-time",
    "answer_seconds",
    type=_Seconds,
    default=120.0,
    show_default=True,
    help="Cancel a request that is not answered within this many seconds.",
)
@click.option(
    "--client-time",
    "client_seconds",
    type=_Seconds,
    default=20.0,
    show_default=True,
    help="Disconnect a client that takes more than this many seconds to send its request or read its reply.",
)
@click.option(
    "--stop-time",
    "stop_seconds",
    type=_Seconds,
    default=30.0,
    show_default=True,
    help="Wait up to this many seconds after SIGTERM for requests in progress.",
)
@click.option("--log-requests", is_flag=True, help="Log each request as a line of JSON on stderr, without its text.")
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON: the address, then each ready worker.")
@click.option("--tokenizer", type=FilePath(), help="Read the tokenizer of a single model from this folder.")
@add_engine_options
def command(models: tuple[str, ...], tokenizer: Path | None, as_json: bool, **options: object) -> None:
    """Answer requests over HTTP with bundles or plans.

    The server runs until SIGTERM. POST /run takes every task; /v1/embeddings is OpenAI's, /embed and /predict are
    those of text-embeddings-inference. On the page at / you can try the models. A model is named NAME, or after its
    path; a request without a model uses the first.
    """
    try:
        _serve(models, tokenizer, as_json, options)
    except BaseException:
        if not interrupted():  # until the server handles the signals itself
            raise
        with contextlib.suppress(OSError, LfxError):
            echo("stopped before the models were opened", err=True)


def _serve(models: tuple[str, ...], tokenizer: Path | None, as_json: bool, options: dict[str, object]) -> None:
    from lfx.runtime.serve import check_installed

    check_installed()
    # The server tokenizes one text at a time; see `Tokenizer.lets_threads_run`. Workers inherit it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lfx.runtime.serve.lines import flush_lines, write_line
    from lfx.runtime.serve.settings import Settings, named_models

    if os.environ.get("LFX_API_KEY") == "" and options["api_key"] is None:  # click ignores an empty variable
        raise click.UsageError("LFX_API_KEY is empty; give it the key, or unset it to serve without a key")
    named = named_models(models)
    if tokenizer is not None and len(named) > 1:
        raise click.UsageError("--tokenizer is for a single model; give one model")
    settings = Settings(named, tokenizer=None if tokenizer is None else str(tokenizer), **options)  # type: ignore[arg-type]

    def report(line: str) -> None:
        write_line(printable(line))

    def announce(state: dict[str, Any]) -> None:
        if as_json:
            with contextlib.suppress(OSError, LfxError):  # a script may read the address and close stdout
                echo_json(state)

    try:
        if settings.workers == 1:
            from lfx.runtime.serve.server import serve

            serve(settings, report, announce)
        else:
            from lfx.runtime.serve.supervisor import supervise

            supervise(settings, report, announce)
    finally:
        flush_lines()
