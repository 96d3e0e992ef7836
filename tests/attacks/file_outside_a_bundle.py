"""A sealed manifest lists a file above the bundle, to have it read or hashed."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.manifest import MANIFEST, sealed, sha256
from lfx.runtime import Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """The manifest names ../secret, with its correct digest."""
    bundle = make_bundle(folder / "bundle")
    (folder / "secret").write_text("key")
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["../secret"] = {"sha256": sha256(folder / "secret"), "bytes": 3}
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    return refused(Engine, bundle)
