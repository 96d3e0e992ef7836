"""A checkpoint's files, checked before transformers or torch read them.

A checkpoint may come from a stranger. Nothing in it may name code to fetch, files of another folder, or a model that
its own weights do not hold. `find` brings the files of a hub id into the hub's cache, so that everything after it
reads one local folder.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch
import transformers
from transformers.activations import ACT2FN

from lfx.checks import file_path, json_text, one_of, parse_json, real_number, whole_number
from lfx.errors import ExportError, one_line

CONFIG = "config.json"
Fetch = Callable[[str], Path | None]

# Keys that make transformers fetch or import code, or load another model.
CODE_KEYS = frozenset(
    {
        "adapter_config",
        "adapter_kwargs",
        "attn_implementation",
        "audio_tokenizer",
        "auto_map",
        "base_model_name_or_path",
        "custom_generate",
        "custom_pipelines",
        "experts_implementation",
        "kernel_config",
        "name_or_path",
        "quantization_config",
        "transformers_weights",
        "use_kernels",
    }
)
_JSON_BYTES = 16_000_000  # a config.json has some thousand bytes, the index of a sharded checkpoint a million
_TOKENIZER_BYTES = 256_000_000
_LABELS = 1_000_000
_VOCABULARIES = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model"}
_SETTINGS = "tokenizer_config.json"
_TOKENIZER = (
    *sorted(_VOCABULARIES),
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Checkpoint:
    """Local files of a checkpoint that `find` has checked.

    Attributes:
        name: as the caller gave it.
        folder: holds the files; of a hub id a folder in the hub's cache.
        settings: arguments for LongformerConfig: what config.json says, without what names code.
        weights: the files with weights, one or several shards.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights are safetensors; else they are pickles that are read with weights_only."""
        return self.weights[0].suffix == ".safetensors"


def find(model: str) -> Checkpoint:
    """Find and check the files of a checkpoint; those of a hub id are downloaded.

    Raises:
        ExportError: no such checkpoint, not a Longformer, a broken file, or one that names code or foreign files.
    """
    fetch = fetcher(model)
    path = fetch(CONFIG)
    if path is None:
        raise ExportError(f"{model} has no config.json; give a folder that save_pretrained wrote")
    settings = _settings(path, model)
    if fetch("adapter_config.json") is not None:
        raise ExportError(
            f"{model} is a PEFT adapter (adapter_config.json), which names another model to load; merge the two with "
            "merge_and_unload(), and export the folder that save_pretrained writes then"
        )
    weights = _weights(fetch, model)
    _check_size(settings, weights, path)
    for file in weights:
        _check_dtypes(file)
    return Checkpoint(model, path.parent, settings, weights)


def fetcher(model: str) -> Fetch:
    """A function from the name of a file of a checkpoint to its path, or None where the checkpoint has no such file.

    Raises:
        ExportError: neither a folder nor a hub id.
    """
    folder = file_path(model, "model", ExportError)
    if model and folder.is_dir():
        return lambda name: _plain_file(folder / name)
    if not model or os.path.lexists(folder):
        given = f"{model} is a file, not a folder" if model else "model is empty"
        raise ExportError(f"{given}; give the folder that holds config.json and the weights, or a hub id")
    if folder.is_absolute() or model.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII):
        raise ExportError(f"{model} does not exist; give a folder with config.json and weights, or a hub id")
    return _hub(model)


def _hub(model: str) -> Fetch:
    revision = "main"

    def fetch(name: str) -> Path | None:
        nonlocal revision
        try:
            found = transformers.utils.cached_file(
                model,
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                # Offline, a file that the cache does not have is one that the checkpoint does not have.
                _raise_exceptions_for_connection_errors=name == CONFIG,
            )
        except Exception as error:
            raise ExportError(
                f"{model} cannot be loaded: {one_line(error)}, and there is no folder of that name here"
            ) from error
        if found is None and name == CONFIG:
            raise ExportError(
                f"{model} cannot be loaded: the hub is out of reach, or has no config.json of that name, and there is "
                "no folder of that name here"
            )
        if found is None:
            return None
        revision = Path(found).parent.name  # the commit: all files are of one, even if the branch moves on
        return _plain_file(Path(found))

    return fetch


def _plain_file(path: Path) -> Path | None:
    """The path of a file, or of a link to one; None where nothing has that name."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ExportError(f"{path} is a link to nothing; put the file there") from None
        return None
    except OSError as error:
        raise ExportError(f"{path} cannot be opened: {error.strerror}; give another checkpoint") from error
    if not stat.S_ISREG(mode):
        raise ExportError(f"{path} is no file but a folder or a device; give a folder that save_pretrained wrote")
    return path


