"""Attention probabilities as outputs of the graph: which modules have them, and the shapes of these outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir
from torch import nn

from lfx.errors import ExportError
from lfx.export.loop_attention import LoopSelfAttention
from lfx.signature import ATTENTIONS, GLOBAL_ATTENTIONS, Signature


def check_layout(module: nn.Module) -> None:
    """Check that Hugging Face's layout has a column for each key that the module's windows have.

    Raises:
        ExportError: the module has dilation or causal windows.
    """
    if any(isinstance(part, LoopSelfAttention) for part in module.modules()):
        raise ExportError(
            "output_attentions cannot be used with dilation or causal windows, for which Hugging Face's layout of "
            "attention probabilities has no columns; leave it out"
        )


def is_attention(name: str) -> bool:
    """Return whether an output of a graph that was traced with attention outputs is one of them."""
    return name.startswith((f"{ATTENTIONS}.", f"{GLOBAL_ATTENTIONS}."))


def free_axes(outputs: Mapping[str, ir.Value], *, has_choices: bool) -> None:
    """Make the last axis of each attention output unnamed: its size depends on the largest number of global tokens.

    Args:
        has_choices: the first axis is unnamed too, since Hugging Face's has batch times choices rows.
    """
    for name, value in outputs.items():
        if is_attention(name) and value.shape is not None:
            axes: list[int | str | None] = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = ir.Shape([None if has_choices else axes[0], *axes[1:-1], None])


def without_attentions(signature: Signature) -> Signature:
    """Return the signature of the same model without attention outputs."""
    own = tuple(spec for spec in signature.outputs if not is_attention(spec.name))
    return dataclasses.replace(signature, outputs=own)
