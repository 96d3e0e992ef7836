"""A pickle in place of the weights runs a function when it is loaded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from lfx.export.load import load
from tests.attacks import refused
from tests.models import save_tiny_checkpoint


class _Program:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def attack(folder: Path) -> str:
    """The pickle is as large as the weights that it replaces."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    size = (checkpoint / "model.safetensors").stat().st_size
    (checkpoint / "model.safetensors").unlink()
    program = {"embeddings.word_embeddings.weight": _Program(folder / "ran"), "padding": b" " * size}
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(program))
    refusal = refused(load, str(checkpoint))
    assert not (folder / "ran").exists()
    return refusal
