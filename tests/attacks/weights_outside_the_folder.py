"""The index of a sharded checkpoint names weights that are another folder's."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from lfx.export.load import load
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """The index names them by a relative, an absolute and a nested path."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    (folder / "other").mkdir()
    outside = (checkpoint / "model.safetensors").rename(folder / "other" / "model.safetensors")
    with safe_open(outside, framework="numpy") as weights:
        keys = list(weights.keys())
    for name in ("../other/model.safetensors", str(outside), "x/../../other/model.safetensors"):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        refusal = refused(load, str(checkpoint))
    (checkpoint / "model.safetensors.index.json").unlink()
    config = checkpoint / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "transformers_weights": "../other/model.safetensors"})
    )
    refused(load, str(checkpoint))
    return refusal
