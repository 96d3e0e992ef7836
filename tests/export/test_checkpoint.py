"""Checkpoints from strangers: what their files may say, and one line for what they may not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lfx.errors import ExportError
from lfx.export.checkpoint import fetcher, find, without_code
from lfx.export.load import load, load_tokenizer, weights_sha256
from tests.models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

TASK = "text-classification"
WEIGHT = "longformer.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint", TASK)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


WRONG: list[tuple[str, list[Any]]] = [
    ("architectures", [5, {}, [5], "LongformerModel"]),
    ("pad_token_id", [10**30, -1, "x", None, 99, 1.5, True]),
    ("sep_token_id", [10**30, -1, "x", 99]),
    ("vocab_size", [0, -5, "x", None, 10**12]),
    ("attention_window", [7, 0, "x", None, {}, [], [8], [8, 7], [8, [8]], 10**12]),
    ("max_position_embeddings", [0, 1, 2, "x", 10**12]),
    ("num_hidden_layers", [0, "x", None, 10**9]),
    ("num_attention_heads", [0, 3, "x", 10**9]),
    ("hidden_size", [0, "x", 10**9]),
    ("intermediate_size", [0, "x", 10**12]),
    ("type_vocab_size", [0, "x"]),
    ("hidden_act", ["none", [], {}]),
    ("layer_norm_eps", ["x", 2]),
    ("hidden_dropout_prob", [7]),
    ("dtype", ["float99", "int8", 5]),
    ("torch_dtype", ["float8_e4m3fn", []]),
    ("problem_type", [5, "x"]),
    ("id2label", [5, [], {"x": "y"}, {"0": 5, "1": "b"}, {"0": "a", "5": "b"}, {"0": "a", "1": "b", "2": "c"}]),
    ("label2id", [[5]]),
    ("num_labels", [0, "x", 10**10]),
    ("quantization_config", [{"quant_method": "bitsandbytes"}, 5]),
    ("transformers_weights", ["../x.safetensors", "x.safetensors", 5]),
    ("to_dict", [5]),
    ("attribute_map", [{"hidden_size": "other"}]),
    ("sub_configs", [{}]),
    ("model_type", [5, "bert", ["longformer"]]),
]


@pytest.mark.parametrize(("key", "values"), WRONG, ids=[key for key, _ in WRONG])
def test_a_config_with_a_wrong_value_is_refused(folder: Path, key: str, values: list[Any]) -> None:
    good = (folder / "config.json").read_text()
    for value in values:
        edit(folder, **{key: value})
        assert str(folder) in refusal(folder), value
        (folder / "config.json").write_text(good)


@pytest.mark.parametrize(
    ("key", "value"),
    [("architectures", None), ("sep_token_id", None), ("quantization_config", None), ("dtype", "float16")],
)
def test_a_config_with_an_unusual_value_is_taken(folder: Path, key: str, value: Any) -> None:
    edit(folder, **{key: value})
    assert weights_sha256(load(str(folder), TASK)[0]) == weights_sha256(tiny_model(TASK))


def test_what_names_code_is_left_out_at_any_depth() -> None:
    config = {"auto_map": {"A": "b"}, "_attn_implementation": "x/y", "kept": [{"custom_pipelines": 1, "a": 2}], "b": 3}
    assert without_code(config) == {"kept": [{"a": 2}], "b": 3}


def test_a_kernel_of_the_hub_is_not_attended_with(folder: Path) -> None:
    edit(folder, _attn_implementation="someone/kernel", attn_implementation={"": "someone/kernel"})
    assert load(str(folder))[0].config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_files_of_other_kinds_are_refused(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert f"{folder / name} is " in refusal(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 10**6, "nested too deeply"),
        (b"\xff\xfe\xff", "decode"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b"5", "int"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert reason in refusal(folder)


def test_a_huge_config_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", 10**11)
    assert "at most 16,000,000 are read" in refusal(folder)


def _shard(folder: Path, name: Any) -> None:
    """The weights in one shard of another name, as an index has it."""
    keys = load_file(folder / "model.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_names_files_of_its_own_folder(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    shutil.copy(weights, tmp_path / "out.safetensors")
    names = ["../out.safetensors", str(tmp_path / "out.safetensors"), "a\\out.safetensors", "..", "", "x.bin", 5, None]
    for name in names:
        _shard(folder, name)
        with _hidden(weights):
            assert "only a .safetensors file of its own folder" in refusal(folder), name
    _shard(folder, "a.safetensors")
    weights.rename(folder / "a.safetensors")
    assert weights_sha256(load(str(folder))[0]) == weights_sha256(tiny_model(TASK))
    (folder / "a.safetensors").rename(tmp_path / "linked")
    assert "'a.safetensors', which is missing" in refusal(folder)
    (folder / "a.safetensors").symlink_to(tmp_path / "linked")  # as the hub's cache has it
    assert weights_sha256(load(str(folder))[0]) == weights_sha256(tiny_model(TASK))


class _hidden:  # noqa: N801  it is a context manager
    """A file under another name for a while."""

    def __init__(self, path: Path) -> None:
        self.path, self.other = path, path.with_suffix(".hidden")

    def __enter__(self) -> None:
        self.path.rename(self.other)

    def __exit__(self, *_: object) -> None:
        self.other.rename(self.path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}, "metadata": {}}', '{"weight_map": {"a": "b"}}'])
def test_a_broken_index_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_are_no_floats_are_refused(folder: Path, dtype: torch.dtype, pickled: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT] = tensors[WEIGHT].to(dtype)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"holds {WEIGHT} as " in refusal(folder)


def test_weights_of_the_old_file_format_load(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert weights_sha256(load(str(folder))[0]) == weights_sha256(tiny_model(TASK))


@pytest.mark.parametrize("content", [5, [1], {"a": 5}, torch.ones(3)])
def test_a_pickle_of_something_else_is_refused(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([content, torch.zeros(100_000)], folder / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in refusal(folder)


def test_shapes_that_differ_are_named(folder: Path) -> None:
    edit(folder, intermediate_size=32)
    assert "weights of other shapes than the config's: " in refusal(folder)


@pytest.mark.parametrize("model", ["", "x" * 5000, "a\0b", "a/b/c", "../nowhere", "/nowhere", "a b", "https://x/y"])
def test_a_name_that_is_no_checkpoint_is_refused_before_the_hub_is_asked(model: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(transformers.utils, "cached_file", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ExportError):
        fetcher(model)


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A model of the hub, as its cache has it; returns the snapshot and the names that were asked for."""
    blobs, snapshot, asked = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee", []
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in saved.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)

    def cached_file(model: str, name: str, *, revision: str, **_: Any) -> str | None:
        assert revision == ("main" if not asked else "c0ffee")
        asked.append(name)
        return str(snapshot / name) if (snapshot / name).exists() else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    return snapshot, asked


