"""`lfx push`: upload a bundle to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from lfx.cli.options import Command, FilePath, FilledText
from lfx.cli.terminal import echo, echo_json, progress


@click.command("push", cls=Command)
@click.argument("bundle", type=FilePath("a bundle"))
@click.argument("repository", type=FilledText())
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", type=FilledText(), help="Commit to this branch.  [default: main]")
@click.option("--json", "as_json", is_flag=True, help="Print the address of the commit as JSON.")
def command(bundle: Path, repository: str, private: bool, revision: str | None, as_json: bool) -> None:
    """Upload a bundle to the Hugging Face hub.

    REPOSITORY is ORG/NAME, and gets a model card.

    The hub's token comes from the environment variable HF_TOKEN, or from: hf auth login.
    """
    with progress() as step:
        from lfx.runtime.hub import push

        commit = push(bundle, repository, private=private, revision=revision, progress=step)
    if as_json:
        echo_json({"repository": repository, "commit": commit})
        return
    echo(f"{bundle} is now {repository}: {commit}")
