"""A manifest allows more tokens than the model has positions, which gives finite garbage on some backends."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.manifest import MANIFEST, sealed
from lfx.runtime import Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """max_seqlen of 4,096 for a model of 128 positions."""
    bundle = make_bundle(folder / "bundle")
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(sealed({**data, "max_seqlen": 4096})))
    return refused(Engine, bundle)
