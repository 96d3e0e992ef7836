"""Checkpoints of the original code, allenai/longformer: RoBERTas with a one-sided window, weights in a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import RobertaConfig, RobertaForMaskedLM
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx.errors import ExportError
from lfx.export import convert, export, use_loop_attention
from lfx.export.load import load
from lfx.runtime import Engine
from tests.models import tiny_model

IDS = torch.arange(40)[None] % 50 + 3
DILATED: dict[str, Any] = {"attention_dilation": [1, [1, 3]], "autoregressive": True, "attention_mode": "tvm"}
PLAIN: dict[str, Any] = {"attention_dilation": [1, 1], "autoregressive": False, "attention_mode": "sliding_chunks"}


def save_original(folder: Path, task: str = "fill-mask", zipped: bool = False, **settings: Any) -> Any:
    """Write a tiny checkpoint as the original code did, and return the model with Hugging Face's names."""
    settings = {**DILATED, **settings}
    model = use_loop_attention(
        tiny_model(
            task, attention_dilation=settings["attention_dilation"], autoregressive=bool(settings["autoregressive"])
        )
    )
    folder.mkdir()
    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    for name in ("transformers_version", "sep_token_id", "onnx_export", "dtype", "tie_word_embeddings"):
        config.pop(name, None)
    config |= {"model_type": "roberta", "attention_window": [4, 8], **settings}
    config["architectures"] = ["RobertaForMaskedLM" if task == "fill-mask" else "Longformer"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {re.sub(r"^longformer\.", "roberta.", name): tensor for name, tensor in model.state_dict().items()}
    weights["roberta.embeddings.position_ids"] = torch.arange(130)[None]
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return model


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle of 2020", "zip"])
@pytest.mark.parametrize("settings", [DILATED, PLAIN], ids=["dilated and causal", "plain"])
def test_it_loads_with_its_windows(tmp_path: Path, zipped: bool, settings: dict[str, Any]) -> None:
    model = save_original(tmp_path / "original", zipped=zipped, **settings)
    loaded, task = load(str(tmp_path / "original"))
    assert task == "fill-mask"
    assert loaded.config.attention_window == [8, 16]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_it_is_exported_with_the_numbers_of_pytorch(tmp_path: Path) -> None:
    model = save_original(tmp_path / "original")
    with torch.inference_mode():
        expected = model(IDS).logits.numpy()
    with Engine(export(tmp_path / "original", tmp_path / "bundle")) as engine:
        assert (engine.signature.attention_windows, engine.signature.causal) == ((4, 24), True)
        np.testing.assert_allclose(engine.run(IDS.numpy())["logits"], expected, rtol=0, atol=1e-5)
    # The bundle's config is Hugging Face's, whose windows count both sides.
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["attention_window"] == [8, 16]


def test_a_model_without_a_head_is_loaded_without_one(tmp_path: Path) -> None:
    model = save_original(tmp_path / "original", "feature-extraction")
    loaded, task = load(str(tmp_path / "original"))
    assert task == "feature-extraction"
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS)[0], model(IDS)[0], rtol=0, atol=1e-5)
    # Weights with a head, loaded without it.
    save_original(tmp_path / "headed")
    assert load(str(tmp_path / "headed"), "feature-extraction")[1] == "feature-extraction"


class NotebooksAttention(LongformerSelfAttention):
    """As the notebook puts it into a RoBERTa: without global tokens, for texts without padding."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Return the context alone."""
        shape = hidden_states.shape[:2]
        mask, none = hidden_states.new_zeros(shape), torch.zeros(shape, dtype=torch.bool)
        attended = super().forward(
            hidden_states, mask, is_index_masked=none, is_index_global_attn=none, is_global_attn=False
        )
        return attended[0], None


