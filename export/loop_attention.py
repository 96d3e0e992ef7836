"""Longformer self-attention in PyTorch with dilation by head and causal windows, which Hugging Face's does not have.

It is the paper's form "loop": one step for each key of a window, in which all queries meet the key at that distance.
Memory is linear in the sequence length, there is no padding, and gradients flow, so that it trains too.

Source: Beltagy et al. 2020, arXiv:2004.05150, sections 3.1 (windows, dilation by head) and 3.2 (loop).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError
from lfx.export.unpadded import SELF_ATTENTION, replace_attention
from lfx.export.windows import head_dilations, head_groups, layer_dilations


class LoopSelfAttention(hf.LongformerSelfAttention):  # type: ignore[misc]
    """Self-attention of one layer; docs/ops.md defines which keys a query sees.

    Attributes:
        dilations: of each head; empty = 1 for all.
        causal: whether a window has no keys after the query. Global tokens see all tokens, and are seen by all.
    """

    dilations: tuple[int, ...] = ()
    causal: bool = False

    def __init__(self, config: Any, layer_id: int) -> None:
        super().__init__(config, layer_id)
        self.read_config(config, layer_id)

    def read_config(self, config: Any, layer_id: int) -> None:
        """Take dilations and direction from a config's attention_dilation and autoregressive."""
        entries = layer_dilations(getattr(config, "attention_dilation", None), config.num_hidden_layers, self.num_heads)
        self.dilations = head_dilations(entries[layer_id], self.num_heads)
        self.causal = bool(getattr(config, "autoregressive", False))

    @property
    def groups(self) -> dict[int, list[int]]:
        """Dilation -> the heads that have it."""
        return head_groups(self.dilations or (1,) * self.num_heads)

    @property
    def reach(self) -> int:
        """Distance in tokens from a query to the farthest key of its window, of all heads."""
        return int(self.one_sided_attn_window_size) * max(self.groups)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_index_masked: torch.Tensor | None = None,
        is_index_global_attn: torch.Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor]:
        """Run self-attention on a sequence of any length.

        Args:
            hidden_states: (B, S, hidden).
            attention_mask: (B, S), < 0 masked, 0 local, > 0 global; None = all local.
            is_index_masked, is_index_global_attn, is_global_attn: what the mask says; not read.
            output_attentions: must be False.
        Returns:
            The context (B, S, hidden), as the only entry of a tuple.
        Raises:
            ExportError: output_attentions is set.
        """
        if output_attentions:
            raise ExportError("output_attentions is set, but the attention weights are never stored; leave it out")
        if attention_mask is None:
            attention_mask = hidden_states.new_zeros(hidden_states.shape[:2])
        is_global = attention_mask > 0
        index, used = _global_index(is_global)
        query, key, value = (self._split(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        query = query * self.head_dim**-0.5
        rows = torch.arange(len(index), device=index.device)[:, None]
        parts: list[torch.Tensor] = [query] * self.num_heads
        for dilation, heads in self.groups.items():
            q, k, v = (x[:, :, heads] for x in (query, key, value))
            context = self._window(q, k, v, attention_mask == 0, (k[rows, index], v[rows, index], used), dilation)
            for i, head in enumerate(heads):
                parts[head] = context[:, :, i]
        context = torch.cat(parts, dim=-1)
        context = context.masked_fill((attention_mask < 0)[:, :, None], 0.0)
        if index.shape[1]:
            finished = self._global_rows(hidden_states, hidden_states[rows, index], attention_mask >= 0)
            context = context.index_put(is_global.nonzero(as_tuple=True), finished[used])
        return (context,)

    def _window(
        self,
        query: torch.Tensor,  # (B, S, h, D), scaled; h heads of one dilation
        key: torch.Tensor,
        value: torch.Tensor,
        local: torch.Tensor,  # (B, S), whether a token may be seen in a window
        slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # keys and values (B, G, h, D) of global tokens; used
        dilation: int,
    ) -> torch.Tensor:
        """Attend to the window and the global tokens with one softmax; returns (B, S, h, D)."""
        seqlen, window = query.shape[1], int(self.one_sided_attn_window_size)
        steps = min(window, (seqlen - 1) // dilation)  # keys of further steps are outside the sequence for all queries
        offsets = [dilation * step for step in range(-steps, 1 if self.causal else steps + 1)]
        before, after = -offsets[0], offsets[-1]

        def pad(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [before, after])

        keys, values, visible = pad(key), pad(value), pad(local)
        columns = [slice(before + offset, before + offset + seqlen) for offset in offsets]
        wide = torch.promote_types(query.dtype, torch.float32)  # of sums, as in a matrix product
        hidden_score = torch.finfo(query.dtype).min  # finite: a masked query sees no key, and has no NaN gradients
        slot_keys, slot_values, used = slots
        scores = torch.einsum("bshd,bghd->bshg", query.to(wide), slot_keys.to(wide))
        scores = scores.masked_fill(~used[:, None, None, :], hidden_score)
        local_scores = [
            (query.to(wide) * keys[:, at].to(wide)).sum(-1).masked_fill(~visible[:, at, None], hidden_score)
            for at in columns
        ]
        scores = torch.cat([scores, torch.stack(local_scores, dim=-1)], dim=-1).to(query.dtype)  # (B, S, h, G + keys)
        weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
        weights = nn.functional.dropout(weights, p=self.dropout, training=self.training).to(wide)
        count = slot_keys.shape[1]
        context = torch.einsum("bshg,bghd->bshd", weights[..., :count], slot_values.to(wide))
        for i, at in enumerate(columns):
            context = context + weights[..., count + i, None] * values[:, at].to(wide)
        return context.to(query.dtype)

    def _global_rows(self, hidden: torch.Tensor, global_hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Attend from the global tokens (B, G, hidden) to all real tokens; returns (B, G, hidden)."""
        query = self._split(self.query_global(global_hidden)) * self.head_dim**-0.5
        key, value = self._split(self.key_global(hidden)), self._split(self.value_global(hidden))
        scores = torch.einsum("bghd,bshd->bhgs", query, key)
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
        wide = torch.promote_types(query.dtype, torch.float32)
        weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
        weights = nn.functional.dropout(weights, p=self.dropout, training=self.training)
        return torch.einsum("bhgs,bshd->bghd", weights, value).flatten(2)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H·D) -> (B, S, H, D)."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)


def _global_index(is_global: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of the global tokens in order, (B, G), and which slots are used; unused slots hold 0."""
    counts = is_global.sum(dim=1)
    used = torch.arange(int(counts.max()), device=is_global.device) < counts[:, None]
    index = torch.zeros(used.shape, dtype=torch.int64, device=is_global.device)
    return index.masked_scatter(used, is_global.nonzero()[:, 1]), used


def asks_for_loop_attention(config: Any) -> bool:
    """Return whether a config has a dilation above 1 or causal windows, which Hugging Face's attention ignores."""
    dilation = getattr(config, "attention_dilation", None)
    if dilation is None:
        return bool(getattr(config, "autoregressive", False))
    entries = layer_dilations(dilation, config.num_hidden_layers, config.num_attention_heads)
    return bool(getattr(config, "autoregressive", False)) or any(entry != 1 for entry in _flat(entries))


def _flat(entries: list[int | tuple[int, ...]]) -> Iterator[int]:
    for entry in entries:
        yield from (entry,) if isinstance(entry, int) else entry


def use_loop_attention(model: nn.Module) -> nn.Module:
    """Make a Longformer of transformers follow its config's attention_dilation and autoregressive, in place.

    Hugging Face's LongformerSelfAttention ignores both. Each becomes a LoopSelfAttention with the same weights, and
    LongformerModel pads no longer. A checkpoint that `save_pretrained` writes keeps the two settings, and `lfx export`
    follows them.

    Args:
        model: contains transformers' Longformer modules, in training or eval mode. Its config has attention_dilation:
            a number, or a list with an entry for each layer, a number or a list of one for each head; and
            autoregressive, a bool. A layer's attention_window counts the keys on both sides, also if the window is
            causal and has those of one side only.
    Returns:
        `model`.
    Raises:
        ExportError: the model has no such module or is accelerated, or attention_dilation does not fit the numbers of
            layers and heads.
    """
    if not isinstance(model, nn.Module) or not any(isinstance(module, SELF_ATTENTION) for module in model.modules()):
        raise ExportError(f"{type(model).__name__} has no Longformer self-attention; give a Longformer or LED")
    for module in replace_attention(model, LoopSelfAttention).modules():
        if isinstance(module, LoopSelfAttention):
            module.read_config(module.config, module.layer_id)
    return model
