"""A PEFT adapter, whose adapter_config.json names the model that transformers is to load in its place."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """The adapter is beside complete weights."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/model"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    return refused(export, checkpoint, folder / "bundle")
