"""LED's modules for torch.onnx to trace: the two graphs of LEDForConditionalGeneration, and the decoder of its others.

`GenerationEncoder` is Hugging Face's encoder, with the keys and values of the decoder's cross-attention, which depend
on the encoder alone. `GenerationDecoder` is Hugging Face's decoder with cached keys and values as inputs and outputs,
for torch.onnx to trace: one path for any number of tokens and of cached tokens. `LEDModel` and `LEDDecoder` are one
graph with the encoder, without a cache. They call `view` in the place of `reshape`, which `decompose` leaves to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.onnx import ops
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.led import modeling_led as led

from lfx.signature import PAST, PRESENT, TEXT_GENERATION
from lfx.torch.attention import is_linear

LED_CLASSES = {  # task -> class of an LED
    "feature-extraction": "LEDModel",
    "text-classification": "LEDForSequenceClassification",
    "question-answering": "LEDForQuestionAnswering",
    TEXT_GENERATION: "LEDForConditionalGeneration",
}
Cached = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (B, H, S, D)


def cache_names(prefix: str, layers: int, part: str) -> list[str]:
    """Return the names of the cached keys and values of all layers.

    Args:
        prefix: `lfx.signature.PAST` or PRESENT.
        part: "decoder" for self-attention, "encoder" for cross-attention.
    """
    return [f"{prefix}.{i}.{part}.{name}" for i in range(layers) for name in ("key", "value")]


def split_heads(attention: led.LEDDecoderAttention, states: torch.Tensor) -> torch.Tensor:
    """(B, S, H·D) -> (B, H, S, D)."""
    return states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)


class GenerationEncoder(nn.Module):
    """The encoder of LEDForConditionalGeneration, and every layer's cross-attention keys and values.

    Args:
        model: an LEDForConditionalGeneration; its modules and their names are shared.
        cache_dtype: of the keys and values in the graph.

    Attributes:
        half_outputs: names of the outputs that are float16 in the graph; the others are float32.
    """

    def __init__(self, model: led.LEDForConditionalGeneration, cache_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.led, self.config = model.led, model.config
        names = cache_names(PRESENT, len(model.led.decoder.layers), "encoder")
        self.half_outputs = frozenset(names if cache_dtype == torch.float16 else ())

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the encoder.

        Args:
            input_ids, attention_mask, global_attention_mask: (B, S) int64.
        Returns:
            last_hidden_state (B, S, hidden), and `present.N.encoder.key` and `.value` (B, H, S, D).
        """
        hidden = self.led.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            global_attention_mask=global_attention_mask,
            return_dict=True,
        ).last_hidden_state
        outputs = {"last_hidden_state": hidden}
        for i, layer in enumerate(self.led.decoder.layers):
            key, value = _keys_and_values(layer.encoder_attn, hidden)
            outputs |= {f"{PRESENT}.{i}.encoder.key": key, f"{PRESENT}.{i}.encoder.value": value}
        return outputs


