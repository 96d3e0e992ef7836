"""Hugging Face's Longformer modules with `AcceleratedAttention`, without padding to the window and the 4-D mask.

The classes keep their names, which a saved config holds as the architecture. A new module of one of them, which
`accelerate` did not make, is Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.longformer import modeling_longformer as hf

from lfx.torch.attention import AcceleratedAttention, check_inference
from lfx.torch.masks import merged_mask
from lfx.torch.tokens import Tokens, tokens_of


class LongformerSelfAttention(AcceleratedAttention, hf.LongformerSelfAttention):  # type: ignore[misc]
    """Self-attention with the lfx ops."""


class LongformerEncoder(hf.LongformerEncoder):  # type: ignore[misc]
    """Hands its layers the Tokens."""

    is_accelerated = False
    max_global: int | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        padding_len: int = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Run the layers.

        Args:
            attention_mask: Tokens, or Hugging Face's mask of this module: (B, S), < 0 masked, 0 local, > 0 global.
            padding_len: number of tokens at the end that a caller added; they are cut off.
        """
        if not self.is_accelerated:
            return super().forward(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                padding_len=padding_len,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            )
        check_inference(self, output_attentions)
        tokens = attention_mask
        if not isinstance(tokens, Tokens):
            tokens = tokens_of(attention_mask >= 0, attention_mask > 0, self.max_global)
        states = [hidden_states]
        for layer in self.layer:
            states.append(layer(states[-1], attention_mask=tokens)[0])
        if padding_len:
            states = [state[:, :-padding_len] for state in states]
        all_states = tuple(states) if output_hidden_states else None
        if not return_dict:
            return tuple(item for item in (states[-1], all_states) if item is not None)
        return hf.LongformerBaseModelOutput(last_hidden_state=states[-1], hidden_states=all_states)


class LongformerModel(hf.LongformerModel):  # type: ignore[misc]
    """Runs a sequence of any length as it is."""

    is_accelerated = False
    max_global: int | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; the arguments and the outputs are those of Hugging Face's LongformerModel."""
        if not (self.is_accelerated and getattr(self.encoder, "is_accelerated", False)):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                global_attention_mask=global_attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **kwargs,
            )
        config = self.config
        check_inference(self, output_attentions if output_attentions is not None else config.output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = self.embeddings(
            input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
        )
        tokens = merged_tokens(embedded, attention_mask, global_attention_mask, self.max_global, _read_mask)
        return_dict = return_dict if return_dict is not None else config.return_dict
        encoded = self.encoder(
            embedded,
            attention_mask=tokens,
            output_hidden_states=output_hidden_states
            if output_hidden_states is not None
            else config.output_hidden_states,
            return_dict=return_dict,
        )
        pooled = self.pooler(encoded[0]) if self.pooler is not None else None
        if not return_dict:
            return (encoded[0], pooled, *encoded[1:])
        return hf.LongformerBaseModelOutputWithPooling(
            last_hidden_state=encoded[0], pooler_output=pooled, hidden_states=encoded.hidden_states
        )


def _read_mask(merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are real and which global, for any value, as LongformerModel reads it."""
    return merged > 0, merged == 2


def merged_tokens(
    embedded: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_attention_mask: torch.Tensor | None,
    max_global: int | None,
    read_mask: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Tokens:
    """Make the Tokens from a model's masks; an attention_mask may mark global tokens with 2, as Hugging Face's may.

    Args:
        read_mask: which tokens of a merged mask are real and which are global, two (B, S) bool; models differ in values
            other than 0, 1 and 2.
    """
    if attention_mask is None and global_attention_mask is None:
        real = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        return tokens_of(real, None, max_global)
    return tokens_of(*read_mask(merged_mask(embedded, attention_mask, global_attention_mask)), max_global)
