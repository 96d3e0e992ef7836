"""A folder inside a bundle is a link to a folder outside."""

from __future__ import annotations

from pathlib import Path

from lfx.manifest import Manifest
from lfx.runtime import Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """The manifest lists extra/vocab.txt, and extra is a link to a folder of another name."""
    bundle = make_bundle(folder / "bundle")
    (bundle / "extra").mkdir()
    (bundle / "extra" / "vocab.txt").write_text("fox")
    Manifest.read(bundle).write(bundle)
    (bundle / "extra").rename(folder / "elsewhere")
    (bundle / "extra").symlink_to(folder / "elsewhere")
    return refused(Engine, bundle)
