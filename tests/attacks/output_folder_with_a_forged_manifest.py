"""A folder of somebody's files holds an lfx.json that lists them, so that an export replaces them."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from lfx.manifest import MANIFEST
from tests.attacks import refused
from tests.models import tiny_model


def attack(folder: Path) -> str:
    """An lfx.json without a valid seal lists thesis.txt."""
    target = folder / "work"
    target.mkdir()
    (target / "thesis.txt").write_text("ten years")
    (target / MANIFEST).write_text(json.dumps({"format_version": 1, "files": {"thesis.txt": {}}}))
    refusal = refused(export, tiny_model(), target)
    assert (target / "thesis.txt").read_text() == "ten years"
    return refusal
