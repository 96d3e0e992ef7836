"""A named pipe in place of each file of a checkpoint: a program that opens it waits forever."""

from __future__ import annotations

import os
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint, tiny_tokenizer


def attack(folder: Path) -> str:
    """Replace one file after the other by a pipe."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    tiny_tokenizer().save_pretrained(checkpoint)
    for name in ("adapter_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors", "config.json"):
        (checkpoint / name).unlink(missing_ok=True)
        os.mkfifo(checkpoint / name)
        refusal = refused(export, checkpoint, folder / "bundle")
        assert "is no file" in refusal
        if name == "adapter_config.json":
            (checkpoint / name).unlink()
    return refusal
