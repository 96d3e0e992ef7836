"""A tokenizer_config.json names code, and a vocabulary outside the checkpoint that would end up in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from tests.attacks import refused
from tests.models import save_tiny_checkpoint, tiny_tokenizer


def attack(folder: Path) -> str:
    """The tokenizer is made from the checkpoint's own files, and no other file is read."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    tiny_tokenizer().save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")
    outside = str(folder / "tokenizer.4.0.0.json")
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings |= {
        "auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]},
        "fast_tokenizer_files": ["../tokenizer.4.0.0.json"],
        "tokenizer_file": outside,
        "vocab_file": outside,
    }
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    return refused(export, checkpoint, folder / "bundle")
