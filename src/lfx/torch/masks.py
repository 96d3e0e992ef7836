"""A model's two masks as one."""

from __future__ import annotations

import torch


def merged_mask(
    embedded: torch.Tensor, attention_mask: torch.Tensor | None, global_attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Merge the masks as Hugging Face's `_merge_to_attention_mask` does; it has no `.item()` and can be traced.

    Args:
        embedded: (B, S, hidden), for the shape and the device.
        attention_mask: (B, S), 0 = padding, 1 = local, 2 = global. Default: no padding.
        global_attention_mask: (B, S), 1 = global. Default: the tokens that attention_mask marks with 2.
    Returns:
        (B, S): 0 = padding, 1 = local, more = global.
    """
    if attention_mask is None:
        attention_mask = torch.ones(embedded.shape[:2], dtype=torch.int64, device=embedded.device)
    return attention_mask * (1 if global_attention_mask is None else global_attention_mask + 1)
