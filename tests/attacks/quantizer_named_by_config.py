"""A config.json asks for a quantizer, some of which fetch their kernels from the hub."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """The method does not matter."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    config = checkpoint / "config.json"
    method = {"quant_method": "finegrained_fp8"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
    return refused(export, checkpoint, folder / "bundle")
