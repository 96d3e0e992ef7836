"""The lfx ops as custom ops of PyTorch, and `accelerate`, which puts them into a model of transformers for inference.

The package needs torch, and `accelerate` also transformers. No other part of lfx but export imports it.
"""

from __future__ import annotations

from lfx.errors import require

require("torch", "torch")

from lfx.torch.ops import banded_attention, global_attention  # noqa: E402
from lfx.torch.replace import accelerate  # noqa: E402

__all__ = ["accelerate", "banded_attention", "global_attention"]
