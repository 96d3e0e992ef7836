"""A bundle has config.json and the tokenizer's files, without keys that name code."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LongformerConfig, PreTrainedTokenizerFast

from lfx.errors import ExportError
from lfx.export.companions import check_tokenizer, drop_code, write_config, write_tokenizer
from tests.models import tiny_config, tiny_tokenizer


class OwnConfig(LongformerConfig):  # type: ignore[misc]
    """A registered config, whose source save_pretrained copies."""


class OwnTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A registered tokenizer, whose source save_pretrained copies."""


def test_a_config_is_written_without_code_and_its_object_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnConfig, "_auto_class", "AutoConfig", raising=False)
    code: dict[str, Any] = {"auto_map": {"AutoModel": "a--b.C"}, "transformers_weights": "x", "quantization_config": {}}
    config = OwnConfig(**{**tiny_config().to_dict(), **code, "own_setting": [1, 2], "id2label": {0: "a", 1: "b"}})
    before = copy.deepcopy(config.to_dict())
    write_config(config, tmp_path)
    assert config.to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert not code.keys() & written.keys()
    assert (written["own_setting"], written["id2label"]) == ([1, 2], {"0": "a", "1": "b"})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written as JSON"):
        write_config(tiny_config(own_setting=object()), tmp_path)


def test_a_tokenizer_is_written_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTokenizer, "_auto_class", "AutoTokenizer", raising=False)
    tokenizer = OwnTokenizer(tokenizer_object=tiny_tokenizer()._tokenizer)
    write_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    assert not list(tmp_path.rglob("*.py"))


def test_config_files_lose_keys_that_name_code_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"auto_map": {}, "size": 3}}')
    (tmp_path / "vocab.json").write_text('{"auto_map": 5}')
    drop_code(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text()) == {"image_processor": {"size": 3}}
    assert (tmp_path / "vocab.json").read_text() == '{"auto_map": 5}'


@pytest.mark.parametrize("tokenizer", [5, "bert", tiny_tokenizer()._tokenizer])
def test_an_object_that_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ExportError, match="give one of transformers"):
        check_tokenizer(tokenizer)


def test_settings_that_were_changed_after_loading_are_written(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side, tokenizer.split_special_tokens = "left", True
    write_tokenizer(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    ids = [made("the fox </s> " * 3 + "dog", truncation=True, max_length=9).input_ids for made in (read, tokenizer)]
    assert ids[0] == ids[1]


def test_a_clean_up_that_was_set_after_loading_is_written(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    name = "clean_up_tokenization_spaces"
    settings = {name: True, f"{name}_for_bpe_even_though_it_will_corrupt_output": True}
    for key, value in settings.items():
        setattr(tokenizer, key, value)
    write_tokenizer(tokenizer, tmp_path)
    assert settings.items() <= json.loads((tmp_path / "tokenizer_config.json").read_text()).items()
