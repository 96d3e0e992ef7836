"""What processes that start anew run: this module imports no torch, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfx.runtime import Engine


def last_hidden_state(bundle: Path, ids: list[int]) -> Any:
    """The output of a bundle whose attention runs in kernels."""
    with Engine(bundle, kernels="fused") as engine:
        return engine.run(ids)["last_hidden_state"]