class GenerationDecoder(nn.Module):
    """The decoder of LEDForConditionalGeneration with its language modeling head.

    Args:
        model: an LEDForConditionalGeneration in the precision of the graph.
        cache_dtype: of the cached keys and values, which are inputs and outputs.
    """

    def __init__(self, model: led.LEDForConditionalGeneration, cache_dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.cache_dtype = model, cache_dtype

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`'s arguments."""
        layers = len(self.model.led.decoder.layers)
        caches = (*cache_names(PAST, layers, "decoder"), *cache_names(PAST, layers, "encoder"))
        return ["input_ids", "encoder_attention_mask", *caches]

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the decoder for the next tokens.

        Args:
            tensors: by `input_names`: input_ids (B, T); encoder_attention_mask (B, S); keys and values of the cached
                tokens (B, H, P, D); and those of the encoder's tokens (B, H, S, D).
        Returns:
            logits (B, T, vocabulary) float32, and `present.N.decoder.key` and `.value` (B, H, P + T, D).
        """
        arguments = dict(zip(self.input_names, tensors, strict=True))
        decoder, ids = self.model.led.decoder, arguments["input_ids"]
        dtype = decoder.embed_tokens.weight.dtype
        past_length, tokens = arguments[f"{PAST}.0.decoder.key"].shape[2], ids.shape[1]
        positions = torch.arange(tokens) + past_length
        causal = _fill(torch.arange(past_length + tokens)[None, :] > positions[:, None])  # (T, P + T)
        padding = _fill(arguments["encoder_attention_mask"][:, None, None, :] == 0)  # (B, 1, 1, S)
        hidden = _embed(decoder, ids, positions)
        outputs: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(decoder.layers):
            past, cross = (
                (arguments[f"{name}.key"].to(dtype), arguments[f"{name}.value"].to(dtype))
                for name in (f"{PAST}.{i}.decoder", f"{PAST}.{i}.encoder")
            )
            hidden, present = _layer(layer, hidden, past, cross, causal, padding)
            for name, states in zip(("key", "value"), present, strict=True):
                outputs[f"{PRESENT}.{i}.decoder.{name}"] = states.to(self.cache_dtype)
        return {"logits": self._logits(hidden).float(), **outputs}

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head, bias = self.model.lm_head, self.model.final_logits_bias
        if not is_linear(head) or head.weight is not self.model.led.decoder.embed_tokens.weight:
            plain: torch.Tensor = head(hidden) + bias
            return plain
        bias = bias.to(hidden.dtype) if head.bias is None else bias.to(hidden.dtype) + head.bias
        # Gemm reads the weight that it shares with the embedding as it is stored. A MatMul would need it transposed.
        flat = hidden.view(-1, hidden.shape[-1])
        vocab_size = head.weight.shape[0]
        logits = ops.symbolic(
            "Gemm",
            (flat, head.weight, bias.view(-1)),
            {"transB": 1},
            dtype=hidden.dtype,
            shape=(flat.shape[0], vocab_size),
            version=13,
        )
        return logits.view(*hidden.shape[:2], vocab_size)


class LEDModel(led.LEDModel):  # type: ignore[misc]
    """Gives the decoder the encoder's ids, shifted to the right, as Hugging Face's does without decoder_input_ids."""

    def forward(self, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        start = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
        return super().forward(input_ids, *arguments, **{**options, "decoder_input_ids": shifted, "use_cache": False})


class LEDDecoder(led.LEDDecoder):  # type: ignore[misc]
    """Runs all tokens at once, without a branch on their number, and returns no cache."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        assert encoder_hidden_states is not None
        positions = torch.arange(input_ids.shape[1])
        causal = _fill(positions[None, :] > positions[:, None])
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones_like(encoder_hidden_states[:, :, 0])
        padding = _fill(encoder_attention_mask[:, None, None, :] == 0)
        hidden = _embed(self, input_ids, positions)
        for layer in self.layers:
            cross = _keys_and_values(layer.encoder_attn, encoder_hidden_states)
            hidden, _present = _layer(layer, hidden, None, cross, causal, padding)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


def _embed(decoder: led.LEDDecoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    table = decoder.embed_positions.weight
    hidden: torch.Tensor = decoder.layernorm_embedding(
        decoder.embed_tokens(ids) + nn.functional.embedding(positions, table)
    )
    return hidden


def _fill(masked: torch.Tensor) -> torch.Tensor:
    """Return what is added to the scores: a value below which no score matters where a key is masked, else 0."""
    zeros = torch.zeros(masked.shape, dtype=torch.float32)  # whatever the default dtype is
    return zeros.masked_fill(masked, torch.finfo(torch.float32).min / 2)


def _layer(
    layer: led.LEDDecoderLayer,
    hidden: torch.Tensor,
    past: Cached | None,
    cross: Cached,
    causal: torch.Tensor,
    padding: torch.Tensor,
) -> tuple[torch.Tensor, Cached]:
    """Run a layer; returns the hidden states, and the keys and values of its self-attention."""
    own = layer.self_attn
    key, value = _keys_and_values(own, hidden)
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    hidden = layer.self_attn_layer_norm(hidden + _attend(own, hidden, key, value, causal))
    hidden = layer.encoder_attn_layer_norm(hidden + _attend(layer.encoder_attn, hidden, *cross, padding))
    output = layer.fc2(layer.activation_fn(layer.fc1(hidden)))
    return layer.final_layer_norm(hidden + output), (key, value)


def _keys_and_values(attention: led.LEDDecoderAttention, states: torch.Tensor) -> Cached:
    return split_heads(attention, attention.k_proj(states)), split_heads(attention, attention.v_proj(states))


def _attend(
    attention: led.LEDDecoderAttention,
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    query = split_heads(attention, attention.q_proj(hidden) * attention.scaling)
    scores = (query @ key.transpose(-1, -2)).float() + mask  # in float32 in any precision
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    context = (weights @ value).transpose(1, 2)
    output: torch.Tensor = attention.out_proj(context.contiguous().view(*hidden.shape[:2], attention.embed_dim))
    return output
