"""`lfx verify`: check files against their manifest, and the manifest against its signature."""

from __future__ import annotations

from pathlib import Path

import click

from lfx.cli.options import Command, FilePath, FilledText
from lfx.cli.terminal import echo, echo_json


@click.command("verify", cls=Command)
@click.argument("model", type=FilePath("a bundle or a plan"))
@click.option("--key", type=FilledText(), help="Check the signature with this minisign public key: a file, or the key.")
@click.option(
    "--signature",
    type=FilePath(),
    help="Read the signature from this file.  [default: the manifest's path with .minisig appended]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: Path, key: str | None, signature: Path | None, as_json: bool) -> None:
    """Check a bundle or a plan against its manifest.

    With --key, the signature of the manifest is checked too.

    Sign a bundle with: minisign -Sm lfx.json; a plan with: minisign -Sm NAME.plan.json.
    """
    if key is None and signature is not None:
        raise click.UsageError("--signature needs --key, the signer's public key; give both")
    from lfx.runtime.hub import local_path
    from lfx.runtime.signing import verify

    verified = verify(local_path(model), key, signature)
    if as_json:
        signer = {"key_id": verified.key_id, "trusted_comment": verified.trusted_comment}
        echo_json({"manifest": str(verified.manifest), "files": verified.files, **signer})
        return
    signed = "no signature was checked (--key)"
    if verified.key_id is not None:
        signed = f"signed by the key {verified.key_id}, trusted comment: {verified.trusted_comment}"
    echo(f"{model}: {len(verified.files)} files match {verified.manifest.name}; {signed}")