def save_notebooks(folder: Path, architecture: str = "RobertaForMaskedLM") -> Any:
    """Write a tiny checkpoint as the notebook does, and return the model."""
    settings = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=60, max_position_embeddings=66, type_vocab_size=1, **settings)
    config.attention_window = [8, 16]
    model = getattr(transformers, architecture)(config)
    for i, layer in enumerate(model.roberta.encoder.layer):
        layer.attention.self = NotebooksAttention(config, layer_id=i)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "RobertaLongForMaskedLM"])
def test_a_roberta_of_the_notebook_is_exported(tmp_path: Path, name: str) -> None:
    model = save_notebooks(tmp_path / "long")
    path = tmp_path / "long" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}))
    ids = IDS[:, :32]
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
    with Engine(export(tmp_path / "long", tmp_path / "bundle")) as engine:
        assert engine.signature.attention_windows == (4, 8)
        np.testing.assert_allclose(engine.run(ids.numpy())["logits"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ExportError, match=r"by the attention_window in its config.json; use: lfx export .*; or remove"):
        convert(tmp_path / "long", tmp_path / "made")


@pytest.mark.parametrize(
    "architecture", ["RobertaForSequenceClassification", "RobertaForQuestionAnswering", "RobertaForMultipleChoice"]
)
def test_a_roberta_of_the_notebook_marks_no_global_tokens(tmp_path: Path, architecture: str) -> None:
    model = save_notebooks(tmp_path / "long", architecture)
    ids = IDS[:, :32]
    ids = ids[:, None].repeat(1, 2, 1) if architecture.endswith("MultipleChoice") else ids
    with torch.inference_mode():
        expected = model(ids)
    with Engine(export(tmp_path / "long", tmp_path / "bundle")) as engine:
        for name, actual in engine.run(ids.numpy()).items():
            np.testing.assert_allclose(actual, expected[name].numpy(), rtol=0, atol=1e-5)


def test_a_roberta_with_a_window_and_nothing_else_of_a_longformer_is_refused(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=60, num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64
    )
    config.attention_window = 8
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ExportError, match="query_global"):
        load(str(tmp_path / "roberta"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "full attention": ({"attention_mode": "n2"}, "attention_mode 'n2' lets each token see all tokens"),
    "blocks": ({"attention_mode": "sliding_chunks3"}, "'sliding_chunks3' lets a token see three whole chunks"),
    "unknown mode": ({"attention_mode": "fast"}, "'fast' is not known; give one of longformer, tvm"),
    "no text": ({"attention_mode": 5}, "attention_mode '5' is no text"),
    "window": ({"attention_window": [4, 0]}, "attention_window 0 is out of range"),
    "dilation": ({"attention_dilation": [1, 0]}, "attention_dilation 0 is out of range"),
    "heads": ({"attention_dilation": [1, [1, 2, 3]]}, "attention_dilation has 3 entries for 2 heads"),
    "long dilation": ({"attention_dilation": 131}, "attention_dilation 131 is out of range; .* from 1 to 130"),
    "direction": ({"autoregressive": "yes"}, "autoregressive is 'yes'; give true or false"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_other_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_original(tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ExportError, match=message):
        load(str(tmp_path / "original"))


class Payload:
    """A pickle that would run a function."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Print when it is unpickled."""
        return print, ("a pickle ran",)


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_original(tmp_path / "original")
    torch.save({"a": Payload()}, tmp_path / "original" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    # Padded to the size that the config describes, which is checked first.
    with (tmp_path / "original" / "pytorch_model.bin").open("ab") as file:
        file.write(b"\0" * 200_000)
    with pytest.raises(ExportError, match="a pickle of more than tensors"):
        load(str(tmp_path / "original"))
    assert "a pickle ran" not in capsys.readouterr().out


def test_convert_refuses_it(tmp_path: Path) -> None:
    save_original(tmp_path / "original")
    with pytest.raises(ExportError, match=r"is a Longformer of the original code already, by .*; use: lfx export"):
        convert(tmp_path / "original", tmp_path / "made")
