"""A modules.json names a class on the hub, or a folder outside the checkpoint, which would end up in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """Both are refused, also for the bare model, which has no use for them."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint", "sentence-embedding")
    modules = (checkpoint / "modules.json").read_text()
    foreign = modules.replace("sentence_transformers.models.Normalize", "someone/repository--file.Normalize")
    (checkpoint / "modules.json").write_text(foreign)
    refused(export, checkpoint, folder / "bare", task="feature-extraction")
    (checkpoint / "modules.json").write_text(modules)
    (checkpoint / "1_Pooling").rename(folder / "secret")
    entries = json.loads(modules)
    entries[1]["path"] = "../secret"
    (checkpoint / "modules.json").write_text(json.dumps(entries))
    refused(export, checkpoint, folder / "bare", task="feature-extraction")
    return refused(export, checkpoint, folder / "bundle")
