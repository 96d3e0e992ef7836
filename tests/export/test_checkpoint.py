"""Untrusted checkpoints: the files that are read, and a one-line error for those that are refused."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from lfx.errors import ExportError, ParityError
from lfx.export import convert, converter, export, exporter
from lfx.export.checkpoint import copy_tokenizer, fetcher, find
from lfx.export.load import load, load_tokenizer, weights_sha256
from tests.encoders import save_tiny_encoder, save_wordpieces
from tests.models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

TASK = "text-classification"
WEIGHT = "longformer.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint", TASK)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_that_is_saved_again_while_it_is_exported_is_refused(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle would have the labels or the tokenizer of one model and the weights of another."""
    tiny_tokenizer().save_pretrained(folder)

    def save_again(*_: Any) -> None:
        os.utime(folder / name, (1, 1))
        raise ParityError("out of tolerance")

    monkeypatch.setattr(exporter, "_complete_bundle", save_again)
    with pytest.raises(ExportError, match=f"{name} was changed while the checkpoint was read; run it again"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_saved_again_while_it_is_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_encoder(tmp_path / "bert", "Bert")
    save_wordpieces(folder)
    monkeypatch.setattr(converter, "_copy_tokenizer", lambda *_: (folder / "config.json").write_text("{}"))
    with pytest.raises(ExportError, match=r"config\.json was changed while the checkpoint was read"):
        convert(folder, tmp_path / "out", max_seqlen=64, attention_window=16)
    assert not (tmp_path / "out").exists()


def test_attention_never_uses_a_kernel_of_the_hub(folder: Path) -> None:
    edit(folder, _attn_implementation="someone/kernel", attn_implementation={"": "someone/kernel"})
    assert load(str(folder))[0].config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_files_of_other_kinds_are_refused(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert f"{folder / name} is " in refusal(folder)


def _shard(folder: Path, name: Any) -> None:
    """Move the weights into one shard with an index."""
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
    (folder / "a.safetensors").symlink_to(tmp_path / "linked")  # the hub's cache has links
    assert weights_sha256(load(str(folder))[0]) == weights_sha256(tiny_model(TASK))


class _hidden:  # noqa: N801  it is a context manager
    """Rename a file for the duration of a block."""

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
    """A model in the hub's cache; returns the snapshot and the list of requested names."""
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


def test_the_tokenizer_of_a_hub_id_is_of_the_commit_of_its_weights(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's main branch may change while a checkpoint is loaded."""
    for commit in ("older", "newer"):
        shutil.copytree(saved, tmp_path / commit)
    tiny_tokenizer().save_pretrained(tmp_path / "older")

    def cached_file(model: str, name: str, *, revision: str, **_: Any) -> str | None:
        commit = (
            "older" if revision == "main" and name == "config.json" else "newer" if revision == "main" else revision
        )
        path = tmp_path / commit / name
        return str(path) if path.exists() else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    export("someone/model", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()


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


@pytest.mark.parametrize("settings", [None, {"do_lower_case": True}, {"tokenizer_class": None}])
def test_the_tokenizers_class_may_be_named_by_the_config(folder: Path, settings: dict[str, Any] | None) -> None:
    save_wordpieces(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer_class": "BertTokenizer"}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = load_tokenizer(str(folder))("A fox?").input_ids
    assert len(ids) == 5
    assert ids == AutoTokenizer.from_pretrained(folder)("A fox?").input_ids


def test_a_tokenizer_of_another_class_than_its_vocabulary_is_refused(folder: Path) -> None:
    save_wordpieces(folder)  # which Longformer's own class does not read
    with pytest.raises(ExportError, match=r"a Roberta\w+, knows no word: .* or set tokenizer_class"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["AlbertTokenizer", "T5Tokenizer", "RobertaTokenizer", "BertTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path, name: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ExportError, match=f"a {name}, knows no word: its vocabulary file is missing"):
        load_tokenizer(str(folder))


def test_a_class_of_two_tokenizers_is_refused(folder: Path) -> None:
    save_wordpieces(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RagTokenizer"}))
    # Older releases of transformers refuse it themselves.
    with pytest.raises(ExportError, match=r"RagTokenizer; set another tokenizer_class|question_encoder"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model"])
def test_vocabularies_of_sentencepiece_are_copied(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / name).write_text("pieces")
    (tmp_path / "copy").mkdir()
    assert copy_tokenizer(str(folder), tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_text() == "pieces"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_tokenizer_that_is_no_file_is_refused(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "tokenizer.json")
    with pytest.raises(ExportError, match="is no file"):
        load_tokenizer(str(folder))


@pytest.mark.slow
def test_no_argument_of_a_tokenizer_that_may_name_a_file_is_copied(tmp_path: Path) -> None:
    """Enumerates the arguments of all tokenizers in transformers, so that one of a later release is found too."""
    entries = tokenization_auto.TOKENIZER_MAPPING_NAMES.values()
    names = {name for entry in entries for name in (entry if isinstance(entry, tuple) else [entry]) if name}
    classes = [cls for name in names if (cls := tokenization_auto.tokenizer_class_from_name(name)) is not None]
    makers = {vars(base)["__init__"] for cls in classes for base in cls.__mro__ if "__init__" in vars(base)}
    parameters = [parameter for make in makers for parameter in inspect.signature(make).parameters.values()]
    arguments = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    files = {name for name in arguments if re.search("file|vocab|merges|spm|path|folder|dir$|kwargs", name)}
    files.remove("_spm_precompiled_charsmap")  # a table, and not its path
    assert {"vocab", "vocab_file", "merges", "entity_vocab", "mecab_kwargs"} <= files
    checkpoint, copied = tmp_path / "checkpoint", tmp_path / "copied"
    checkpoint.mkdir()
    copied.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "longformer"}')
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(arguments, "x")))
    assert copy_tokenizer(str(checkpoint), copied)
    kept = json.loads((copied / "tokenizer_config.json").read_text()).keys()
    assert not files & kept
    assert "unk_token" in kept
