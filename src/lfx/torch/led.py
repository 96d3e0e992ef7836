"""Hugging Face's LED encoder with `AcceleratedAttention`, without padding to the window and the 4-D mask.

The classes keep their names, which a saved config holds as the architecture. A new module of one of them, which
`accelerate` did not make, is Hugging Face's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.led import modeling_led as hf

from lfx.torch.attention import AcceleratedAttention, check_inference
from lfx.torch.longformer import merged_tokens


class LEDEncoderSelfAttention(AcceleratedAttention, hf.LEDEncoderSelfAttention):  # type: ignore[misc]
    """Self-attention with the lfx ops."""


class LEDEncoder(hf.LEDEncoder):  # type: ignore[misc]
    """Runs a sequence of any length as it is."""

    is_accelerated = False
    max_global: int | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder; the arguments and the outputs are those of Hugging Face's LEDEncoder."""
        if not self.is_accelerated:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                global_attention_mask=global_attention_mask,
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
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = merged_tokens(embedded, attention_mask, global_attention_mask, self.max_global, _read_mask)
        states = [self.layernorm_embedding(embedded + self.embed_positions(embedded.shape[:2]))]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask=tokens)[0])
        wants_states = output_hidden_states if output_hidden_states is not None else config.output_hidden_states
        all_states = tuple(states) if wants_states else None
        if not (return_dict if return_dict is not None else config.return_dict):
            return tuple(item for item in (states[-1], all_states) if item is not None)
        return hf.LEDEncoderBaseModelOutput(last_hidden_state=states[-1], hidden_states=all_states)


def _read_mask(merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are real and which global, for any value, as LEDEncoder reads it."""
    return merged >= 1, merged > 1
