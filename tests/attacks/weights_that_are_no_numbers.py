"""A checkpoint with NaN among its weights, which compares equal to anything that is NaN too."""

from __future__ import annotations

from pathlib import Path

import torch

from lfx.export import export
from tests.attacks import refused
from tests.models import tiny_model


def attack(folder: Path) -> str:
    """One NaN in one bias."""
    model = tiny_model()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] = float("nan")
    refusal = refused(export, model, folder / "bundle")
    assert not (folder / "bundle").exists()
    return refusal
