"""Self-attention of Longformer and of LED's encoder with the lfx ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lfx.errors import InputError
from lfx.torch.ops import banded_attention, global_attention
from lfx.torch.tokens import Tokens, tokens_of


class AcceleratedAttention(nn.Module):
    """The forward of a LongformerSelfAttention or LEDEncoderSelfAttention, for a sequence of any length.

    Attributes:
        is_accelerated: whether `lfx.torch.accelerate` made the module; a new one of its class is Hugging Face's.
        max_global: see `lfx.torch.accelerate`.
    """

    is_accelerated = False
    max_global: int | None = None
    # Set by the class of transformers that this one is combined with.
    num_heads: int
    head_dim: int
    one_sided_attn_window_size: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_global: nn.Module
    key_global: nn.Linear
    value_global: nn.Linear

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        is_index_masked: torch.Tensor | None = None,
        is_index_global_attn: torch.Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor]:
        """Compute the context.

        Args:
            hidden_states: (B, S, hidden).
            attention_mask: Tokens, or Hugging Face's mask of this module: (B, S), < 0 masked, 0 local, > 0 global;
                None = all local.
            is_index_masked, is_index_global_attn, is_global_attn: what the mask says; not read.
            output_attentions: must be False.
        Returns:
            The context (B, S, hidden), as the only entry of a tuple.
        Raises:
            InputError: output_attentions is set, or the module is in training mode.
        """
        if not self.is_accelerated:
            context: tuple[torch.Tensor] = super().forward(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                is_index_masked=is_index_masked,
                is_index_global_attn=is_index_global_attn,
                is_global_attn=is_global_attn,
                output_attentions=output_attentions,
            )
            return context
        check_inference(self, output_attentions)
        query, key, value = (_project(part, hidden_states) for part in (self.query, self.key, self.value))
        # Under torch.autocast the projections have its type; one of a user's own may have another.
        key, value, hidden_states = (tensor.to(query.dtype) for tensor in (key, value, hidden_states))
        tokens = attention_mask
        if not isinstance(tokens, Tokens):
            mask = hidden_states.new_zeros(hidden_states.shape[:2]) if tokens is None else tokens
            tokens = tokens_of(mask >= 0, None if tokens is None else mask > 0, self.max_global)
        slots = tokens.global_index.shape[1]
        if tokens.has_globals:
            global_context = self._global_context(hidden_states, tokens)
        else:
            global_context = hidden_states.new_zeros((hidden_states.shape[0], slots, hidden_states.shape[2]))
        rows = banded_attention(
            query,
            key,
            value,
            tokens.key_mask,
            tokens.global_index,
            global_context,
            num_heads=self.num_heads,
            window=self.one_sided_attn_window_size,
        )
        return (rows,)

    def _global_context(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute the context of the global tokens, (B, G, hidden), in the cheaper of two forms; see docs/ops.md."""
        width = hidden.shape[2]
        position = tokens.global_index.clamp(min=0).long()[:, :, None].expand(-1, -1, width)
        query = _project(self.query_global, hidden.gather(1, position))
        projections = (self.key_global, self.value_global)
        if tokens.global_index.shape[1] >= self.head_dim or not all(map(is_plain, projections)):
            inputs = (query, *(_project(projection, hidden) for projection in projections))
            query, key, value = (tensor.to(hidden.dtype) for tensor in inputs)
            rows: torch.Tensor = global_attention(query, key, value, tokens.key_mask, num_heads=self.num_heads)
            return rows
        key_weight, value_weight = (
            projection.weight.view(self.num_heads, self.head_dim, width) for projection in projections
        )
        by_head = query.reshape(*query.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, G, D)
        folded = (by_head @ key_weight).to(hidden.dtype)  # (B, H, G, hidden)
        # A query's product with the key's bias adds one constant to all its scores, which softmax cancels.
        weighted_sum = global_attention(
            folded.flatten(1, 2), hidden, hidden, tokens.key_mask, num_heads=1, scale=self.head_dim**-0.5
        )
        weighted_sum = weighted_sum.view(folded.shape)
        context = (weighted_sum @ value_weight.transpose(1, 2)).transpose(1, 2).flatten(2)
        result: torch.Tensor = context + self.value_global.bias
        return result.to(hidden.dtype)


def check_inference(module: nn.Module, output_attentions: Any) -> None:
    """Refuse what an accelerated model does not do.

    Raises:
        InputError: attention weights are requested, or the module is in training mode.
    """
    if output_attentions:
        raise InputError("an accelerated model stores no attention weights; leave output_attentions out")
    if module.training:
        raise InputError("an accelerated model runs inference alone; call model.eval() first")


def _project(projection: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Call a projection; one of a user's own gets (S, B, hidden), as Hugging Face's attention gives it."""
    if is_plain(projection):
        plain: torch.Tensor = projection(hidden)
        return plain
    own: torch.Tensor = projection(hidden.transpose(0, 1))
    return own.transpose(0, 1)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear of an ordinary tensor, without hooks and without a forward of its own."""
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    # Wrappers of tensors, such as torchao's quantized weights, have the method, and need not have views. torch.compile
    # sees it in the class alone.
    return type(module) is nn.Linear and not changed and not hasattr(type(module.weight), "__tensor_flatten__")


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection is an nn.Linear with a bias, without hooks and without a forward of its own."""
    return is_linear(projection) and projection.bias is not None
