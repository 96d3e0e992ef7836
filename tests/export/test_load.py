"""Checkpoints in a folder: those that load, and a one-line error for those that do not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from lfx.errors import ExportError
from lfx.export import convert, export
from lfx.export.load import load, load_tokenizer, weights_sha256
from lfx.signature import TASKS
from tests.models import save_tiny_checkpoint, tiny_model, tiny_tokenizer


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def _refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        load(str(folder), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("task", TASKS)
def test_auto_reads_the_task_from_the_config(tmp_path: Path, task: str) -> None:
    model, loaded_task = load(str(save_tiny_checkpoint(tmp_path / "c", task)))
    assert loaded_task == task
    assert type(model).__name__ == TASKS[task].architecture
    assert not model.training
    assert weights_sha256(model) == weights_sha256(tiny_model(task))


def test_a_config_without_architecture_is_the_bare_model(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    _edit_config(folder, architectures=None)
    assert load(str(folder))[1] == "feature-extraction"


@pytest.mark.slow
def test_the_bare_model_of_a_checkpoint_without_pooler_has_no_pooler_output(tmp_path: Path) -> None:
    """A randomly initialized pooler would give wrong outputs without an error."""
    from lfx.runtime import Engine

    folder = save_tiny_checkpoint(tmp_path / "c", "fill-mask")
    with Engine(export(folder, tmp_path / "out", task="feature-extraction")) as engine:
        assert [spec.name for spec in engine.signature.outputs] == ["last_hidden_state"]


def test_a_head_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    assert "not trained for text-classification" in _refusal(folder, task="text-classification")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    ).save_pretrained(folder)
    assert "is a bert, not a longformer" in _refusal(folder)


def test_missing_folders_and_configs_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in _refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{ not json")
    assert "not a JSON object" in _refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[]")
    assert "not a JSON object" in _refusal(tmp_path / "empty")


def test_missing_and_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        assert "weights" in _refusal(folder)
    weights.unlink()
    assert "weights" in _refusal(folder)


def test_an_adapter_as_peft_saves_it_and_a_bundle_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")  # and no config.json
    with pytest.raises(ExportError, match=r"is a PEFT adapter .*merge_and_unload"):
        convert(tmp_path / "adapter", tmp_path / "out")
    assert "is a PEFT adapter" in _refusal(tmp_path / "adapter")
    folder = save_tiny_checkpoint(tmp_path / "c")
    (folder / "model.safetensors").unlink()
    (folder / "lfx.json").write_text("{}")
    assert "is a bundle, not a checkpoint; give the checkpoint" in _refusal(folder)


def test_other_shapes_than_the_config_are_refused(tmp_path: Path) -> None:
    for i, change in enumerate(({"vocab_size": 50}, {"max_position_embeddings": 60}, {"intermediate_size": 32})):
        folder = save_tiny_checkpoint(tmp_path / f"c{i}")
        _edit_config(folder, **change)
        assert "weights" in _refusal(folder)


def test_fewer_layers_than_the_weights_have_are_refused(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    _edit_config(tmp_path, num_hidden_layers=1, attention_window=[8])
    with pytest.raises(ExportError, match=r"weights for which its config has no layer: encoder\.layer\.1\."):
        load(str(tmp_path), "auto")


@pytest.mark.parametrize("task", ["text-classification", "text2text-generation"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_with_the_prefix_of_a_wrapper_are_refused_with_the_reason(prefix: str, task: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, task)
    weights = load_file(folder / "model.safetensors")
    renamed = {f"{prefix}{key}": tensor for key, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert f"the prefix {prefix} is that of a wrapper: save the model that it wraps" in _refusal(folder)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("longformer.embeddings.word_embeddings.lora_embedding_A.default", False),
        ("longformer.embeddings.projection.weight", False),
        ("longformer.encoder.LayerNorm.weight", False),
        ("classifier.dense.lora_A.default.weight", False),
        ("classifier.dense2.weight", False),
        ("longformer.embeddings.position_ids", True),
        ("longformer.pooler.dense.weight", True),
        ("qa_outputs.weight", True),
    ],
)
def test_weights_of_a_part_that_the_model_has_are_not_left_out(key: str, known: bool, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "text-classification")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, key: torch.ones(4, 4)}, folder / "model.safetensors", {"format": "pt"})
    if known:
        load(str(folder), "auto")
    else:
        with pytest.raises(ExportError, match="has weights for which its config has no layer"):
            load(str(folder), "auto")


@pytest.mark.parametrize(
    ("task", "tied"),
    [
        ("fill-mask", {"lm_head.decoder.bias": "lm_head.bias"}),
        (
            "text2text-generation",
            {f"led.{part}.embed_tokens.weight": "led.shared.weight" for part in ("encoder", "decoder")},
        ),
    ],
)
def test_weights_that_transformers_4_ties_always_may_be_stored_once(
    task: str, tied: dict[str, str], tmp_path: Path
) -> None:
    model = tiny_model(task, tie_word_embeddings=False)
    parameters = dict(model.named_parameters())
    for name, source in tied.items():
        parameters[name].data = parameters[source].data.clone()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")  # it may map the file, which is written again
    stored = {name: tensor.clone() for name, tensor in weights.items() if name not in tied}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(4, 20)[None]
    loaded = load(str(tmp_path))[0]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    stored = {name: tensor for name, tensor in stored.items() if name not in tied.values()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert "has no weights for" in _refusal(tmp_path)


def test_more_layers_than_the_weights_have_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    _edit_config(folder, num_hidden_layers=3, attention_window=[8, 8, 8])
    assert "no weights for encoder.layer.2" in _refusal(folder)


@pytest.mark.parametrize("window", [7, 0, -2, [8, 7], [8]])
def test_an_attention_window_that_hugging_face_refuses_is_refused(tmp_path: Path, window: Any) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    _edit_config(folder, attention_window=window)
    assert "attention_window" in _refusal(folder)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_checkpoint(tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"embeddings.word_embeddings.weight": _Bomb()}, file)
    _refusal(folder)
    assert not Path("exploded").exists()


def test_plain_torch_weights_load(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    model = tiny_model()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert weights_sha256(load(str(folder))[0]) == weights_sha256(model)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    (folder / "tokenizer.json").write_text("{ broken")
    with pytest.raises(ExportError, match="tokenizer"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_makes_its_library_panic_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": normalizer}))
    with pytest.raises(ExportError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(str(folder))


def test_an_unknown_architecture_names_the_tasks(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    _edit_config(folder, architectures=["LongformerForDreams"])
    assert "choose --task from: feature-extraction" in _refusal(folder)
