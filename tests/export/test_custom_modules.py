"""User models: custom embeddings, heads and uses of the self-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import nn
from transformers.models.longformer.modeling_longformer import (
    LongformerEncoder,
    LongformerModel,
    LongformerSelfAttention,
)

from lfx.errors import ExportError, InputError, ParityError
from lfx.export import export
from lfx.export.rewrite import clone
from lfx.runtime import Engine
from tests.models import ONE_LAYER, VOCAB_SIZE, tiny_config, tiny_model

LENGTHS = (1, 7, 8, 9, 16, 17, 40)


def _inputs(seqlen: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seqlen)
    ids = torch.randint(3, VOCAB_SIZE, (batch, seqlen), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, seqlen - seqlen // 3 :] = 0
    marks = torch.zeros_like(ids)
    marks[:, seqlen // 2] = 1
    return ids, mask, marks


def _check(folder: Path, model: nn.Module, output: str, lengths: tuple[int, ...] = LENGTHS) -> None:
    eager = clone(model, torch.float32)  # modules with caches keep them off the caller's model
    with Engine(folder) as engine:
        for seqlen in lengths:
            ids, mask, marks = _inputs(seqlen)
            with torch.inference_mode():
                theirs: Any = eager(input_ids=ids, attention_mask=mask, global_attention_mask=marks)
            theirs = theirs[output] if not isinstance(theirs, torch.Tensor) else theirs
            mine = np.asarray(engine.run(ids, mask, marks)[output])
            np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-5, err_msg=f"length {seqlen}")


def test_of_a_module_that_is_compiled_in_place_the_copy_is_not() -> None:
    """It would call the original, whose attention cannot be traced, in the original's type."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise AssertionError("the original is called")

    model = tiny_model(**ONE_LAYER)
    for part in (model, model.encoder.layer[0]):
        part.compile(backend=backend)
    ids = _inputs(9)[0]
    assert clone(model, torch.float64)(ids)[0].dtype == torch.float64


@pytest.mark.slow
def test_position_embeddings_replaced_by_xpos(tmp_path: Path) -> None:
    """The notebook case: model.embeddings.position_embeddings = RotaryEmbedding(use_xpos=True)."""
    model = tiny_model(**ONE_LAYER)
    model.embeddings.position_embeddings = RotaryEmbedding(dim=32, use_xpos=True, cache_max_seq_len=130)
    _check(export(model, tmp_path / "out"), model, "last_hidden_state")


class _Sinusoid(nn.Module):
    """Sinusoidal positions computed in the forward pass: no position table, so no maximum length."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        rates = 10000.0 ** (-torch.arange(0, 16, dtype=torch.float32) / 16)
        angles = position_ids[..., None].to(torch.float32) * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.mark.slow
def test_positions_without_a_table_have_no_longest_sequence(tmp_path: Path) -> None:
    model = tiny_model(**ONE_LAYER)
    model.embeddings.position_embeddings = _Sinusoid()
    folder = export(model, tmp_path / "out")
    with Engine(folder) as engine:
        assert engine.signature.max_seqlen is None
    _check(folder, model, "last_hidden_state", (1, 129, 200))


class _HalfPositions(nn.Module):
    """Rotary code that computes positions in the dtype of a buffer, which half precision rounds from 2,048 on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 100.0 ** (-torch.arange(0, 16, dtype=torch.float32) / 16))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids.type_as(self.rates)[..., None] * self.rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.mark.slow
def test_positions_that_half_precision_rounds_are_refused(tmp_path: Path) -> None:
    model = tiny_model(**ONE_LAYER)
    model.embeddings.position_embeddings = _HalfPositions()
    export(model, tmp_path / "fp32", max_seqlen=4096)
    with pytest.raises(ParityError, match=r"PyTorch itself has error .* against PyTorch in float32 in fp16, above"):
        export(model, tmp_path / "fp16", max_seqlen=4096, precision="fp16")
    assert not (tmp_path / "fp16").exists()


@pytest.mark.slow
def test_max_seqlen_limits_a_model_without_a_table(tmp_path: Path) -> None:
    model = tiny_model(**ONE_LAYER)
    model.embeddings.position_embeddings = _Sinusoid()
    with Engine(export(model, tmp_path / "out", max_seqlen=50)) as engine:
        assert engine.signature.max_seqlen == 50


class _Tables(nn.Module):
    """Embeddings of its own: 50 words, 70 tags, and positions unless it has none."""

    def __init__(self, positions: int | None = None) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(50, 32), nn.Embedding(70, 32)
        self.positions = nn.Embedding(positions, 32) if positions is not None else None
        self.encoder = LongformerEncoder(tiny_config(**ONE_LAYER))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids) + self.tags(input_ids.reshape(-1)).reshape(*input_ids.shape, 32)
        if self.positions is not None:
            x = x + self.positions(torch.arange(input_ids.shape[1]))
        length = input_ids.shape[1]
        padding = -length % 32
        x, mask = (
            nn.functional.pad(x, (0, 0, 0, padding)),
            nn.functional.pad(attention_mask - 1, (0, padding), value=-1),
        )
        return self.encoder(x, attention_mask=mask)[0][:, :length]


