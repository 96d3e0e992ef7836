"""A config.json of a few hundred bytes that makes its reader allocate terabytes, or loop for years."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export.load import load
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """Try each size of the config in turn."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    config = checkpoint / "config.json"
    good = json.loads(config.read_text())
    for change in (
        {"attention_window": 10**12},
        {"num_labels": 10**10},
        {"num_hidden_layers": 10**9, "attention_window": 8},
        {"max_position_embeddings": 10**12},
        {"hidden_size": 10**9},
    ):
        config.write_text(json.dumps({**good, **change}))
        refusal = refused(load, str(checkpoint))
        assert refusal.startswith(str(config)), "the model was made before it was refused"
    return refusal
