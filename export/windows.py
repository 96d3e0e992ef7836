"""Attention windows and dilations: the conventions of configs, and those of the ops.

| | counts |
|---|---|
| Hugging Face's `attention_window` | the keys on both sides together: an even number |
| allenai's and ONNX Runtime's `attention_window`, the ops' `window` | the keys on one side |

With a dilation d the keys of a window are d tokens apart, so that a window of w keys on one side reaches w·d tokens.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1; gives heads of one layer different dilations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfx.checks import whole_number
from lfx.errors import ExportError


def both_sides(window: int) -> int:
    """Return Hugging Face's attention_window for a one-sided window."""
    return 2 * window


def layer_dilations(
    attention_dilation: Any, layers: int, heads: int, name: str = "attention_dilation", largest: int = 2**31 - 1
) -> list[int | tuple[int, ...]]:
    """Check an attention_dilation, and return an entry for each layer: one number, or one for each head.

    Args:
        attention_dilation: a number, a list of one entry for each layer, or None, which stands for 1. An entry is a
            number or a list of one number for each head.
        name: of the setting, for messages.
        largest: allowed number.
    Raises:
        ExportError: a list has another length, or a number is not from 1 to `largest`.
    """

    def number(value: Any) -> int:
        return whole_number(value, name, 1, largest, ExportError)

    def entries(values: Any, count: int, parts: str) -> list[Any]:
        if len(values) != count:
            raise ExportError(f"{name} has {len(values)} entries for {count} {parts}; give one for each, or a number")
        return list(values)

    if attention_dilation is None:
        return [1] * layers
    if not isinstance(attention_dilation, (list, tuple)):
        return [number(attention_dilation)] * layers
    return [
        tuple(map(number, entries(entry, heads, "heads"))) if isinstance(entry, (list, tuple)) else number(entry)
        for entry in entries(attention_dilation, layers, "layers")
    ]


def head_dilations(entry: int | tuple[int, ...], heads: int) -> tuple[int, ...]:
    """Return the dilation of each head of a layer, from the layer's entry of `layer_dilations`."""
    return (entry,) * heads if isinstance(entry, int) else entry


def head_groups(dilations: Sequence[int]) -> dict[int, list[int]]:
    """Group the heads of a layer by dilation.

    Returns:
        dilation -> its heads in ascending order; in the order of their first heads.
    """
    groups: dict[int, list[int]] = {}
    for head, dilation in enumerate(dilations):
        groups.setdefault(dilation, []).append(head)
    return groups
