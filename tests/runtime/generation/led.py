"""Tiny random LEDs, and one of them as a `TextGenerator`: the search is tested without an exported file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LEDConfig, LEDForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from lfx.runtime.inputs import stack

VOCAB_SIZE = 60


def tiny_led(seed: int = 0, *, std: float = 0.2, **changes: Any) -> LEDForConditionalGeneration:
    """An LED of two layers and windows of 8 and 16 tokens on both sides, with random weights and biases."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_encoder_position_embeddings": 1600,
        "max_decoder_position_embeddings": 64,
        "attention_window": [8, 16],
    }
    model = LEDForConditionalGeneration(LEDConfig(**{**settings, **changes})).eval()
    return reseed(model, seed, std)


def reseed(model: LEDForConditionalGeneration, seed: int, std: float = 0.2) -> LEDForConditionalGeneration:
    """Draw all weights again, so that tokens vary with position and input, and rows end at different lengths."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.05, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)
        model.led.decoder.embed_positions.weight.normal_(0.0, 2.0, generator=generator)
        model.final_logits_bias.normal_(0.0, std, generator=generator)
        model.led.shared.weight[model.config.eos_token_id] *= 1.5
    return model


def random_inputs(rng: np.random.Generator, batch: int, seqlen: int, pattern: str) -> dict[str, Any]:
    """Ids, the mask of padding on the right, and global tokens: "first", "none" or "scattered"."""
    ids = rng.integers(3, VOCAB_SIZE, (batch, seqlen))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        length = int(rng.integers(1, seqlen + 1))
        ids[row, length:], mask[row, length:] = 1, 0
    global_mask = np.zeros_like(ids)
    if pattern == "first":
        global_mask[:, 0] = 1
    elif pattern == "scattered":
        global_mask[:] = (rng.random(ids.shape) < 0.1) * mask
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": global_mask}


def split(feeds: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs of each sequence of a batch."""
    return [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(len(feeds["input_ids"]))]


def torch_generate(model: LEDForConditionalGeneration, feeds: dict[str, Any], **options: Any) -> np.ndarray[Any, Any]:
    """What Hugging Face's generate returns."""
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of options that it thinks unusual
        tokens = model.generate(**inputs, **options)
    return np.asarray(tokens.numpy())


class TorchLed:
    """Runs the encoder and the decoder of Hugging Face's model."""

    def __init__(self, model: LEDForConditionalGeneration) -> None:
        self.model = model
        self.rows_decoded: list[int] = []  # of each step

    def encode(self, sequences: Sequence[dict[str, Any]], copies: int) -> TorchCache:
        feeds = stack(sequences, 1)
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.no_grad():
            states = self.model.get_encoder()(**inputs).last_hidden_state
        return TorchCache(self, states, inputs["attention_mask"], copies)


class TorchCache:
    """A cache of Hugging Face's."""

    def __init__(self, owner: TorchLed, states: torch.Tensor, mask: torch.Tensor, copies: int) -> None:
        self._owner, self._states = owner, states.repeat_interleave(copies, 0)
        self._mask = mask.repeat_interleave(copies, 0)
        self._past = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self._owner.rows_decoded.append(len(tokens))
        with torch.no_grad():
            outputs = self._owner.model(
                decoder_input_ids=torch.from_numpy(tokens),
                encoder_outputs=(self._states,),
                attention_mask=self._mask,
                past_key_values=self._past,
                use_cache=True,
            )
        return np.asarray(outputs.logits[:, -1].numpy())

    def select(self, rows: np.ndarray[Any, Any]) -> None:
        index = torch.from_numpy(rows)
        self._past.reorder_cache(index)
        self._states, self._mask = self._states[index], self._mask[index]
