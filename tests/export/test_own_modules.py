"""User modules around Hugging Face's: exported correctly, or refused with the reason; never wrong without an error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LongformerForMultipleChoice, LongformerModel

from lfx.errors import ExportError, InputError
from lfx.export import export
from lfx.export.load import load
from lfx.export.rewrite import clone
from lfx.runtime import Batcher, Engine
from lfx.signature import TEXT_GENERATION
from tests.marks import fast_if
from tests.models import ONE_LAYER, save_tiny_checkpoint, tiny_led, tiny_model

IDS = torch.arange(40)[None] % 50 + 3


FILLED = torch.finfo(torch.float32).min


class Wrapped(nn.Module):
    """A base model of one layer, and a function `change` of its hidden states and ids."""

    def __init__(self, change: Callable[..., Any] = lambda x, ids: x, **options: Any) -> None:
        super().__init__()
        self.inner, self.change = tiny_model(**{**ONE_LAYER, **options}), change

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.change(self.inner(input_ids, attention_mask=attention_mask)[0], input_ids)


def same(module: nn.Module, folder: Path, ids: torch.Tensor = IDS, **masks: torch.Tensor) -> None:
    """Check that the first output of the bundle equals the module's."""
    with torch.inference_mode():
        outputs = module(ids, **masks)
    expected = outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))
    with Engine(folder) as engine:
        actual = engine.run(ids.numpy(), **{name: mask.numpy() for name, mask in masks.items()})
        np.testing.assert_allclose(next(iter(actual.values())), expected.numpy(), rtol=0, atol=1e-5)