def copy_tokenizer(model: str, folder: Path) -> bool:
    """Copy the files of a checkpoint's tokenizer into a folder, without what names code or other files.

    Returns:
        Whether there is a vocabulary or a tokenizer_config.json.
    Raises:
        ExportError: neither a folder nor a hub id, or a file that is none.
    """
    fetch = fetcher(model)
    sources = {name: path for name in _TOKENIZER if (path := fetch(name)) is not None}
    if not sources.keys() & _VOCABULARIES:
        return False
    for name, path in sources.items():
        if name == _SETTINGS:
            settings = without_code(read_object(path))
            kept = {key: value for key, value in settings.items() if not key.endswith(("_file", "_files"))}
            (folder / name).write_text(json_text(kept), encoding="utf-8")
        elif path.stat().st_size > _TOKENIZER_BYTES:
            raise ExportError(f"{path} has {path.stat().st_size:,} bytes; at most {_TOKENIZER_BYTES:,} are read")
        else:
            shutil.copyfile(path, folder / name)
    (folder / CONFIG).write_text('{"model_type": "longformer"}', encoding="utf-8")
    return True


def read_object(path: Path, limit: int = _JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        ExportError: not readable, larger than `limit` bytes, or no JSON object.
    """
    try:
        if path.stat().st_size > limit:
            raise ExportError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path} is not a JSON object: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} is not a JSON object but a {type(data).__name__}")
    return data


def without_code(value: Any) -> Any:
    """A config's JSON without the keys that name code, at any depth."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if not _names_code(key)}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def _names_code(key: Any) -> bool:
    return isinstance(key, str) and (key in CODE_KEYS or key.removeprefix("_") in CODE_KEYS or key == "_auto_class")


def _settings(path: Path, model: str) -> dict[str, Any]:
    data = read_object(path)
    declared = data.get("model_type")
    if declared != "longformer":
        kind = declared if isinstance(declared, str) else "model of no stated type"
        raise ExportError(f"{model} is a {kind}, not a longformer; lfx exports Longformer models only")
    if data.get("quantization_config") is not None:
        raise ExportError(
            f"{model} holds quantized weights (quantization_config), whose loaders fetch code; export the float "
            "checkpoint that it was made from, and use: lfx quantize"
        )
    if data.get("transformers_weights") is not None:
        raise ExportError(
            f"{path} names its weights file with transformers_weights; rename that file to model.safetensors and "
            "remove the key"
        )
    plain = transformers.LongformerConfig()
    known = {*plain.to_dict(), "num_labels", "output_attentions", "torch_dtype"} - {"model_type"}
    settings = {}
    for key, value in data.items():
        if _names_code(key) or key.startswith("_") or key in ("model_type", "transformers_version"):
            continue
        if key not in known and hasattr(plain, key):  # it would take the place of a method or of a table
            raise ExportError(f"{path} has the key {key[:80]!r}, which is no setting of a Longformer; remove it")
        settings[key] = without_code(value)
    _check_settings({**plain.to_dict(), **settings}, path)
    # The weights are loaded in float32, whatever they were stored in.
    return {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}


def _check_settings(values: dict[str, Any], path: Path) -> None:
    def whole(name: str, low: int, high: int | None = None) -> int:
        return whole_number(values[name], f"{path}: {name}", low, high, ExportError)

    vocab_size = whole("vocab_size", 1)
    pad = whole("pad_token_id", 0, vocab_size - 1)
    if values["sep_token_id"] is not None:
        whole("sep_token_id", 0, vocab_size - 1)
    hidden, heads = whole("hidden_size", 1), whole("num_attention_heads", 1)
    if hidden % heads:
        raise ExportError(f"{path}: num_attention_heads {heads} does not divide hidden_size {hidden}")
    for name in ("intermediate_size", "type_vocab_size"):
        whole(name, 1)
    positions = whole("max_position_embeddings", pad + 2)
    _check_windows(values["attention_window"], whole("num_hidden_layers", 1), positions, path)
    one_of(values["hidden_act"], f"{path}: hidden_act", ACT2FN, ExportError)
    real_number(values["layer_norm_eps"], f"{path}: layer_norm_eps", 0.0, 1.0, ExportError)
    for name in ("dtype", "torch_dtype"):
        if values.get(name) is not None:
            one_of(values[name], f"{path}: {name}", _DTYPES, ExportError)
    if values["problem_type"] is not None:
        one_of(values["problem_type"], f"{path}: problem_type", _PROBLEMS, ExportError)
    _check_labels(values, path)


def _check_windows(window: Any, layers: int, positions: int, path: Path) -> None:
    name = f"{path}: attention_window"
    # Hugging Face pads a sequence to a multiple of the window, so that a huge one takes memory for no token.
    widest = max(2 * positions, 1024)
    if isinstance(window, list) and len(window) != layers:
        raise ExportError(f"{name} has {len(window)} entries for {layers} layers; give one for each layer, or a number")
    for width in window if isinstance(window, list) else [window]:
        if whole_number(width, name, 2, widest, ExportError) % 2:
            raise ExportError(f"{name} {width} is odd; give an even number, both sides together")


def _check_labels(values: dict[str, Any], path: Path) -> None:
    architectures = values["architectures"]
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ExportError(f"{path}: architectures is no list of class names; give one, such as LongformerModel")
    if values.get("num_labels") is not None:
        whole_number(values["num_labels"], f"{path}: num_labels", 1, _LABELS, ExportError)
    for name in ("id2label", "label2id"):
        if values[name] is not None and not isinstance(values[name], dict):
            raise ExportError(f"{path}: {name} is no JSON object; give labels by number, or leave it out")
    labels = values["id2label"] or {}
    if {str(key) for key in labels} != {str(i) for i in range(len(labels))}:
        raise ExportError(f"{path}: the keys of id2label are not the numbers from 0 to {len(labels) - 1}")
    if not all(isinstance(label, str) for label in labels.values()):
        raise ExportError(f"{path}: id2label has a label that is no text")


def _weights(fetch: Fetch, model: str) -> tuple[Path, ...]:
    for single, index in _WEIGHTS:
        if (path := fetch(single)) is not None:
            return (path,)
        if (path := fetch(index)) is not None:
            return tuple(_shard(fetch, path, name) for name in _shard_names(path, PurePosixPath(single).suffix))
    raise ExportError(f"{model} has no weights: neither model.safetensors nor pytorch_model.bin; save the model again")


def _shard_names(index: Path, suffix: str) -> list[str]:
    data = read_object(index)
    names = data.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(data.get("metadata"), dict):
        raise ExportError(f"{index} has no weight_map or no metadata; save the model again")
    for name in names.values():
        # A name in the folder may be a link, as all are in the hub's cache; a path out of it is not the checkpoint's.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or not name.endswith(suffix):
            raise ExportError(
                f"{index} names {str(name)[:80]!r}, and only a {suffix} file of its own folder may hold weights; "
                "save the model again"
            )
    return sorted(set(names.values()))


def _shard(fetch: Fetch, index: Path, name: str) -> Path:
    path = fetch(name)
    if path is None:
        raise ExportError(f"{index} names {name!r}, which is missing; fetch the weights again")
    return path


def _check_size(settings: dict[str, Any], weights: tuple[Path, ...], path: Path) -> None:
    """A model is built at the config's sizes before its weights are read: those must be there to fill it."""
    values = {**transformers.LongformerConfig().to_dict(), **settings}
    hidden = values["hidden_size"]
    rows = values["vocab_size"] + values["max_position_embeddings"] + values["type_vocab_size"]
    layer = 7 * hidden * hidden + 2 * hidden * values["intermediate_size"]
    numbers, stored = rows * hidden + values["num_hidden_layers"] * layer, sum(f.stat().st_size for f in weights)
    if numbers > stored:
        raise ExportError(
            f"{path} describes a model of {numbers:,} weights or more, and its files of weights have {stored:,} bytes; "
            "fetch them again, or give the config that belongs to them"
        )


def _check_dtypes(file: Path) -> None:
    """Integers and 8-bit floats are quantized weights, which mean nothing without their scales."""
    with _readable(file):
        for name, dtype in _dtypes(file):
            if dtype not in _FLOATS and not name.endswith("_ids"):  # older checkpoints hold position_ids
                raise ExportError(
                    f"{file} holds {name} as {dtype}; lfx reads float64, float32, float16 and bfloat16 weights"
                )


def _dtypes(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                yield name, tensors.get_slice(name).get_dtype()
        return
    for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
        if isinstance(tensor, torch.Tensor):
            yield str(name), str(tensor.dtype).removeprefix("torch.")


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"the weights of {os.fspath(file)} are no pickle of tensors alone, and others can run code; save the model "
            "again, as safetensors"
        ) from error
    except Exception as error:
        raise ExportError(
            f"the weights of {os.fspath(file)} cannot be read: {one_line(error)}; fetch or save them again"
        ) from error
