"""Build, export and run two Longformers with xPos in place of the position table, and compare them with PyTorch.

    python examples/rotary_positions.py        # needs: pip install rotary-embedding-torch

Two models, with random weights:

- `table`: RotaryEmbedding replaces `embeddings.position_embeddings`. The angles of a position are added to the
  embedding of the token; nothing is rotated.
- `rotated`: xPos as in its paper, for causal attention (Sun et al. 2022, arXiv:2212.10554). Each self-attention rotates
  its queries and keys, so that scores depend on distances. There is no position table, so the length has no limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import nn
from transformers import LongformerConfig, LongformerModel

from lfx.export import export, use_loop_attention
from lfx.files import temporary_folder
from lfx.parity import pair_tolerance
from lfx.runtime import Engine

VOCAB_SIZE, HIDDEN, HEADS, LAYERS = 1000, 64, 4, 2
LENGTHS = (1, 100, 513, 4096)  # tokens


def config(**settings: Any) -> LongformerConfig:
    """Return the config of a small Longformer for 4,096 tokens."""
    return LongformerConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=128,
        attention_window=[64] * LAYERS,
        max_position_embeddings=4098,
        initializer_range=0.1,
        **settings,
    )


def table_model() -> Any:
    """Make the model `table`."""
    model = LongformerModel(config())
    model.embeddings.position_embeddings = RotaryEmbedding(dim=HIDDEN, use_xpos=True, cache_max_seq_len=4098)
    return model.eval()


class Rotated(nn.Module):
    """A projection to queries or keys, whose result is rotated by xPos.

    Args:
        projection: the layer from hidden states to queries or keys.
        rotary: the angles and scales of one head.
        sign: exponent of the scales: 1 for queries, -1 for keys.
    """

    def __init__(self, projection: nn.Module, rotary: RotaryEmbedding, sign: int) -> None:
        super().__init__()
        self.projection, self.rotary, self.sign = projection, rotary, sign

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seqlen, hidden) -> (batch, seqlen, hidden)."""
        heads = self.projection(hidden_states).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        positions = torch.arange(hidden_states.shape[1], dtype=torch.float32)
        # Not RotaryEmbedding.get_scale: it uses len(positions), which the export would make a constant.
        powers = (positions - hidden_states.shape[1] // 2) / self.rotary.scale_base
        scales = (self.rotary.scale ** powers[:, None]).repeat_interleave(2, dim=-1)
        rotated = apply_rotary_emb(self.rotary(positions), heads, scale=scales**self.sign)
        return rotated.transpose(1, 2).flatten(2)


class NoPositions(nn.Module):
    """Zeros in place of the position embeddings."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(batch, seqlen) -> (batch, seqlen, hidden)."""
        return torch.zeros(*position_ids.shape, HIDDEN)


def rotated_model() -> Any:
    """Make the model `rotated`; all windows are causal."""
    # LoopSelfAttention calls its projections with (batch, seqlen, hidden); Hugging Face's attention calls them with
    # (seqlen, batch, hidden).
    model = use_loop_attention(LongformerModel(config(autoregressive=True)))
    model.embeddings.position_embeddings = NoPositions()
    rotary = RotaryEmbedding(dim=HIDDEN // HEADS, use_xpos=True, cache_if_possible=False)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.query = Rotated(attention.query, rotary, 1)
        attention.key = Rotated(attention.key, rotary, -1)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {"table": table_model, "rotated": rotated_model}


def compare(name: str, folder: Path, lengths: tuple[int, ...]) -> bool:
    """Export a model and run it at each length; returns whether all outputs agree with PyTorch's."""
    torch.manual_seed(0)
    model = MODELS[name]()
    agrees = True
    with Engine(export(model, folder, global_attention="none")) as engine:
        print(f"{name}: longest sequence {engine.signature.max_seqlen or 'not limited'}")
        for length in lengths:
            ids = np.random.default_rng(length).integers(3, VOCAB_SIZE, (1, length))
            with torch.inference_mode():
                expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
            difference = float(np.abs(engine.run(ids)["last_hidden_state"] - expected).max())
            tolerance = pair_tolerance("fp32", LAYERS, float(np.abs(expected).max()))
            print(f"  {length:,} tokens: largest difference from PyTorch {difference:.1e}, tolerance {tolerance:.1e}")
            agrees &= difference <= tolerance
    return agrees


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit status, 0 if all outputs agree with PyTorch's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=LENGTHS)
    options = parser.parse_args(arguments)
    with temporary_folder("rotary") as scratch:
        different = [name for name in MODELS if not compare(name, scratch / name, options.lengths)]
    print(f"WRONG: {' and '.join(different)}" if different else "the outputs agree with PyTorch's")
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