@fast_if(lambda axis: axis == 1)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_branch_on_the_shape_is_refused(axis: int, tmp_path: Path) -> None:
    module = Wrapped(lambda x, ids: x * 2 if ids.shape[axis] > 100 else x).eval()
    with pytest.raises(ExportError, match=r"takes another branch outside (batch|sequence) \d+ to 100"):
        export(module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


BRANCHES: dict[str, Callable[[Any], bool]] = {
    "sequence 100": lambda ids: ids.shape[1] == 100,
    "sequence 64": lambda ids: ids.shape[1] in (64, 100),
    "sequence 2": lambda ids: ids.shape[1] % 2 == 0,
    "batch 4": lambda ids: ids.shape[0] == 4,
    r"sequence \d+, batch \d+|batch \d+, sequence \d+": lambda ids: ids.numel() > 300,
}


@fast_if(lambda where: where in ("sequence 100", "batch 4"))
@pytest.mark.parametrize("where", BRANCHES)
def test_a_branch_on_some_sizes_is_refused(where: str, tmp_path: Path) -> None:
    module = Wrapped(lambda x, ids: x * 2 if BRANCHES[where](ids) else x).eval()
    with pytest.raises(ExportError, match=f"takes another branch (at ({where})|outside)"):
        export(module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_becomes_a_constant_is_refused(tmp_path: Path) -> None:
    module = Wrapped(lambda x, ids: x * {100: 2.0}.get(int(ids.shape[1]), 1.0)).eval()
    with pytest.raises(ExportError, match="treats the sequence of the traced example, 29, as a constant"):
        export(module, tmp_path / "out")


@fast_if(lambda case: case == "mean")
@pytest.mark.parametrize(
    "change",
    [
        lambda x, ids: x - x.mean(0),
        lambda x, ids: x * x[0, 0, 0],
        lambda x, ids: x.softmax(0),
        lambda x, ids: x + x[4:].sum(),
    ],
    ids=["mean", "first row", "softmax", "fifth row"],
)
def test_an_output_that_depends_on_other_sequences_is_refused(change: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="depends on the other sequences of its batch"):
        export(Wrapped(change).eval(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@fast_if(lambda case: case == "longest")
@pytest.mark.parametrize(
    "change",
    [
        lambda x, mask: x * torch.arange(x.shape[1])[:, None] / mask.sum(1).max(),
        lambda x, mask: x * mask.sum(1).float().mean(),
        lambda x, mask: x * (1 + mask.all(dim=0)[:, None].float()),
    ],
    ids=["longest", "mean length", "common tokens"],
)
def test_an_output_that_depends_on_the_padding_of_other_sequences_is_refused(
    change: Callable[..., Any], tmp_path: Path
) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model(**ONE_LAYER)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return change(self.inner(input_ids, attention_mask=attention_mask)[0], attention_mask)

    with pytest.raises(ExportError, match="depends on the other sequences of its batch"):
        export(Masked().eval(), tmp_path / "out")


class Headed(nn.Module):
    """A base model with a head of torch's layers."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = tiny_model(**ONE_LAYER), head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        hidden = self.inner(input_ids, attention_mask=attention_mask)[0]
        if isinstance(self.head, nn.Conv1d):
            return self.head(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(hidden)[0] if isinstance(self.head, nn.RNNBase) else self.head(hidden)


class AlwaysDropout(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(hidden, 0.1)


CONSTANT = "takes a size of the traced example for a constant, as in nn.LSTM"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (nn.LSTM(32, 16, batch_first=True, bidirectional=True), CONSTANT),
        (nn.GRU(32, 16, batch_first=True), CONSTANT),
        (AlwaysDropout(), "differs between two runs on the same ids"),
    ],
    ids=["LSTM", "GRU", "dropout"],
)
def test_heads_that_have_no_graph_are_refused_with_the_reason(head: nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        export(Headed(head).eval(), tmp_path / "out")


@pytest.mark.slow
def test_a_convolution_over_the_tokens_is_exported(tmp_path: Path) -> None:
    module = Headed(nn.Conv1d(32, 16, 3, padding=1)).eval()
    folder = export(module, tmp_path / "out")
    same(module, folder)
    same(module, folder, IDS.expand(20, 40))


@pytest.mark.slow
def test_two_encoders_with_different_numbers_of_global_tokens(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.all = tiny_model(**ONE_LAYER), tiny_model(**ONE_LAYER)

        def forward(self, input_ids: torch.Tensor) -> Any:
            first = torch.zeros_like(input_ids)
            first[:, 0] = 1
            hidden = self.one(input_ids, global_attention_mask=first)[0]
            return hidden + self.all(input_ids, global_attention_mask=torch.ones_like(input_ids))[0]

    module = Two().eval()
    same(module, export(module, tmp_path / "out"))


@pytest.mark.slow
def test_a_table_of_positions_beyond_4096_tokens_is_found_too_short(tmp_path: Path) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.table = tiny_model(**ONE_LAYER, max_position_embeddings=6002), nn.Embedding(5000, 32)

        def forward(self, input_ids: torch.Tensor) -> Any:
            places = torch.arange(input_ids.shape[1])
            embedded = self.inner.embeddings.word_embeddings(input_ids) + self.table(places)
            return self.inner(inputs_embeds=embedded)[0]

    with pytest.raises(ExportError, match="give max_seqlen, the longest sequence that the model takes"):
        export(Positions().eval(), tmp_path / "out", max_seqlen=6000)


@pytest.mark.slow
def test_a_branch_beyond_the_longest_sequence_is_none(tmp_path: Path) -> None:
    module = Wrapped(lambda x, ids: x * 2 if ids.shape[1] > 100 else x).eval()
    same(module, export(module, tmp_path / "out", max_seqlen=100))


@fast_if(lambda case: case in ("tokens", "a mean", "a maximum"))
@pytest.mark.parametrize(
    ("change", "ignores"),
    [
        (lambda x, ids: x, True),
        (lambda x, ids: x[:, 0], True),
        (lambda x, ids: x.mean(dim=1), False),
        (lambda x, ids: x - x.mean(dim=1, keepdim=True), False),
        (lambda x, ids: torch.cat([x - x.mean(1, keepdim=True), torch.full_like(x, FILLED)], 2), False),
        (lambda x, ids: torch.cat([x - x.mean(1, keepdim=True), torch.full_like(x, -1e9)], 2), False),
        (lambda x, ids: torch.cat([x, torch.full_like(x, -torch.inf)], 2), True),
        (lambda x, ids: x[..., :1].amax(dim=1), False),
        (lambda x, ids: x.mean(dim=1).argmax(dim=-1), False),
        (lambda x, ids: x[:, 0] + 1e-3 * x.mean(dim=1), False),
        (lambda x, ids: x + torch.cat([x[:, 25:], torch.zeros_like(x[:, :25])], 1)[:, : x.shape[1]], False),
        (lambda x, ids: x.argmax(dim=-1), True),
    ],
    ids=[
        "tokens",
        "the first",
        "a mean",
        "less a mean",
        "less a mean and filled",
        "less a mean and -1e9",
        "infinite",
        "a maximum",
        "the class of a mean",
        "a little of a mean",
        "25 tokens on",
        "classes of tokens",
    ],
)
def test_a_module_that_reads_padding_never_gets_any(change: Callable[..., Any], ignores: bool, tmp_path: Path) -> None:
    documents = [list(range(3, 3 + length)) for length in (30, 9, 30, 17)]
    with Engine(export(Wrapped(change).eval(), tmp_path / "out")) as engine:
        assert engine.signature.ignores_padding is ignores
        (together,) = engine.run(documents).values()
        computed = engine.metrics.snapshot()
        with Batcher(engine, max_delay_ms=50) as batcher:
            futures = [batcher.submit(ids) for ids in documents]
        for i, ids in enumerate(documents):
            (alone,) = engine.run(ids).values()
            np.testing.assert_allclose(together[i], alone[0], rtol=0, atol=1e-5)
            np.testing.assert_allclose(next(iter(futures[i].result().values())), alone, rtol=0, atol=1e-5)
    assert (computed.padding_share == 0) is not ignores


class Mean(nn.Module):
    """A classification head over the mean of all positions."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(dim=1)[:, :2]


class MeanChoice(LongformerForMultipleChoice):  # type: ignore[misc]
    """Scores a choice by the mean of all its positions."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, global_attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        masks = {"attention_mask": attention_mask, "global_attention_mask": global_attention_mask}
        flat = {name: mask.flatten(0, 1) for name, mask in masks.items()}
        hidden = self.longformer(input_ids.flatten(0, 1), **flat)[0]
        return {"logits": self.classifier(hidden.mean(dim=1)).unflatten(0, input_ids.shape[:2]).squeeze(-1)}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-classification", "multiple-choice"])
def test_a_replaced_head_in_a_known_class_is_probed(task: str, tmp_path: Path) -> None:
    module = tiny_model(task, **ONE_LAYER)
    assert Engine(export(module, tmp_path / "as it is")).signature.ignores_padding
    if task == "text-classification":
        module.classifier = Mean()
    else:
        module.__class__ = MeanChoice
    assert not Engine(export(module, tmp_path / "changed", task=task)).signature.ignores_padding


class LargestOf(LongformerModel):  # type: ignore[misc]
    """A LongformerModel that returns the largest number of all positions."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        hidden = super().forward(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        return hidden.amax(dim=1)[:, :1]


@pytest.mark.slow
def test_a_model_whose_own_forward_reads_padding_is_detected(tmp_path: Path) -> None:
    model = tiny_model(**ONE_LAYER)
    model.__class__ = LargestOf
    assert not Engine(export(model, tmp_path / "out")).signature.ignores_padding


class Rule(nn.Module):
    """A module with its own rule for the global tokens."""

    def __init__(self, rule: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self.classifier, self.rule = tiny_model("text-classification", **ONE_LAYER), rule

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> Any:
        if global_attention_mask is None and self.rule is not None:
            global_attention_mask = self.rule(input_ids)
        outputs = self.classifier(input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask)
        return {"logits": outputs.logits}


@fast_if(lambda default_global: default_global == "required")
@pytest.mark.parametrize(
    ("rule", "default_global"),
    [(None, "first"), (torch.zeros_like, "none"), (lambda ids: (ids % 3 == 0).long(), "required")],
    ids=["hugging face's", "none", "its own"],
)
def test_a_module_keeps_its_default_for_the_global_tokens(rule: Any, default_global: str, tmp_path: Path) -> None:
    module = Rule(rule).eval()
    folder = export(module, tmp_path / "out")
    with Engine(folder) as engine:
        assert engine.signature.default_global == default_global
        if default_global == "required":
            with pytest.raises(InputError, match="a rule of its own when it gets no global_attention_mask; give one"):
                engine.run(IDS.numpy())
    marks = {"global_attention_mask": (IDS == 5).long()}
    same(module, folder, **marks)
    if default_global != "required":
        same(module, folder)


@pytest.mark.parametrize(
    "options", [{"max_global": 1}, {"global_attention": "first"}, {"global_attention": "none"}], ids=str
)
def test_global_tokens_that_the_module_decides_are_not_fixed(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be used: Wrapped\.forward takes no global_attention_mask"):
        export(Wrapped().eval(), tmp_path / "out", **options)


def test_more_slots_than_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="max_global 129 is above the longest sequence, 128 tokens"):
        export(tiny_model(**ONE_LAYER), tmp_path / "out", max_global=129)


class _Adapted(nn.Linear):
    """A linear layer with something added, as adapters do."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 0.5 * hidden.roll(1, -1)


@fast_if(lambda change: change == "no bias")
@pytest.mark.parametrize(
    ("name", "change"),
    [("key_global", "adapter"), ("value_global", "no bias"), ("key_global", "hook"), ("query_global", "adapter")],
)
def test_projections_that_are_more_than_weight_and_bias(name: str, change: str, tmp_path: Path) -> None:
    module = tiny_model(**ONE_LAYER)
    for layer in module.encoder.layer:
        attention = layer.attention.self
        if change == "hook":
            getattr(attention, name).register_forward_hook(lambda _, inputs, output: output * 1.5)
        else:
            new = _Adapted(32, 32) if change == "adapter" else nn.Linear(32, 32, bias=False)
            setattr(attention, name, new)
    module.eval()
    marks = {"global_attention_mask": (IDS % 7 == 0).long()}
    same(module, export(module, tmp_path / "out"), **marks)


@pytest.mark.slow
def test_a_feed_forward_in_chunks_is_the_same_model(tmp_path: Path) -> None:
    module = tiny_model(**ONE_LAYER, chunk_size_feed_forward=4)
    same(tiny_model(**ONE_LAYER), export(module, tmp_path / "out"), IDS[:, :29])
    assert module.encoder.layer[0].chunk_size_feed_forward == 4


@pytest.mark.slow
def test_a_checkpoint_that_returns_tuples_keeps_the_names_of_its_outputs(tmp_path: Path) -> None:
    module, _ = load(str(save_tiny_checkpoint(tmp_path / "it", "text-classification", return_dict=False)), "auto")
    with Engine(export(module, tmp_path / "out")) as engine:
        assert list(engine.run([5, 6])) == ["logits"]


def test_weights_that_begin_at_one_address_keep_their_names(tmp_path: Path) -> None:
    class Sliced(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            words = self.inner.embeddings.word_embeddings.weight
            self.small = nn.Linear(32, 10, bias=False)
            self.small.weight = nn.Parameter(words.detach()[:10])

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.small(self.inner(input_ids)[0])

    module = Sliced().eval()
    same(module, export(module, tmp_path / "out"))


@pytest.mark.slow
def test_an_export_inside_autocast_is_a_float32_model(tmp_path: Path) -> None:
    module = tiny_model(**ONE_LAYER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folder = export(module, tmp_path / "out")
    same(module, folder)


@fast_if(lambda task, part: part == "whole" and task != "feature-extraction")
@pytest.mark.parametrize("part", ["whole", "head"])
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction", TEXT_GENERATION])
def test_a_forward_in_autocast_is_refused_with_the_reason(task: str, part: str, tmp_path: Path) -> None:
    module = tiny_model(task, **({} if task == TEXT_GENERATION else ONE_LAYER))
    heads = {"text-classification": "classifier", "feature-extraction": "pooler", TEXT_GENERATION: "led.decoder"}
    changed = module if part == "whole" else module.get_submodule(heads[task])
    # As accelerate, and so the Trainer, leaves a model that was trained in bfloat16.
    changed.forward = MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(type(changed).forward), changed)
    with pytest.raises(ExportError, match=r"in torch\.autocast's half precision, so it is no float32 model"):
        export(module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@fast_if(lambda case: case == "undecorated-Longformer")
@pytest.mark.parametrize("make", [tiny_model, functools.partial(tiny_led, "LEDModel")], ids=["Longformer", "LED"])
@pytest.mark.parametrize("unwrap", [inspect.unwrap, lambda forward: forward], ids=["undecorated", "decorated"])
def test_a_forward_that_is_the_classs_own_exports(make: Callable[[], Any], unwrap: Any, tmp_path: Path) -> None:
    module = make()
    # As accelerator.unwrap_model(model, keep_fp32_wrapper=False) leaves a model that was trained in half precision.
    module.forward = MethodType(unwrap(type(module).forward), module)
    same(make(), export(module, tmp_path / "out"))
    assert "forward" in vars(module)


@pytest.mark.slow
def test_a_model_that_was_made_in_inference_mode_exports(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = tiny_model(**ONE_LAYER)
    same(module, export(module, tmp_path / "out"))


@pytest.mark.slow
def test_a_class_whose_new_takes_arguments_exports(tmp_path: Path) -> None:
    class Made(Wrapped):
        def __new__(cls, size: int) -> Any:
            return super().__new__(cls)

        def __init__(self, size: int) -> None:
            super().__init__()

    module = Made(3).eval()
    same(module, export(module, tmp_path / "out"))


@pytest.mark.slow
def test_a_window_that_is_a_number_of_numpy_exports(tmp_path: Path) -> None:
    module = tiny_model(**ONE_LAYER)
    for layer in module.encoder.layer:
        layer.attention.self.one_sided_attn_window_size = np.int64(8)
    same(module, export(module, tmp_path / "out"))


@pytest.mark.slow
def test_an_export_with_another_default_dtype_is_a_float32_model(tmp_path: Path) -> None:
    module = Wrapped().eval()
    torch.set_default_dtype(torch.float64)
    try:
        folder = export(module, tmp_path / "out")
    finally:
        torch.set_default_dtype(torch.float32)
    same(module, folder)


@pytest.mark.slow
def test_the_shorter_of_two_position_tables_is_the_limit(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long, self.short = tiny_model(**ONE_LAYER), tiny_model(**ONE_LAYER, max_position_embeddings=66)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.long(input_ids)[0] + self.short(input_ids)[0]

    with Engine(export(Two().eval(), tmp_path / "out")) as engine:
        assert engine.signature.max_seqlen == 64


def test_a_window_that_hugging_face_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="attention_window of 2, which Hugging Face itself cannot run"):
        export(tiny_model(attention_window=2), tmp_path / "out")


def test_a_window_that_takes_too_much_memory_is_refused_in_a_module_too(tmp_path: Path) -> None:
    model = tiny_model()
    model.encoder.layer[1].attention.self.one_sided_attn_window_size = 10_000
    with pytest.raises(ExportError, match="attention_window 20000 would take 13 GB"):
        export(model, tmp_path / "out")


def twice(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, 2 * linear.weight)


@pytest.mark.slow
def test_a_projection_with_a_forward_of_its_own_is_called(tmp_path: Path) -> None:
    model = tiny_model(**ONE_LAYER)
    for module in model.modules():
        if hasattr(module, "value_global"):
            module.value_global.forward = MethodType(twice, module.value_global)
    with Engine(export(model, tmp_path / "out")) as engine, torch.inference_mode():
        marks = (IDS == 5).long()
        expected = model(IDS, global_attention_mask=marks).last_hidden_state.numpy()
        actual = engine.run(IDS.numpy(), global_attention_mask=marks.numpy())["last_hidden_state"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_layer_that_was_never_run_is_refused(tmp_path: Path) -> None:
    module = Wrapped().eval()
    module.extra = nn.LazyLinear(4)
    with pytest.raises(ExportError, match=r"extra\.weight has no shape yet; run the module once"):
        export(module, tmp_path / "out")


class _Named(NamedTuple):
    parts: set[Any]


class _Referring(Wrapped):
    """Reaches a layer by another attribute than the one that it is registered by."""

    def __init__(self, refer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.layer.register_forward_hook(self.rotate)
        self.turn = nn.Linear(32, 32)
        self.matrices = [torch.eye(32).flip(0)]  # no buffer
        self.__dict__["other"] = refer(self)

    def rotate(self, *arguments: Any) -> Any:
        return self.turn(arguments[-1]) @ self.matrices[0]

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden)

    def forward(self, input_ids: torch.Tensor) -> Any:
        found = self.other
        while not callable(found):
            found = next(iter(found.values() if isinstance(found, dict) else found))
        return found(self.inner(input_ids)[0])


REFERENCES = {
    "attribute": lambda module: module.layer,
    "list": lambda module: [module.layer],
    "tuple in a dict": lambda module: {"a": (module.layer,)},
    "method in a list": lambda module: [module.run],
    "set in a named tuple": lambda module: _Named({module.layer}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("refer", REFERENCES.values(), ids=REFERENCES)
def test_a_module_that_is_reached_by_another_attribute_is_copied_once(refer: Any, dtype: torch.dtype) -> None:
    module = _Referring(refer).eval()
    copied = clone(module, dtype)
    with torch.inference_mode():
        actual, expected = copied(IDS), module(IDS)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=1e-5)


def test_a_module_that_is_reached_by_a_list_is_exported(tmp_path: Path) -> None:
    module = _Referring(REFERENCES["list"]).eval()
    same(module, export(module, tmp_path / "out"))


def test_a_dict_that_two_modules_share_is_shared_by_their_copies(tmp_path: Path) -> None:
    class Writer(nn.Module):
        def __init__(self, shared: dict[str, Any]) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.shared["largest"] = hidden.amax(dim=1, keepdim=True)
            return hidden

    class Reader(Writer):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.shared["largest"]

    class Sharing(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            shared: dict[str, Any] = {}
            self.writer, self.reader = Writer(shared), Reader(shared)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.reader(self.writer(self.inner(input_ids)[0]))

    module = Sharing().eval()
    with torch.inference_mode():
        module(IDS[:, :7])  # what this writes is not what the bundle reads
    same(module, export(module, tmp_path / "out"))