@pytest.mark.slow
def test_an_id_that_a_table_of_the_module_does_not_have_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = export(_Tables().eval(), tmp_path / "out")
    for backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend)
        with Engine(folder, backend) as engine:
            assert engine.signature.vocab_size == 50
            engine.run([[3, 49]])
            with pytest.raises(InputError, match="50"):
                engine.run([[3, 50]])


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, 96])
def test_a_table_of_positions_of_the_module_needs_max_seqlen(wrong: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = _Tables(64).eval()
    with pytest.raises(ExportError, match=r"fails on ids of shape .*; give max_seqlen, the longest sequence"):
        export(module, tmp_path / "out", max_seqlen=wrong)
    with Engine(export(module, tmp_path / "out", max_seqlen=64)) as engine:
        assert engine.signature.max_seqlen == 64


class _Ranker(nn.Module):
    """A user's model with an encoder, a custom head and a custom output name."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_model(**ONE_LAYER)
        self.score = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, global_attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        states = self.backbone(
            input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask
        ).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        return {"relevance": self.score(mean).squeeze(-1)}


def test_a_users_head_and_output_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Ranker()
    _check(export(model, tmp_path / "out"), model, "relevance")


class _Tied(nn.Module):
    """Multiplies by a square weight transposed, in a linear layer of tokens and of one vector, and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tokens, self.first = tiny_model(**ONE_LAYER), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.inner(input_ids, attention_mask=attention_mask)[0]
        return self.tokens(x), x @ self.tokens.weight, self.first(x[:, 0]), x @ self.first.weight


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_square_weight_that_is_read_as_it_is_and_transposed(backend: str, tmp_path: Path) -> None:
    """OpenVINO (2026.4) takes one weight for the other if they are one tensor of the graph."""
    pytest.importorskip(backend)
    torch.manual_seed(0)
    model = _Tied().eval()
    ids, mask, _ = _inputs(17)
    with torch.inference_mode(), Engine(export(model, tmp_path / "out"), backend) as engine:
        for actual, expected in zip(engine.run(ids, mask).values(), model(ids, mask), strict=True):
            np.testing.assert_allclose(np.asarray(actual), expected.numpy(), atol=2e-5)


class _Subclass(LongformerModel):
    """Overrides forward and calls super: both must run in the export."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **options: Any) -> torch.Tensor:
        return 2.0 * super().forward(input_ids, attention_mask=attention_mask, **options).last_hidden_state


class _SubclassWithMask(_Subclass):
    def forward(  # the graph inputs are read from the signature
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        return super().forward(
            input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask, **options
        )


@pytest.mark.slow
def test_a_subclass_keeps_its_forward_around_the_replaced_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _SubclassWithMask(tiny_config(**ONE_LAYER)).eval()
    _check(export(model, tmp_path / "out"), model, "output")


class _Bare(nn.Module):
    """Calls LongformerSelfAttention directly, with Hugging Face's mask values and custom embeddings."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny_config()
        self.embed = nn.Embedding(VOCAB_SIZE, 32)
        self.attend = nn.ModuleList([LongformerSelfAttention(config, layer_id=i) for i in range(2)])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, global_attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(input_ids)
        merged = (attention_mask * (global_attention_mask + 1) - 1).to(x.dtype) * 10000.0
        for layer in self.attend:
            x = (
                x
                + layer(
                    x,
                    attention_mask=merged,
                    is_index_masked=merged < 0,
                    is_index_global_attn=merged > 0,
                    is_global_attn=(merged > 0).any().item(),
                )[0]
            )
        return x, x.mean(dim=1)


def test_self_attention_called_directly_exports_for_every_length(tmp_path: Path) -> None:
    """PyTorch takes multiples of the window only; the export takes all lengths and agrees where both can run."""
    torch.manual_seed(0)
    model = _Bare().eval()
    folder = export(model, tmp_path / "out")
    with Engine(folder) as engine:
        assert set(engine.run([5, 6, 7])) == {"output_0", "output_1"}
        for seqlen in (16, 48):
            ids, mask, marks = _inputs(seqlen)
            with torch.inference_mode():
                theirs = model(ids, mask, marks)
            mine = engine.run(ids, mask, marks)
            np.testing.assert_allclose(mine["output_0"], theirs[0].numpy(), atol=2e-5)


@pytest.mark.slow
def test_windows_that_differ_by_layer(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=3, attention_window=[4, 64, 16])
    folder = export(model, tmp_path / "out")
    with Engine(folder) as engine:
        assert engine.signature.attention_windows == (2, 32, 8)
    _check(folder, model, "last_hidden_state", (1, 2, 3, 15, 16, 17, 63, 65, 128))


class _NoIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(**ONE_LAYER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


def test_a_forward_without_input_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"takes no input_ids; .* global_attention_mask$"):
        export(_NoIds(), tmp_path / "out")
    model = tiny_model(**ONE_LAYER)
    for wrapper, name in ((torch.compile(model), "_orig_mod"), (nn.DataParallel(model), "module")):
        with pytest.raises(ExportError, match=f"give the model that it wraps, its {name}$"):
            export(wrapper, tmp_path / "out")


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(**ONE_LAYER)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.inner(input_ids)[0]
        return states if float(states.sum()) > 0 else -states


def test_a_model_that_cannot_be_traced_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="_Branching cannot be traced") as caught:
        export(_Branching(), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class _OnlyIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(**ONE_LAYER)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids).last_hidden_state


@pytest.mark.slow
def test_a_model_of_ids_alone_has_one_input(tmp_path: Path) -> None:
    model = _OnlyIds().eval()
    with Engine(export(model, tmp_path / "out")) as engine:
        assert [spec.name for spec in engine.signature.inputs] == ["input_ids"]
        ids = torch.arange(3, 23).reshape(1, 20)
        with torch.inference_mode():
            np.testing.assert_allclose(engine.run(ids)["output"], model(ids).numpy(), atol=1e-5)
