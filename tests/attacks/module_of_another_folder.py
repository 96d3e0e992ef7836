"""A modules.json names a folder outside the checkpoint, whose settings would end up in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """The folder is refused, also for the bare model, which has no use for it."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint", "sentence-embedding")
    (checkpoint / "1_Pooling").rename(folder / "secret")
    modules = json.loads((checkpoint / "modules.json").read_text())
    modules[1]["path"] = "../secret"
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    refused(export, checkpoint, folder / "bare", task="feature-extraction")
    return refused(export, checkpoint, folder / "bundle")
