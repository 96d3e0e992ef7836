"""A folder of somebody's files holds an lfx.json that lists them, so that an export replaces them."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from lfx.manifest import MANIFEST, sha256
from tests.attacks import make_bundle, refused
from tests.models import tiny_model


def attack(folder: Path) -> str:
    """The lfx.json of a bundle lists thesis.txt too, with its digest, and its seal is that of the bundle."""
    target = make_bundle(folder / "work")
    (target / "thesis.txt").write_text("ten years")
    data = json.loads((target / MANIFEST).read_text())
    data["files"]["thesis.txt"] = {"sha256": sha256(target / "thesis.txt"), "bytes": 9}
    (target / MANIFEST).write_text(json.dumps(data))
    refusal = refused(export, tiny_model(), target)
    assert (target / "thesis.txt").read_text() == "ten years"
    return refusal
