"""Probing a module: whether it is an unchanged Hugging Face model, and its rule for the global tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx.errors import BuildError, ExportError
from lfx.export import export
from lfx.export.probe import adds_globals, check_rows, default_global_of, granularity, ignores_padding, is_unchanged
from lfx.runtime import build_engine
from lfx.signature import GRAPH_INPUTS, TASKS, Signature, TensorSpec
from tests.marks import fast_if
from tests.models import ONE_LAYER, tiny_config, tiny_model


def signature(**options: Any) -> Signature:
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS)
    outputs = (TensorSpec("label", "int64", ("batch",)),)
    fields = {"task": "text-classification", "inputs": inputs, "outputs": outputs, "vocab_size": 55, "max_seqlen": 128}
    return Signature("M", precision="fp32", attention_windows=(4,), **{**fields, **options})


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
def test_changed_models_are_not_known(change: Callable[[Any], Any]) -> None:
    model = tiny_model("text-classification")
    change(model)
    assert not is_unchanged(model)


class Bare(nn.Module):
    """Self-attention without a LongformerModel, which needs lengths that are multiples of the window."""

    def __init__(self, window: int, *, fails: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(55, 32)
        self.attention = LongformerSelfAttention(tiny_config(attention_window=[window]), 0)
        self.fails = fails

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.fails and global_attention_mask is None:
            raise ValueError("it needs the mask")
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
    assert default_global_of(module, signature()) == "first"


def test_a_module_that_fails_without_its_mask_has_no_known_rule() -> None:
    assert default_global_of(Bare(8, fails=True).eval(), signature()) == "required"


class Around(nn.Module):
    """A task's model with its own rule for the global tokens, on which its outputs depend little."""

    def __init__(self, rule: Callable[[Any], Any], task: str = "text-classification") -> None:
        super().__init__()
        self.model, self.rule = tiny_model(task, **ONE_LAYER), rule

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        global_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        marks = self.rule(input_ids) if global_attention_mask is None else global_attention_mask
        outputs = self.model(input_ids, attention_mask=attention_mask, global_attention_mask=marks)
        return {"label": outputs.logits.argmax(-1)}


