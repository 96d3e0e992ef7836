"""A bundle lists a file outside its folder, or links its signature to one, so that `lfx push` publishes a secret."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.manifest import MANIFEST, sealed, sha256
from lfx.runtime.hub import push
from tests.attacks import make_bundle, refused
from tests.runtime.hub_server import hub_of_this_process


def attack(folder: Path) -> str:
    """The hub gets no request."""
    secret = folder / "id_rsa"
    secret.write_text("secret")
    bundle = make_bundle(folder / "bundle")
    whole = json.loads((bundle / MANIFEST).read_text())
    with hub_of_this_process(folder / "cache") as hub:
        for name in ("../id_rsa", str(secret)):
            entry = {"sha256": sha256(secret), "bytes": secret.stat().st_size}
            spoiled = {**whole, "files": {**whole["files"], name: entry}}
            (bundle / MANIFEST).write_text(json.dumps(sealed(spoiled)))
            refusal = refused(push, bundle, "org/name")
        (bundle / MANIFEST).write_text(json.dumps(whole))
        (bundle / f"{MANIFEST}.minisig").symlink_to(secret)
        refused(push, bundle, "org/name")
        assert not hub.requests
    return refusal
