"""Hugging Face's Longformer and LED encoders for self-attention that takes a sequence of any length.

Theirs pad a sequence to a multiple of the window and build a 4-D mask of S² elements. These do neither, and have no
`.item()`, so that torch.export can trace them. They keep the names, which a saved config holds as its architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.models.led import modeling_led as led
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError
from lfx.torch.masks import merged_mask

# The classes of self-attention with a window and global tokens; LED's is a copy of Longformer's under another name.
SELF_ATTENTION = (hf.LongformerSelfAttention, led.LEDEncoderSelfAttention)


class LongformerEncoder(hf.LongformerEncoder):  # type: ignore[misc]
    """Calls the layers with the attention mask alone, and removes no padding."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_len: int = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        states = [hidden_states]
        for layer in self.layer:
            states.append(layer(states[-1], attention_mask=attention_mask, output_attentions=output_attentions)[0])
        all_states = tuple(states) if output_hidden_states else None
        if not return_dict:
            return tuple(item for item in (states[-1], all_states) if item is not None)
        return hf.LongformerBaseModelOutput(last_hidden_state=states[-1], hidden_states=all_states)


class LongformerModel(hf.LongformerModel):  # type: ignore[misc]
    """Hands the encoder a mask (B, S): -1 masked, 0 local, 1 global."""

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
        embedded = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        merged = merged_mask(embedded, attention_mask, global_attention_mask) - 1
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        encoded = self.encoder(
            embedded,
            attention_mask=merged,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(
                output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
            ),
            return_dict=return_dict,
        )
        pooled = self.pooler(encoded[0]) if self.pooler is not None else None
        if not return_dict:
            return (encoded[0], pooled, *encoded[1:])
        return hf.LongformerBaseModelOutputWithPooling(
            last_hidden_state=encoded[0], pooler_output=pooled, hidden_states=encoded.hidden_states
        )


class LEDEncoderLayer(led.LEDEncoderLayer):  # type: ignore[misc]
    """Calls self-attention with the attention mask alone.

    Hugging Face's layer also clamps a float16 output that has an infinite value. The output of this layer is that of a
    layer norm, which is infinite only if the norm's weight is above 65,504 / √hidden.
    """

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        context, *rest = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask)
        hidden_states = self.self_attn_layer_norm(hidden_states + context)
        output = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        return (self.final_layer_norm(hidden_states + output), *rest)


class LEDEncoder(led.LEDEncoder):  # type: ignore[misc]
    """Hands the layers a mask (B, S): -1 masked, 0 local, 1 global."""

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
        embedded = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        merged = merged_mask(embedded, attention_mask, global_attention_mask) - 1
        states = [self.layernorm_embedding(embedded + self.embed_positions(embedded.shape[:2]))]
        for layer in self.layers:
            states.append(layer(states[-1], merged)[0])
        all_states = tuple(states) if output_hidden_states else None
        if not (return_dict if return_dict is not None else self.config.return_dict):
            return tuple(item for item in (states[-1], all_states) if item is not None)
        return led.LEDEncoderBaseModelOutput(last_hidden_state=states[-1], hidden_states=all_states)


_OF_LED: dict[type[nn.Module], type[nn.Module]] = {}


def _of_led(attention: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a self-attention class and of LEDEncoderSelfAttention, whose place it takes."""
    names = {"__module__": attention.__module__, "__doc__": attention.__doc__}
    bases = (attention, led.LEDEncoderSelfAttention)
    return _OF_LED.setdefault(attention, type(attention.__name__, bases, names))


def replace_attention(model: nn.Module, attention: type[hf.LongformerSelfAttention]) -> nn.Module:
    """Replace the classes of Longformer and LED modules in `model`, in place; that of self-attention is `attention`.

    A module of a user's subclass gets a new class of the same name, whose bases are the subclass and the replacement,
    so that the subclass's methods are kept.

    Raises:
        ExportError: `lfx.torch.accelerate` has replaced them already.
    """
    if any(isinstance(m, SELF_ATTENTION) and getattr(m, "is_accelerated", False) for m in model.modules()):
        raise ExportError(
            "the model is accelerated: its attention is lfx.torch's; give the model as it was before "
            "accelerate(model), which changes a model in place"
        )
    replacements: dict[type[nn.Module], type[nn.Module]] = {
        led.LEDEncoderSelfAttention: _of_led(attention),
        led.LEDEncoderLayer: LEDEncoderLayer,
        led.LEDEncoder: LEDEncoder,
        hf.LongformerSelfAttention: attention,
        hf.LongformerEncoder: LongformerEncoder,
        hf.LongformerModel: LongformerModel,
    }
    return replace_classes(model, replacements)


def replace_classes(model: nn.Module, replacements: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Replace the classes of modules, in place; that of a subclass by a new class, as `replace_attention` says.

    Args:
        replacements: class -> its subclass that replaces it.
    """
    for module in model.modules():
        for original, replacement in replacements.items():
            if isinstance(module, original) and not isinstance(module, replacement):
                cls = type(module)
                own = not issubclass(replacement, cls)
                names = {"__module__": cls.__module__, "__doc__": cls.__doc__}
                module.__class__ = type(cls.__name__, (cls, replacement), names) if own else replacement
                if cls.forward is original.forward and _is_bound(module, original.forward):
                    del module.forward  # as accelerate.unwrap_model leaves it; it would hide the replacement's
    return model


def _is_bound(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether an instance has its class's forward, perhaps without its decorators, as an attribute of its own."""
    own = vars(module).get("forward")
    return isinstance(own, MethodType) and own.__self__ is module and own.__func__ in (forward, inspect.unwrap(forward))
