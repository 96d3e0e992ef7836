"""`lfx verify`: files against their manifest, and the manifest against its signature."""

from __future__ import annotations

from pathlib import Path

import click

from lfx.cli.options import Command, FilePath, FilledText
from lfx.cli.terminal import echo, echo_json


@click.command("verify", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--key", type=FilledText(), help="Minisign's public key of who signed: a file, or the key itself.")
@click.option("--signature", type=FilePath(), help="[default: the manifest's name with .minisig, beside it]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: Path, key: str | None, signature: Path | None, as_json: bool) -> None:
    """Check all files of a bundle, or a plan, against the manifest, and with --key who signed that.

    Sign with minisign: minisign -Sm lfx.json, or of a plan minisign -Sm NAME.plan.json.
    """
    if key is None and signature is not None:
        raise click.UsageError("--signature needs --key, the public key of who signed")
    from lfx.runtime.signing import verify

    found = verify(model, key, signature)
    if as_json:
        signer = {"key_id": found.key_id, "trusted_comment": found.trusted_comment}
        echo_json({"manifest": str(found.manifest), "files": found.files, **signer})
        return
    signed = "no signature was checked (--key)"
    if found.key_id is not None:
        signed = f"signed by the key {found.key_id}, trusted comment: {found.trusted_comment}"
    echo(f"{model}: {len(found.files)} files are what {found.manifest.name} says; {signed}")
