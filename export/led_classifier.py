"""`LEDForSequenceClassification`, which transformers had before its version 5, for its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.led import modeling_led as led


class LEDForSequenceClassification(led.LEDPreTrainedModel):  # type: ignore[misc]
    """An LED with a classification head over the decoder's state at the last eos token of a sequence, padding aside.

    A sequence without an eos token is classified by its first token; transformers raised an error.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.led = led.LEDModel(config)
        self.classification_head = led.LEDClassificationHead(
            config.d_model, config.d_model, config.num_labels, config.classifier_dropout
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> led.LEDSeq2SeqSequenceClassifierOutput:
        """Classify sequences.

        Args:
            input_ids, attention_mask, global_attention_mask: (B, S) int64.
        Returns:
            logits (B, labels), and encoder_last_hidden_state (B, S, hidden).
        """
        outputs = self.led(
            input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask, return_dict=True
        )
        states = outputs.last_hidden_state
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_end = input_ids == self.config.eos_token_id
        if attention_mask is not None:
            is_end = is_end & (attention_mask != 0)  # padding may have the id of the eos token
        last = (positions * is_end).amax(dim=1)
        pooled = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
        return led.LEDSeq2SeqSequenceClassifierOutput(
            logits=self.classification_head(pooled), encoder_last_hidden_state=outputs.encoder_last_hidden_state
        )
