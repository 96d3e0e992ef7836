"""Techniques of Longformers in a model's own code: relative positions, training in stages, replaced methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import nn
from transformers import LongformerForMaskedLM

from lfx.export import export, use_loop_attention
from lfx.runtime import Engine
from tests.models import VOCAB_SIZE, save_tiny_checkpoint, tiny_model

HIDDEN, HEADS, WAVES = 32, 2, 4
SIZE = HIDDEN // HEADS  # of a head's content
WIDE = SIZE + 2 * WAVES  # with the features of positions beside it


class RelativePositions(nn.Module):
    """Transformer-XL's relative sinusoidal positions, of one layer.

    The score of query i and key j is ((q_i + u) · k_j + (q_i + v) · W r(i - j)) / sqrt(SIZE), and r(d) holds sines and
    cosines of d. Those of i - j are sums of products of those of i and those of j. So the second term is an inner
    product too: of features of the query, which hold i, and of features of the key, which hold j.

    Source: Dai et al. 2019, arXiv:1901.02860, section 3.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.content_bias, self.position_bias = (nn.Parameter(torch.randn(HEADS, SIZE)) for _ in range(2))
        self.weight = nn.Parameter(torch.randn(HEADS, SIZE, 2, WAVES) * 0.5)  # of sines, of cosines
        self.register_buffer("rates", 10000.0 ** -(torch.arange(WAVES) / WAVES))

    def angles(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(1, seqlen, 1, WAVES): the angles of each position."""
        return (torch.arange(hidden_states.shape[1])[:, None] * self.rates)[None, :, None]

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """(B, S, HEADS, SIZE) -> (B, S, HEADS, WIDE)."""
        angles = self.angles(query)
        sines, cosines = torch.einsum("bshd,hdrw->rbshw", query + self.position_bias, self.weight)
        of_cosines = sines * angles.sin() + cosines * angles.cos()
        of_sines = cosines * angles.sin() - sines * angles.cos()
        wide = torch.cat([query + self.content_bias, of_cosines, of_sines], dim=-1)
        return wide * (WIDE / SIZE) ** 0.5  # attention divides by sqrt(WIDE)

    def key(self, key: torch.Tensor) -> torch.Tensor:
        angles = self.angles(key).expand(key.shape[0], -1, HEADS, -1)
        return torch.cat([key, angles.cos(), angles.sin()], dim=-1)

    def value(self, value: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(value, (0, 2 * WAVES))


class Projection(nn.Module):
    """A projection, and a function of its heads after it."""

    def __init__(self, projection: nn.Module, positions: RelativePositions, name: str) -> None:
        super().__init__()
        self.projection, self.positions, self.name = projection, positions, name

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        heads = self.projection(hidden_states).unflatten(-1, (HEADS, SIZE))
        widened: torch.Tensor = getattr(self.positions, self.name)(heads)
        return widened.flatten(2)


class Narrow(nn.Module):
    """The output projection of the contents; the features of positions are cut off."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, context: torch.Tensor) -> Any:
        return self.projection(context.unflatten(-1, (HEADS, WIDE))[..., :SIZE].flatten(2))


class NoPositions(nn.Module):
    """Zeros in the place of the table of positions."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*position_ids.shape, HIDDEN)


@pytest.fixture(scope="module")
def relative() -> Any:
    """A causal Longformer with relative positions and without a table."""
    model = use_loop_attention(tiny_model("fill-mask", autoregressive=True))
    model.longformer.embeddings.position_embeddings = NoPositions()
    torch.manual_seed(1)
    for layer in model.longformer.encoder.layer:
        attention, positions = layer.attention.self, RelativePositions()
        attention.head_dim, attention.embed_dim = WIDE, HEADS * WIDE
        for name in ("query", "key", "value"):
            setattr(attention, name, Projection(getattr(attention, name), positions, name))
            setattr(attention, f"{name}_global", nn.Linear(HIDDEN, HEADS * WIDE))
        layer.attention.output.dense = Narrow(layer.attention.output.dense)
    return model.eval()


@torch.inference_mode()
def test_relative_positions_are_the_definition(relative: Any) -> None:
    attention = relative.longformer.encoder.layer[1].attention.self.double()
    states = torch.randn(1, 30, HIDDEN, dtype=torch.float64)
    query, key, value = (
        getattr(attention, name).projection(states)[0].unflatten(-1, (HEADS, SIZE))
        for name in ("query", "key", "value")
    )
    positions = attention.query.positions
    distance = torch.arange(30)[:, None] - torch.arange(30)
    angles = distance[..., None] * positions.rates
    waves = torch.stack([angles.sin(), angles.cos()], dim=-2)  # (query, key, 2, WAVES)
    scores = torch.einsum("qhd,khd->hqk", query + positions.content_bias, key)
    scores += torch.einsum("qhd,hdrw,qkrw->hqk", query + positions.position_bias, positions.weight, waves)
    hidden = (distance < 0) | (distance > attention.one_sided_attn_window_size)
    weights = (scores * SIZE**-0.5).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value)
    actual = attention(states)[0][0].unflatten(-1, (HEADS, WIDE))
    attention.float()
    torch.testing.assert_close(actual[..., :SIZE], expected)


def same(model: nn.Module, bundle: Path, lengths: tuple[int, ...], **masks: Any) -> None:
    """Check that the bundle's first output is PyTorch's at each length."""
    with Engine(bundle) as engine, torch.inference_mode():
        for length in lengths:
            ids = np.random.default_rng(length).integers(3, VOCAB_SIZE, (2, length))
            expected = model(torch.from_numpy(ids))[0].numpy()
            actual = next(iter(engine.run(ids, **masks).values()))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5, err_msg=f"length {length}")


@pytest.mark.slow
def test_relative_sinusoidal_positions_are_exported_at_any_length(relative: Any, tmp_path: Path) -> None:
    bundle = export(relative, tmp_path / "bundle", global_attention="none", max_seqlen=300)
    same(relative, bundle, (1, 7, 40, 300))


@pytest.mark.slow
def test_a_model_is_trained_and_exported_in_stages_of_larger_windows_and_lengths(tmp_path: Path) -> None:
    """Weights do not depend on the window, so a stage begins with those of the one before it."""
    save_tiny_checkpoint(tmp_path / "stage-1", "fill-mask", attention_window=[8, 8], max_position_embeddings=130)
    small = LongformerForMaskedLM.from_pretrained(tmp_path / "stage-1")
    table = small.longformer.embeddings.position_embeddings.weight.detach()
    small.config.update({"attention_window": [16, 16], "max_position_embeddings": 258})
    larger = LongformerForMaskedLM(small.config)
    weights = small.state_dict()
    weights["longformer.embeddings.position_embeddings.weight"] = torch.cat([table, table[2:]])
    larger.load_state_dict(weights)
    ids = torch.arange(250)[None] % 90 + 3
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = larger(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    larger.eval().save_pretrained(tmp_path / "stage-2")
    bundle = export(tmp_path / "stage-2", tmp_path / "bundle")
    same(larger, bundle, (9, 250))
    with Engine(bundle) as engine:
        assert (engine.signature.attention_windows, engine.signature.max_seqlen) == ((8, 8), 256)


@pytest.mark.slow
def test_a_forward_that_was_replaced_on_an_instance_is_exported(tmp_path: Path) -> None:
    """A check that a new module is called: its forward is wrapped, and bound to the instance."""
    calls = []

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(self).__name__)
            return forward(*args, **kwargs)

        return wrapper

    model = tiny_model()
    positions = RotaryEmbedding(dim=32, use_xpos=True, cache_max_seq_len=130)
    positions.forward = MethodType(counted(positions.forward), positions)
    model.embeddings.position_embeddings = positions
    same(model, export(model, tmp_path / "bundle"), (1, 40))
    assert "RotaryEmbedding" in calls
