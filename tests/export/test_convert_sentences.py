"""`convert` keeps a folder of sentence-transformers one, without code of others."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lfx.export import convert
from tests.encoders import save_tiny_encoder, save_wordpieces
from tests.export.test_convert import LENGTH, WINDOW, edit, refusal

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A folder of sentence-transformers."""
    folder = save_wordpieces(save_tiny_encoder(tmp_path / "sentences", "Bert"))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 8}))
    torch.save({"linear.weight": torch.ones(8, 32)}, folder / "2_Dense" / "pytorch_model.bin")
    return folder


def test_a_folder_of_sentence_transformers_stays_one(tmp_path: Path, sentences: Path) -> None:
    made = convert(sentences, tmp_path / "made", LENGTH, WINDOW)

    def read(name: str) -> Any:
        return json.loads((made / name).read_text())

    assert read("modules.json") == MODULES
    assert read("1_Pooling/config.json") == POOLING
    assert read("2_Dense/config.json") == {"in_features": 32, "out_features": 8}
    weights = (sentences / "2_Dense" / "pytorch_model.bin").read_bytes()
    assert (made / "2_Dense" / "pytorch_model.bin").read_bytes() == weights
    assert (made / "3_Normalize").is_dir()
    assert read("sentence_bert_config.json") == {"max_seq_length": LENGTH, "do_lower_case": False}
    assert read("config_sentence_transformers.json") == {"prompts": {"query": "q: "}}
    assert read("tokenizer_config.json")["model_max_length"] == LENGTH


def test_a_model_of_the_hub_comes_from_one_commit(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(sentences, tmp_path / "hub" / "c0ffee"))

    def cached_file(model: str, name: str, *, revision: str, **_: Any) -> str | None:
        assert revision in ("main", "c0ffee")
        return str(snapshot / name) if (snapshot / name).exists() else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    monkeypatch.chdir(tmp_path)
    made = convert("me/model", "made", LENGTH, WINDOW)
    assert (made / "2_Dense" / "pytorch_model.bin").exists()


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"type": "custom.Pooling"}, "module 1 is 'custom.Pooling'"),
        ({"type": "sentence_transformers_x.Pooling"}, "module 1 is"),
        ({"type": "sentence_transformers.models.CNN"}, "module 1 is"),
        ({"type": None}, "module 1 is"),
        ({"path": "../1_Pooling"}, "module 1 has the path '../1_Pooling'"),
        ({"path": "/tmp"}, "module 1 has the path"),
        ({"path": ".."}, "module 1 has the path"),
        ({"path": 5}, "module 1 has the path"),
    ],
)
def test_a_module_of_other_code_or_of_another_folder_is_refused(
    tmp_path: Path, sentences: Path, module: dict[str, Any], message: str
) -> None:
    (sentences / "modules.json").write_text(json.dumps([MODULES[0], {**MODULES[1], **module}]))
    assert message in refusal(sentences, tmp_path / "made")


def test_an_activation_of_other_code_is_refused(tmp_path: Path, sentences: Path) -> None:
    path = sentences / "2_Dense" / "config.json"
    edit(path, activation_function="torch.nn.modules.activation.Tanh")
    assert convert(sentences, tmp_path / "made", LENGTH, WINDOW).exists()
    for name in ("os.system", "torch.hub.load", 5):
        edit(path, activation_function=name)
        assert "is no class of torch.nn" in refusal(sentences, tmp_path / "other")


@pytest.mark.parametrize("old", [True, False])
def test_the_score_function_of_a_cross_encoder_is_carried(tmp_path: Path, *, old: bool) -> None:
    def setting(function: str) -> dict[str, Any]:
        if old:
            return {"sbert_ce_default_activation_function": function}
        return {"sentence_transformers": {"activation_fn": function}}

    folder = save_tiny_encoder(tmp_path / "c", "Bert", "ForSequenceClassification", num_labels=1)
    edit(folder / "config.json", **setting("torch.nn.modules.linear.Identity"))
    config = json.loads((convert(folder, tmp_path / "made", LENGTH, WINDOW) / "config.json").read_text())
    assert config | setting("torch.nn.modules.linear.Identity") == config
    edit(folder / "config.json", **setting("os.system"))
    assert "'os.system' is no class of torch.nn" in refusal(folder, tmp_path / "other")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[5]", "null"])
def test_a_broken_list_of_modules_is_refused(tmp_path: Path, sentences: Path, text: str) -> None:
    (sentences / "modules.json").write_text(text)
    assert "modules.json" in refusal(sentences, tmp_path / "made")


def test_an_encoder_in_a_folder_of_its_own_is_refused(tmp_path: Path, sentences: Path) -> None:
    (sentences / "modules.json").write_text(json.dumps([{**MODULES[0], "path": "0_Transformer"}]))
    assert "has the encoder in the folder '0_Transformer'" in refusal(sentences, tmp_path / "made")


@pytest.mark.parametrize("name", ["2_Dense/pytorch_model.bin", "pytorch_model.bin"])
def test_a_pickle_with_code_is_not_run_and_not_copied(
    tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "pytorch_model.bin":
        (sentences / "model.safetensors").unlink()
    with (sentences / name).open("wb") as file:
        pickle.dump({"embeddings.word_embeddings.weight": _Bomb()}, file)
    assert "weights" in refusal(sentences, tmp_path / "made")
    assert not Path("exploded").exists()


def test_code_that_a_checkpoint_names_is_left_out(tmp_path: Path, sentences: Path) -> None:
    edit(sentences / "config.json", auto_map={"AutoModel": "other--module.Model"}, to_dict=5, kernel_config={"a": "b"})
    edit(sentences / "config_sentence_transformers.json", auto_map={"a": "b"})
    (sentences / "module.py").write_text("raise SystemExit")
    made = convert(sentences, tmp_path / "made", LENGTH, WINDOW)
    assert not list(made.rglob("*.py"))
    assert "auto_map" not in "".join(path.read_text() for path in made.rglob("*.json"))


@pytest.mark.parametrize("step", ["copying the tokenizer", "converting the weights", "writing", "comparing: batch 1"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, sentences: Path, step: str, error: type[BaseException]
) -> None:
    def progress(name: str) -> None:
        if name.startswith(step):
            raise error

    with pytest.raises(error):
        convert(sentences, tmp_path / "made", LENGTH, WINDOW, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["sentences"]