def test_a_model_of_the_hub_loads_from_the_links_of_one_commit(hub: Any) -> None:
    assert weights_sha256(load("someone/model")[0]) == weights_sha256(tiny_model(TASK))


def test_a_config_and_an_index_of_the_hub_are_checked_before_weights_are_fetched(hub: Any) -> None:
    snapshot, asked = hub
    _shard(snapshot, "../out.safetensors")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="file of its own folder may hold weights"):
        find("someone/model")
    assert asked == ["config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json"]
    (snapshot / "adapter_config.json").write_text("{}")
    asked.clear()
    with pytest.raises(ExportError, match="PEFT adapter"):
        find("someone/model")


def test_a_tokenizer_is_made_from_the_checkpoints_own_files(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(folder)) is None
    tiny_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    outside = {"tokenizer_file": "/etc/passwd", "fast_tokenizer_files": ["../tokenizer.4.0.0.json"], "auto_map": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **outside}))
    ids = load_tokenizer(str(folder))("the quick brown fox")["input_ids"]
    assert ids == tiny_tokenizer()("the quick brown fox")["input_ids"]
    os.truncate(folder / "tokenizer.json", 10**11)
    with pytest.raises(ExportError, match="at most 256,000,000 are read"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_tokenizer_that_is_no_file_is_refused(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "tokenizer.json")
    with pytest.raises(ExportError, match="is no file"):
        load_tokenizer(str(folder))
