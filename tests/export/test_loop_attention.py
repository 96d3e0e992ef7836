"""Self-attention in PyTorch with dilation and causal windows: the definition, Hugging Face's, memory, training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LongformerModel
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError
from lfx.export import LoopSelfAttention, export, use_loop_attention
from lfx.export.load import load
from lfx.export.torch_runners import reference_runner, torch_runner
from lfx.parity import Case, full_cases, inputs_of
from lfx.runtime import Engine
from tests.models import VOCAB_SIZE, WINDOW, tiny_config, tiny_model

PATTERNS: dict[str, dict[str, Any]] = {
    "no dilation": {},
    "one dilation": {"attention_dilation": 3},
    "by layer": {"attention_dilation": [2, 1]},
    "by head": {"attention_dilation": [[1, 2, 2, 4], [3, 1, 3, 1]]},
    "causal": {"autoregressive": True},
    "by head and causal": {"attention_dilation": [[1, 2, 2, 4], [3, 1, 3, 1]], "autoregressive": True},
}


def looped(task: str = "feature-extraction", **changes: Any) -> Any:
    """A tiny model of four heads that follows its config."""
    return use_loop_attention(tiny_model(task, **{"num_attention_heads": 4, **changes}))


def arrays(case: Case) -> dict[str, np.ndarray]:
    """The inputs of a case."""
    return inputs_of(case, vocab_size=VOCAB_SIZE, pad_token_id=1)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_each_layer_is_the_dense_definition(pattern: dict[str, Any]) -> None:
    reference = reference_runner(looped(**pattern), by_layer=True)
    model = looped(**pattern).double()
    contexts: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, LoopSelfAttention):
            module.register_forward_hook(lambda _, __, outputs: contexts.append(outputs[0]))
    for case in full_cases(WINDOW, 128)[::3]:
        contexts.clear()
        inputs = arrays(case)
        with torch.inference_mode():
            model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        expected = reference(inputs)
        for i, context in enumerate(contexts):
            np.testing.assert_allclose(context, expected[f"attention_{i}"], rtol=0, atol=1e-13, err_msg=str(case))


def test_without_dilation_it_is_hugging_faces_attention() -> None:
    ours, theirs = torch_runner(looped()), torch_runner(tiny_model(num_attention_heads=4))
    for case in (Case(2, 7, "first", "right"), Case(2, 33, "ragged", "holes"), Case(1, 64, "scattered", "left")):
        inputs = arrays(case)
        real = inputs["attention_mask"] == 1
        actual, expected = (run(inputs)["last_hidden_state"][real] for run in (ours, theirs))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


class OwnModel(LongformerModel):
    """A subclass of Hugging Face's model, as users write."""

    def forward(self, input_ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Any:
        """Adds 1."""
        outputs = super().forward(input_ids, attention_mask, global_attention_mask)
        return {"last_hidden_state": outputs.last_hidden_state + 1}


class OwnAttention(hf.LongformerSelfAttention):
    """A subclass of Hugging Face's attention."""


@pytest.mark.slow
def test_subclasses_follow_the_config_too(tmp_path: Path) -> None:
    expected = looped(attention_dilation=[1, [1, 4, 1, 2]])
    model = tiny_model(num_attention_heads=4, attention_dilation=[1, [1, 4, 1, 2]])
    model.__class__ = OwnModel
    for module in model.modules():
        if type(module) is hf.LongformerSelfAttention:
            module.__class__ = OwnAttention
    with pytest.raises(ExportError, match=r"call lfx\.export\.use_loop_attention"):
        export(model, tmp_path / "refused")
    own = use_loop_attention(use_loop_attention(model))
    assert isinstance(own, OwnModel)
    assert type(own).__module__ == __name__
    ids = torch.arange(3, 50)[None]
    with torch.no_grad():
        states = expected(ids).last_hidden_state
        torch.testing.assert_close(own(ids)["last_hidden_state"] - 1, states, rtol=0, atol=1e-6)
    with Engine(export(own, tmp_path / "bundle")) as engine:
        actual = engine.run(ids.numpy())["last_hidden_state"]
    np.testing.assert_allclose(actual - 1, states.numpy(), rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@contextmanager
def largest() -> Iterator[Largest]:
    """Measure within the block."""
    with Largest() as mode, torch.no_grad():
        yield mode


def test_the_largest_tensor_is_linear_in_the_sequence_length() -> None:
    model = looped(max_position_embeddings=4100, attention_dilation=[[1, 2, 2, 4], [3, 1, 3, 1]])
    sizes = []
    for seqlen in (1024, 4096):
        ids = torch.arange(seqlen)[None] % 50 + 3
        globals_ = torch.zeros_like(ids)
        globals_[:, :3] = 1
        with largest() as mode:
            model(ids, global_attention_mask=globals_)
        sizes.append(mode.elements)
    assert sizes[1] == 4 * sizes[0]


def test_gradients_are_those_of_dense_attention() -> None:
    """In float64 the difference quotients of the output agree, for weights and hidden states."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=4, attention_window=[4, 4], attention_dilation=[[1, 2], 1], autoregressive=True)
    attention = LoopSelfAttention(config, 0).double().eval()
    mask = torch.zeros(2, 7)
    mask[0, 2], mask[1, 5:] = 1, -1
    hidden = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(attention.parameters())

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return attention(x, mask)[0]

    assert torch.autograd.gradcheck(run, (hidden, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_gives_no_gradient_that_is_not_a_number(dtype: torch.dtype) -> None:
    model = looped(attention_dilation=[1, [2, 1, 2, 1]], autoregressive=True).to(dtype)
    ids, mask = torch.arange(80).reshape(2, 40) % 50 + 3, torch.ones(2, 40, dtype=torch.int64)
    mask[0, :20], mask[1] = 0, 0
    model(ids, mask).last_hidden_state[0, 20:].float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_causal_token_does_not_depend_on_later_ones() -> None:
    model = looped(attention_dilation=[1, [2, 1, 2, 1]], autoregressive=True)
    ids = torch.arange(60)[None] % 50 + 3
    changed = ids.clone()
    changed[:, 40:] = 7
    with torch.inference_mode():
        first, second = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(first[:, :40], second[:, :40], rtol=0, atol=1e-6)
    assert (first - second)[:, 40:].abs().max() > 1e-3


# The cases of allenai's tests/test_var_global_attn.py, as masks of three rows: below 0 masked, above 0 global.
def places(*rows: slice | None, padding: int = 10, seqlen: int = 60) -> torch.Tensor:
    """A mask of three rows with the same padding at the end and global tokens in a slice of each."""
    mask = torch.zeros(3, seqlen)
    mask[:, seqlen - padding :] = -1
    for row, part in enumerate(rows):
        if part is not None:
            mask[row, part] = 1
    return mask


VARIABLE_GLOBALS = {
    "all local": places(padding=0),
    "padding": places(),
    "same places": places(slice(10), slice(10), slice(10)),
    "different places": places(slice(10), slice(5, 15), slice(10, 20)),
    "variable counts, a row with none": places(slice(5, 15), None, slice(13, 17)),
}


@pytest.mark.parametrize("mask", VARIABLE_GLOBALS.values(), ids=VARIABLE_GLOBALS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_batch_is_its_rows_one_by_one(pattern: dict[str, Any], mask: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = tiny_config(hidden_size=60, num_attention_heads=3, num_hidden_layers=1, attention_window=[16])
    dilation = pattern.get("attention_dilation", 1)
    config.attention_dilation = dilation if isinstance(dilation, int) else [[1, 2, 4]]
    config.autoregressive = pattern.get("autoregressive", False)
    attention = LoopSelfAttention(config, 0).eval()
    hidden = torch.randn(3, 60, 60)
    with torch.inference_mode():
        together = attention(hidden, mask)[0]
        alone = torch.cat([attention(hidden[i : i + 1], mask[i : i + 1])[0] for i in range(3)])
        none = attention(hidden)[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    if not mask.any():
        torch.testing.assert_close(none, together, rtol=0, atol=0)


def test_a_saved_model_comes_back_with_its_windows(tmp_path: Path) -> None:
    model = looped("fill-mask", attention_dilation=[1, [1, 2, 1, 3]], autoregressive=True)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded, task = load(str(tmp_path / "checkpoint"))
    assert task == "fill-mask"
    attention = [m for m in loaded.modules() if isinstance(m, LoopSelfAttention)]
    assert [(m.dilations, m.causal) for m in attention] == [((1, 1, 1, 1), True), ((1, 2, 1, 3), True)]
    ids = torch.arange(50)[None] + 3
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_a_config_of_hugging_faces_settings_keeps_hugging_faces_attention(tmp_path: Path) -> None:
    tiny_model(attention_dilation=[1, 1], autoregressive=False, attention_mode="longformer").save_pretrained(tmp_path)
    loaded, _ = load(str(tmp_path))
    assert type(loaded) is LongformerModel
    assert not any(isinstance(m, LoopSelfAttention) for m in loaded.modules())


@pytest.mark.parametrize("setting", [{"attention_dilation": 2}, {"autoregressive": True}], ids=str)
def test_export_refuses_a_module_that_ignores_its_config(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=r"which its LongformerSelfAttention ignores; call lfx\.export\.use_loop"):
        export(tiny_model(**setting), tmp_path / "out")


class Own(nn.Module):
    """A module of a user's own around one self-attention."""

    def __init__(self, attention: type[LoopSelfAttention]) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = tiny_config(
            hidden_size=16, num_hidden_layers=1, attention_window=[2], attention_dilation=[[1, 7]], autoregressive=True
        )
        self.embedding, self.attention = nn.Embedding(50, 16), attention(config, 0)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.attention(self.embedding(input_ids), attention_mask=attention_mask - 1.0)[0]


class Doubled(LoopSelfAttention):
    """A user's subclass."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return (super().forward(*args, **options)[0] * 2,)


@pytest.mark.parametrize("attention", [LoopSelfAttention, Doubled])
def test_a_module_around_it_is_exported_at_any_length(attention: type[LoopSelfAttention], tmp_path: Path) -> None:
    """Also with a one-sided window of 1, on which Hugging Face's attention fails."""
    module = Own(attention).eval()
    with Engine(export(module, tmp_path / "out")) as engine:
        assert engine.signature.attention_windows == (7,)
        for length in (1, 2, 13, 30):
            ids = torch.arange(length)[None]
            with torch.inference_mode():
                expected = module(ids, torch.ones_like(ids)).numpy()
            np.testing.assert_allclose(engine.run(ids.numpy())["output"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["checkpoint", nn.Linear(2, 2)], ids=["path", "another module"])
def test_what_has_no_longformer_attention_is_refused(model: Any) -> None:
    with pytest.raises(ExportError, match=f"{type(model).__name__} has no Longformer self-attention; give a"):
        use_loop_attention(model)


def test_attention_weights_are_refused() -> None:
    with pytest.raises(ExportError, match="output_attentions is set"):
        looped()(torch.tensor([[3, 4]]), output_attentions=True)
