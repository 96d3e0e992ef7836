"""Attention probabilities as outputs of the graph: the modules that can have them, and the shapes of the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir
from torch import nn

from lfx.errors import ExportError
from lfx.export.loop_attention import LoopSelfAttention
from lfx.signature import ATTENTIONS, GLOBAL_ATTENTIONS, Signature


def check_layout(module: nn.Module) -> None:
    """Check that Hugging Face's layout of attention probabilities fits the module's windows.

    Raises:
        ExportError: the module has dilation or causal windows, which the layout has no columns for.
    """
    if any(isinstance(part, LoopSelfAttention) for part in module.modules()):
        raise ExportError(
            "output_attentions cannot be used with dilation or causal windows, for which Hugging Face's layout of "
            "attention probabilities has no columns; leave it out"
        )


def is_attention(name: str) -> bool:
    """Return whether this is the name of an attention output, in a graph that was traced with attention outputs."""
    return name.startswith((f"{ATTENTIONS}.", f"{GLOBAL_ATTENTIONS}."))


def free_axes(outputs: Mapping[str, ir.Value], *, has_choices: bool) -> None:
    """Remove the name of the last axis of each attention output: its size depends on the number of global tokens.

    Args:
        has_choices: remove the name of the first axis too, since Hugging Face's output has batch times choices rows.
    """
    for name, value in outputs.items():
        if is_attention(name) and value.shape is not None:
            axes: list[int | str | None] = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = ir.Shape([None if has_choices else axes[0], *axes[1:-1], None])


def without_attentions(signature: Signature) -> Signature:
    """Return the signature of the same model without attention outputs."""
    own = tuple(spec for spec in signature.outputs if not is_attention(spec.name))
    return dataclasses.replace(signature, outputs=own)
