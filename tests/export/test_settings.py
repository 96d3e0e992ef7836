"""config.json of untrusted checkpoints: the values that are accepted, and a one-line error for the others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from lfx.errors import ExportError
from lfx.export.load import load, weights_sha256
from lfx.export.settings import read_settings, without_aliases, without_code
from tests.models import save_tiny_checkpoint, tiny_model

TASK = "text-classification"


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


WRONG: list[tuple[str, list[Any]]] = [
    ("architectures", [5, {}, [5], "LongformerModel"]),
    ("pad_token_id", [10**30, -1, "x", None, 99, 1.5, True]),
    ("sep_token_id", [10**30, -1, "x", 99]),
    ("vocab_size", [0, -5, "x", None, 10**12]),
    ("attention_window", [7, 0, "x", None, {}, [], [8], [8, 7], [8, [8]], 10**12]),
    (
        "attention_dilation",
        [0, -1, "x", 1.5, True, {}, [], [1], [1, 0], [1, [1, 1, 1]], [1, [1, "x"]], [1, [[1, 1]]], 10**12],
    ),
    ("autoregressive", ["true", 1, [], {}]),
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


def test_more_layers_than_a_thousand_are_refused(folder: Path) -> None:
    edit(folder, num_hidden_layers=1001, attention_window=8)
    assert "num_hidden_layers 1001 is out of range" in refusal(folder)


def test_more_labels_than_the_weights_can_hold_are_refused_before_the_model_is_made(folder: Path) -> None:
    edit(folder, num_labels=1_000_000, id2label=None, label2id=None)
    assert "describes a model of 32,0" in refusal(folder)


def test_a_window_of_many_gigabytes_is_refused_by_name(folder: Path) -> None:
    edit(folder, max_position_embeddings=30_000, attention_window=[8, 24_000])
    assert "attention_window 24000 would take 18 GB for any sequence" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("architectures", None), ("sep_token_id", None), ("quantization_config", None), ("dtype", "float16")],
)
def test_a_config_with_an_unusual_value_is_taken(folder: Path, key: str, value: Any) -> None:
    edit(folder, **{key: value})
    assert weights_sha256(load(str(folder), TASK)[0]) == weights_sha256(tiny_model(TASK))


def test_keys_that_name_code_are_removed_at_any_depth() -> None:
    config = {"auto_map": {"A": "b"}, "_attn_implementation": "x/y", "kept": [{"custom_pipelines": 1, "a": 2}], "b": 3}
    assert without_code(config) == {"kept": [{"a": 2}], "b": 3}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 10**6, "nested too deeply"),
        (b"\xff\xfe\xff", "decode"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"5", "int"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert reason in refusal(folder)


def test_a_huge_config_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", 10**11)
    assert "at most 16,000,000 are read" in refusal(folder)


# As transformers 3 and 4 wrote them.
OLD_KEYS = {
    "add_cross_attention": False,
    "attention_mode": "longformer",
    "classifier_dropout": None,
    "do_sample": False,
    "finetuning_task": None,
    "gradient_checkpointing": False,
    "ignore_attention_mask": False,
    "is_decoder": False,
    "max_length": 20,
    "output_past": True,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "torch_dtype": "float16",
    "torchscript": False,
    "use_bfloat16": False,
    "use_cache": True,
    "_name_or_path": "someone/model",
    "_num_labels": 2,
}


def test_a_config_of_older_versions_is_taken(folder: Path) -> None:
    edit(folder, **OLD_KEYS)
    settings = read_settings(folder / "config.json", "it")
    assert settings["attention_mode"] == "longformer"
    assert not {"torch_dtype", "_name_or_path", "_num_labels"} & settings.keys()
    assert weights_sha256(load(str(folder))[0]) == weights_sha256(tiny_model(TASK))


@pytest.mark.parametrize("name", ["encoder_attention_heads", "num_attention_heads"])
def test_of_two_names_of_a_setting_the_one_counts_that_transformers_takes(tmp_path: Path, name: str) -> None:
    path = save_tiny_checkpoint(tmp_path / "led", "text2text-generation") / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    heads = {"encoder_attention_heads": 2, "num_attention_heads": 4}
    path.write_text(json.dumps({name: heads[name], **heads, **{k: v for k, v in config.items() if k not in heads}}))
    expected = transformers.AutoConfig.from_pretrained(path.parent).encoder_attention_heads
    assert expected == 4
    assert read_settings(path, "it")["encoder_attention_heads"] == expected


@pytest.mark.parametrize("config", ["BartConfig", "DistilBertConfig"])
def test_convert_reads_two_names_of_a_setting_as_transformers_does(config: str) -> None:
    config_class = getattr(transformers, config)
    for second, name in config_class.attribute_map.items():
        for settings in ({name: 4, second: 2}, {second: 2, name: 4}):
            assert without_aliases(settings, config_class) == {name: getattr(config_class(**settings), name)}, name
