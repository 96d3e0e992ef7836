"""A config.json names a quantizer; some quantizers fetch their kernels from the hub."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


def attack(folder: Path) -> str:
    """lfx refuses any method."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    config = checkpoint / "config.json"
    method = {"quant_method": "finegrained_fp8"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
    return refused(export, checkpoint, folder / "bundle")
