"""Probing a module: whether it is an unchanged Hugging Face model, and its rule for the global tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx.export.probe import default_global_of, granularity, is_unchanged
from lfx.signature import TASKS
from tests.models import tiny_config, tiny_model


@pytest.mark.parametrize("task", TASKS)
def test_hugging_faces_own_models_are_known(task: str) -> None:
    assert is_unchanged(tiny_model(task))


class Subclass(type(tiny_model("text-classification"))):  # type: ignore[misc]
    """A subclass with the same forward."""


def _replace(model: Any, head: nn.Module) -> None:
    model.classifier.dense = head


CHANGES: dict[str, Callable[[Any], Any]] = {
    "subclass": lambda model: setattr(model, "__class__", Subclass),
    "a head of torch's that mixes tokens": lambda model: _replace(model, nn.Conv1d(32, 32, 1)),
    "a layer of another class": lambda model: _replace(model, nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))),
    "its own forward": lambda model: setattr(model.longformer, "forward", lambda *args, **options: None),
    "a hook": lambda model: model.longformer.register_forward_hook(lambda *arguments: None),
    "a hook in front": lambda model: model.longformer.register_forward_pre_hook(lambda *arguments: None),
    "no Longformer": lambda model: setattr(model, "__class__", nn.Module),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_not_known(change: Callable[[Any], Any]) -> None:
    model = tiny_model("text-classification")
    change(model)
    assert not is_unchanged(model)


class Bare(nn.Module):
    """Self-attention without a LongformerModel, which needs lengths that are multiples of the window."""

    def __init__(self, window: int, *, masked: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(55, 32)
        self.attention = LongformerSelfAttention(tiny_config(attention_window=[window]), 0)
        self.masked = masked

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None and self.masked else attention_mask
        assert mask is not None
        marks = torch.zeros_like(mask) if global_attention_mask is None else global_attention_mask
        if global_attention_mask is None:
            marks[:, 0] = 1
        padding, is_global = mask == 0, marks == 1
        scores = torch.where(padding, -10000.0, torch.where(is_global, 10000.0, 0.0))
        outputs = self.attention(
            self.embedding(input_ids),
            attention_mask=scores,
            is_index_masked=padding,
            is_index_global_attn=is_global,
            is_global_attn=bool(is_global.any()),
        )
        return outputs[0]


@pytest.mark.parametrize("window", [8, 10, 16])
def test_the_rule_is_found_at_lengths_that_the_module_takes(window: int) -> None:
    torch.manual_seed(0)
    module = Bare(window).eval()
    assert granularity(module) == window
    assert default_global_of(module, 55, 1, None) == "first"


def test_a_module_that_fails_without_its_masks_has_no_known_rule() -> None:
    assert default_global_of(Bare(8, masked=False).eval(), 55, 1, None) == "required"