def first(ids: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros_like(ids)
    marks[..., 0] = 1
    return marks


def places(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[-1]).expand(ids.shape)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (first, "first"),
        (torch.zeros_like, "none"),
        (lambda ids: None, "first"),  # the rule of the inner model
        (lambda ids: (ids == 0).long(), "required"),
        (lambda ids: (ids == 54).long(), "required"),
        (lambda ids: (ids == 87).long(), "required"),
        (lambda ids: (places(ids) % 64 == 0).long(), "required"),
        (lambda ids: (places(ids) < ids.shape[-1] // 32).long(), "required"),
        (lambda ids: (places(ids) % 32 == 31).long(), "required"),
    ],
    ids=["first", "none", "inner", "cls", "id 54", "unnamed id", "every 64th", "some in front", "from the 32nd"],
)
def test_a_rule_is_found_by_the_tokens_and_not_by_the_outputs(rule: Any, name: str) -> None:
    assert default_global_of(Around(rule).eval(), signature(vocab_size=99)) == name


class FirstReal(Around):
    """A model whose global token is the first one that is no padding."""

    def __init__(self) -> None:
        super().__init__(first)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        global_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        start = nn.functional.one_hot(attention_mask.argmax(-1), attention_mask.shape[-1])
        return super().forward(
            input_ids, attention_mask, start if global_attention_mask is None else global_attention_mask
        )


def test_a_rule_about_padding_is_found() -> None:
    assert default_global_of(FirstReal().eval(), signature(vocab_size=99)) == "required"


def test_a_rule_of_separators_that_stand_apart_is_found() -> None:
    def after_second(ids: torch.Tensor) -> torch.Tensor:
        separators = (ids == 2).long()
        return (separators.cumsum(-1) - separators >= 2).long()

    module = Around(after_second, "text-classification").eval()
    assert default_global_of(module, signature(vocab_size=99, sep_token_id=2)) == "required"


class Choice(type(tiny_model("multiple-choice"))):  # type: ignore[misc]
    """A subclass without changes."""


def test_a_subclass_of_a_task_keeps_the_rule_of_the_task() -> None:
    model = tiny_model("multiple-choice")
    model.__class__ = Choice
    assert default_global_of(model, signature(task="multiple-choice", sep_token_id=2)) == "after_question"


class Adding(Around):
    """A model that gives separators global attention for any mask."""

    def __init__(self) -> None:
        super().__init__(first)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        global_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        marks = first(input_ids) if global_attention_mask is None else global_attention_mask
        return super().forward(input_ids, attention_mask, torch.where(input_ids == 2, 1, marks))


class Deciding(Around):
    """A model that takes no global_attention_mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().forward(input_ids, attention_mask, self.rule(input_ids))


@pytest.mark.parametrize(
    ("module", "adds"),
    [
        (lambda: tiny_model("text-classification"), False),
        (lambda: Around(first).eval(), False),
        (lambda: Adding().eval(), True),
        (lambda: Deciding(torch.zeros_like).eval(), False),
        (lambda: Deciding(first).eval(), False),
        (lambda: Deciding(lambda ids: (ids == 2).long()).eval(), True),
        (lambda: Deciding(lambda ids: (ids % 3 == 0).long()).eval(), True),
        (lambda: Deciding(lambda ids: (places(ids) % 32 == 0).long()).eval(), True),
    ],
    ids=[
        "hugging face's",
        "a rule",
        "separators",
        "never",
        "always the first",
        "always separators",
        "any number",
        "every 32nd",
    ],
)
def test_global_tokens_that_a_module_adds_are_found(module: Any, adds: bool) -> None:
    assert adds_globals(module(), signature(vocab_size=55)) is adds


@pytest.mark.parametrize("module", [lambda: Around(first), lambda: Deciding(first)], ids=["a mask", "no mask"])
def test_a_model_of_one_token_is_probed(module: Any) -> None:
    assert not adds_globals(module().eval(), signature(vocab_size=55, max_seqlen=1))


@fast_if(lambda option: "max_global" in option)
@pytest.mark.parametrize("option", [{"max_global": 2}, {"global_attention": "first"}], ids=str)
def test_an_option_without_room_for_added_tokens_is_refused(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="gives global attention to tokens that its global_attention_mask does not"):
        export(Adding().eval(), tmp_path / "out", **option)


@pytest.mark.slow
@pytest.mark.parametrize("module", [Adding, lambda: Deciding(lambda ids: (ids == 2).long())], ids=["added", "no input"])
def test_a_plan_with_fewer_slots_than_tokens_is_refused_for_a_rule_of_the_module(module: Any, tmp_path: Path) -> None:
    bundle = export(module().eval(), tmp_path / "out")
    with pytest.raises(BuildError, match="TensorRT needs their number constant: 64 slots may be too few for 128"):
        build_engine(bundle, tmp_path / "out.plan", flavor="tensorrt-rtx", target="sm89")


class Far(nn.Module):
    """A head that reads distant positions, and padding among them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(max_position_embeddings=600)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, ::128].mean(dim=1)


def test_a_head_that_reads_distant_padding_is_detected() -> None:
    outputs = (TensorSpec("output", "float32", ("batch", 32)),)
    assert not ignores_padding(Far().eval(), signature(max_seqlen=598, outputs=outputs))


class Score(nn.Module):
    """One number for each sequence: near 0 for a short one, and with other rounding in a wider batch."""

    def __init__(self, difference: float) -> None:
        super().__init__()
        self.model, self.difference = tiny_model(**ONE_LAYER), difference

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        score = torch.where(attention_mask.sum(dim=1) < 9, 0.001, 0.5)
        return score + self.difference if input_ids.shape[1] > 9 else score


def test_the_rounding_of_a_number_near_zero_is_no_dependency_on_other_sequences() -> None:
    outputs = (TensorSpec("output", "float32", ("batch",)),)
    check_rows(Score(1e-7).eval(), signature(outputs=outputs))
    with pytest.raises(ExportError, match="output output of a sequence depends on the other sequences of its batch"):
        check_rows(Score(1e-4).eval(), signature(outputs=outputs))


def test_a_task_of_another_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="task token-classification is not the task of a LongformerForSequenceClass"):
        export(tiny_model("text-classification"), tmp_path / "out", task="token-classification")
