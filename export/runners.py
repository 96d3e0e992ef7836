"""A torch model as a function from numpy inputs to numpy outputs: as it is, or with the dense float64 attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.longformer import modeling_longformer as hf

from lfx import reference
from lfx.errors import ExportError, one_line
from lfx.export.load import quiet
from lfx.export.rewrite import clone, named_outputs, replace_attention
from lfx.parity import Arrays, Runner

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _DenseSelfAttention(hf.LongformerSelfAttention):  # type: ignore[misc]
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor]:
        mask = attention_mask.numpy()
        key_mask, is_global = mask >= 0, mask > 0
        slots = max(1, int(is_global.sum(axis=1).max()))
        index = np.full((len(mask), slots), -1)
        for row, flags in enumerate(is_global):
            found = np.flatnonzero(flags)
            index[row, : len(found)] = found
        chosen = hidden_states[torch.arange(len(mask))[:, None], torch.from_numpy(index).clamp(min=0)]
        rows = reference.global_attention(
            self.query_global(chosen).numpy(),
            self.key_global(hidden_states).numpy(),
            self.value_global(hidden_states).numpy(),
            key_mask,
            num_heads=self.num_heads,
        )
        context = reference.banded_attention(
            self.query(hidden_states).numpy(),
            self.key(hidden_states).numpy(),
            self.value(hidden_states).numpy(),
            key_mask,
            index,
            rows,
            num_heads=self.num_heads,
            window=self.one_sided_attn_window_size,
        )
        return (torch.from_numpy(context),)


def torch_runner(model: nn.Module, precision: str = "fp32", passes: tuple[str, ...] | None = None) -> Runner:
    """The model itself, in `precision`; `passes` names the inputs that its forward takes (None = all given)."""
    return _runner(clone(model, TORCH_DTYPES[precision]), passes)


def reference_runner(model: nn.Module, passes: tuple[str, ...] | None = None) -> Runner:
    """The model in float64 with dense attention: right by definition."""
    return _runner(replace_attention(clone(model, torch.float64), _DenseSelfAttention), passes)


def _runner(model: nn.Module, passes: tuple[str, ...] | None) -> Runner:
    def run(inputs: Arrays) -> Arrays:
        tensors = {k: torch.from_numpy(v) for k, v in inputs.items() if passes is None or k in passes}
        try:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False), quiet():
                outputs = named_outputs(model(**tensors))
        except ExportError:
            raise
        except Exception as error:
            shape = tuple(inputs["input_ids"].shape)
            raise ExportError(f"the PyTorch model itself fails on ids of shape {shape}: {one_line(error)}") from error
        return {name: (out.double() if out.is_floating_point() else out).numpy() for name, out in outputs.items()}

    return run
