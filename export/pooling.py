"""A LongformerModel with the modules of sentence-transformers that make one vector of each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lfx.checks import one_of
from lfx.errors import ExportError
from lfx.signature import POOLINGS

# Starts of the names of the modules below that compute in float32.
IN_FLOAT32_MODULES = ("pooling/", "normalize_")
# Activations that a Dense may have; each is elementwise.
ACTIVATIONS = {cls.__name__: cls for cls in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}


class Pooling(nn.Module):
    """Pools the hidden states of a sequence into one vector, in float32 also for a model in half precision.

    A sequence that is all padding gives zeros.

    Args:
        modes: of `lfx.signature.POOLINGS`; their vectors are concatenated.
    Raises:
        ExportError: a mode is unknown, or there is none.
    """

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        if not modes:
            raise ExportError(f"there is no pooling mode; give one of: {', '.join(POOLINGS)}")
        self.modes = tuple(one_of(mode, "pooling", POOLINGS, ExportError) for mode in modes)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pool hidden (B, S, H) by attention_mask (B, S), 1 = real token; returns (B, modes * H)."""
        hidden, mask = in_float32(hidden), attention_mask.long()
        return torch.cat([self._pool(mode, hidden, mask) for mode in self.modes], dim=-1)

    def _pool(self, mode: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if mode == "max":
            is_real = mask.unsqueeze(-1) > 0
            largest = torch.where(is_real, hidden, float("-inf")).amax(dim=1)
            return torch.where(is_real.any(dim=1), largest, 0.0)
        weights, divisor = (numbers.to(hidden.dtype) for numbers in _weights(mode, mask))
        # A product of matrices, since ONNX Runtime's ReduceSum adds one token after the other and rounds twice as much.
        summed = torch.matmul(weights.unsqueeze(1), hidden).squeeze(1)
        return summed / (divisor.sqrt() if mode == "mean_sqrt_len_tokens" else divisor)


def _weights(mode: str, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of each token in a sum over the sequence, (B, S), 0 for padding, and its divisor, (B, 1).

    Tokens are counted in integers: OpenVINO in bfloat16 rounds float32 too, and 256 + 1 is 256 there.
    """
    count = mask.sum(dim=1, keepdim=True)
    if mode in ("cls", "lasttoken"):
        number = torch.cumsum(mask, dim=1)  # 1 for the first real token
        return mask * (number == (1 if mode == "cls" else count)), torch.ones_like(count)
    if mode == "weightedmean":  # a weight is the position, 1 for the first real token; padding after that counts too
        has_begun = (torch.cumsum(mask, dim=1) > 0).long()
        weights = mask * torch.cumsum(has_begun, dim=1)
        return weights, weights.sum(dim=1, keepdim=True).clamp(min=1)
    return mask, count.clamp(min=1)


class Normalize(nn.Module):
    """Divides a vector by its Euclidean norm, in float32 also for a model in half precision; zeros stay zeros."""

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Normalize embedding (B, H)."""
        embedding = in_float32(embedding)
        norm = (embedding * embedding).sum(dim=-1, keepdim=True).sqrt()
        return embedding / norm.clamp(min=1e-12)


class Dense(nn.Module):
    """A linear layer, an activation, and optionally a residual connection, as the Dense of sentence-transformers.

    Args:
        residual: add the input to the output, by a projection if their sizes differ.
    """

    def __init__(
        self, in_features: int, out_features: int, activation: nn.Module, *, bias: bool = True, residual: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation, self.adds_input = activation, residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Map embedding (B, in_features) to (B, out_features)."""
        output: torch.Tensor = self.activation(self.linear(embedding))
        if not self.adds_input:
            return output
        return output + (self.residual(embedding) if hasattr(self, "residual") else embedding)


class LongformerForSentenceEmbedding(nn.Module):
    """A LongformerModel, a pooling, and the modules after it; its output is sentence_embedding.

    Args:
        longformer: the encoder, which is not changed.
        modes: of the pooling; see `Pooling`.
        modules: applied to the pooled vector, in order: `Normalize`, `Dense` or nn.LayerNorm.
        dimensions: number of values of the vector that are kept, from its start; None = all.
    Attributes:
        gives_hidden_states: whether last_hidden_state (B, S, H) is an output too, as in the layout of the hub.
    """

    def __init__(
        self, longformer: Any, modes: Sequence[str], modules: Iterable[nn.Module] = (), dimensions: int | None = None
    ) -> None:
        super().__init__()
        self.longformer = longformer
        self.pooling = Pooling(modes)
        self.dimensions, self.gives_hidden_states = dimensions, False
        self.module_names: list[str] = []
        for i, module in enumerate(modules, 2):  # as the folders of sentence-transformers: 1_Pooling, 2_Normalize
            self.module_names.append(f"{type(module).__name__.lower()}_{i}")
            self.add_module(self.module_names[-1], module)

    @property
    def config(self) -> Any:
        """The encoder's config."""
        return self.longformer.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Embed sequences (B, S), with masks (B, S); returns {"sentence_embedding": (B, dimensions)}."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.longformer(input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask)[
            0
        ]
        embedding = self.pooling(hidden, attention_mask)
        for name in self.module_names:
            module = getattr(self, name)
            weight = next(module.parameters(), None)  # in half precision, these modules compute as the encoder does
            embedding = module(embedding if weight is None else embedding.to(weight.dtype))
        states = {"last_hidden_state": hidden} if self.gives_hidden_states else {}
        return {
            **states,
            "sentence_embedding": embedding if self.dimensions is None else embedding[:, : self.dimensions],
        }


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32; float64, the precision of the reference, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
