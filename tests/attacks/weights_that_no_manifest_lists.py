"""Weights are replaced, and left out of the manifest so that no digest shows it."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.manifest import MANIFEST, WEIGHTS, sealed
from lfx.runtime import Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """model.onnx.data holds zeros, and lfx.json lists only the others."""
    bundle = make_bundle(folder / "bundle")
    (bundle / WEIGHTS).write_bytes(bytes((bundle / WEIGHTS).stat().st_size))
    data = json.loads((bundle / MANIFEST).read_text())
    del data["files"][WEIGHTS]
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    return refused(Engine, bundle)
