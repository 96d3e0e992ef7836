"""Checks of a checkpoint's files, made before transformers or torch read them.

A checkpoint is untrusted. It may not name code to fetch, files of another folder, or a model larger than its weights.
`find` downloads the files of a hub id into the hub's cache, so that all later steps read one local folder.
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

from lfx.checks import file_path, json_text
from lfx.errors import ExportError, one_line
from lfx.export.settings import check_size, model_size, read_object, read_settings, without_code
from lfx.manifest import MANIFEST

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
Fetch = Callable[[str], Path | None]

_TOKENIZER_BYTES = 256_000_000
_SETTINGS, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
# Arguments of tokenizers in transformers that may be paths or hold them; also those that end in one of _ENDINGS.
_PATHS = ("entity_vocab", "init_inputs", "merges", "source_spm", "target_spm", "vocab")
_ENDINGS = ("_file", "_files", "_kwargs")
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
_VOCABULARIES = {"tokenizer.json", _SETTINGS, "vocab.json", "vocab.txt", *_SENTENCEPIECE}
_TOKENIZER = (
    *sorted(_VOCABULARIES),
    "merges.txt",
    "bpe.codes",
    _SPECIAL_TOKENS,
    "added_tokens.json",
    "chat_template.jinja",
)
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")


class Fetcher:
    """Maps a file name to its path in a checkpoint, or to None if there is no such file; remembers each file's state.

    Args:
        find: does so without remembering.
    """

    def __init__(self, find: Fetch) -> None:
        self._find = find
        self._states: dict[Path, tuple[int, int]] = {}

    def __call__(self, name: str) -> Path | None:
        path = self._find(name)
        if path is not None:
            self._states.setdefault(path, _state(path))
        return path

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse what a block has made, if a file of the checkpoint was changed since it was found.

        A trainer that saves into the folder would give a bundle of two checkpoints: its files are read one after
        another, and the weights stay a mapping of their file.

        Raises:
            ExportError: one was changed.
        """
        try:
            yield
        except Exception as error:
            if (changed := self._changed()) is not None:
                raise _changed_error(changed) from error
            raise
        if (changed := self._changed()) is not None:
            raise _changed_error(changed)

    def _changed(self) -> Path | None:
        return next((path for path, state in self._states.items() if _state(path) != state), None)


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _changed_error(path: Path) -> ExportError:
    return ExportError(f"{path} was changed while the checkpoint was read; run it again when nobody writes to it")


@dataclass(frozen=True)
class Checkpoint:
    """Local files of a checkpoint that `find` has checked.

    Attributes:
        name: the folder or hub id, as the caller gave it.
        folder: holds the files; for a hub id, a folder in the hub's cache.
        settings: arguments for LongformerConfig or LEDConfig: the keys of config.json, except those that name code.
            Those of another family's config class for the encoders that `convert` takes.
        weights: the weight files, one or several shards.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights are safetensors; otherwise they are pickles, read with weights_only."""
        return self.weights[0].suffix == ".safetensors"


def find(model: str, fetch: Fetch | None = None) -> Checkpoint:
    """Find and check the files of a checkpoint; the files of a hub id are downloaded.

    Args:
        fetch: from `fetcher`, which takes all files of a hub id from one commit. Default: a new one.
    Raises:
        ExportError: the checkpoint does not exist, is no Longformer and no LED, or has a file that is broken, names
            code, or names a file of another folder.
    """
    fetch = fetch if fetch is not None else fetcher(model)
    path = config_file(fetch, model)
    settings = read_settings(path, model)
    if settings["model_type"] == "led" and (options := fetch(GENERATION_CONFIG)) is not None:
        read_object(options)  # transformers reads it with the weights
    return Checkpoint(model, path.parent, settings, weight_files(fetch, model, path, model_size(settings)))


def config_file(fetch: Fetch, model: str) -> Path:
    """Return the path of a checkpoint's config.json.

    Raises:
        ExportError: it has none, or is an adapter.
    """
    path = fetch(CONFIG)
    if path is None:
        _refuse_adapter(fetch, model)
        raise ExportError(f"{model} has no config.json; give a folder that save_pretrained wrote")
    return path


def weight_files(fetch: Fetch, model: str, config: Path, numbers: int) -> tuple[Path, ...]:
    """Return the checked weight files of a checkpoint.

    Args:
        config: path of its config.json, for messages.
        numbers: number of weights that the config describes.
    Raises:
        ExportError: it is an adapter; or the files are missing, broken, too small, or hold something else than floats.
    """
    _refuse_adapter(fetch, model)
    weights = _weights(fetch, model)
    check_size(numbers, sum(file.stat().st_size for file in weights), config)
    for file in weights:
        check_dtypes(file)
    return weights


def _refuse_adapter(fetch: Fetch, model: str) -> None:
    if fetch("adapter_config.json") is not None:
        raise ExportError(
            f"{model} is a PEFT adapter (adapter_config.json), which names another model to load; merge the two with "
            "merge_and_unload(), save the result with save_pretrained, and export that folder"
        )


def fetcher(model: str) -> Fetcher:
    """Return the `Fetcher` of a checkpoint.

    Raises:
        ExportError: `model` is neither a folder nor a hub id.
    """
    folder = file_path(model, "model", ExportError)
    if model and folder.is_dir():
        return Fetcher(lambda name: _plain_file(folder / name))
    if not model or os.path.lexists(folder):
        problem = f"{model} is a file, not a folder" if model else "model is empty"
        raise ExportError(f"{problem}; give the folder that holds config.json and the weights, or a hub id")
    if folder.is_absolute() or model.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII):
        raise ExportError(f"{model} does not exist; give a folder with config.json and weights, or a hub id")
    return Fetcher(_hub(model))


def _hub(model: str) -> Fetch:
    revision = "main"

    def fetch(name: str) -> Path | None:
        nonlocal revision
        try:
            path = transformers.utils.cached_file(
                model,
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                # Offline, a file that is not in the cache counts as missing from the checkpoint.
                _raise_exceptions_for_connection_errors=name == CONFIG,
            )
        except Exception as error:
            raise ExportError(
                f"{model} cannot be loaded: {one_line(error)}, and there is no folder of that name here"
            ) from error
        if path is None and name == CONFIG:
            raise ExportError(
                f"{model} cannot be loaded: the hub is out of reach or has no config.json for it, and there is no "
                "folder of that name here"
            )
        if path is None:
            return None
        revision = (
            Path(path).parents[name.count("/")].name
        )  # the commit, so that all files come from one, even if main changes
        return _plain_file(Path(path))

    return fetch


def _plain_file(path: Path) -> Path | None:
    """Return the path if it is a file or a link to one, None if it does not exist."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ExportError(f"{path} is a link to a file that does not exist; put the file there") from None
        return None
    except OSError as error:
        raise ExportError(f"{path} cannot be opened: {error.strerror}; give another checkpoint") from error
    if not stat.S_ISREG(mode):
        raise ExportError(f"{path} is no file: it is a folder or a device; give a folder that save_pretrained wrote")
    return path


def copy_tokenizer(model: str, folder: Path, fetch: Fetch | None = None) -> bool:
    """Copy a checkpoint's tokenizer files into a folder, without the keys that name code or other files.

    Args:
        fetch: of the checkpoint, from `fetcher`. Default: a new one.
    Returns:
        True if the checkpoint has a vocabulary or a tokenizer_config.json; otherwise nothing is copied.
    Raises:
        ExportError: `model` is neither a folder nor a hub id, or a tokenizer file is too large or cannot be read.
    """
    fetch = fetch if fetch is not None else fetcher(model)
    sources = {name: path for name in _TOKENIZER if (path := fetch(name)) is not None}
    if not sources.keys() & _VOCABULARIES:
        return False
    for name, path in sources.items():
        if name in (_SETTINGS, _SPECIAL_TOKENS):
            is_kept = _is_no_path if name == _SETTINGS else _is_special_token
            kept = {key: value for key, value in without_code(read_object(path)).items() if is_kept(key)}
            (folder / name).write_text(json_text(kept), encoding="utf-8")
        elif path.stat().st_size > _TOKENIZER_BYTES:
            raise ExportError(f"{path} has {path.stat().st_size:,} bytes; at most {_TOKENIZER_BYTES:,} are read")
        else:
            shutil.copyfile(path, folder / name)
    (folder / CONFIG).write_text(json_text(_tokenizer_keys(fetch)), encoding="utf-8")
    return True


def _is_no_path(key: str) -> bool:
    """Whether a key of tokenizer_config.json is none that may name another file."""
    return key not in _PATHS and not key.endswith(_ENDINGS)


def _is_special_token(key: str) -> bool:
    """Whether a key of special_tokens_map.json names special tokens; transformers takes any argument from that file."""
    return key.endswith(("_token", "_tokens"))


def _tokenizer_keys(fetch: Fetch) -> dict[str, str]:
    """Return the keys of config.json that AutoTokenizer reads: tokenizer_class and model_type."""
    path = fetch(CONFIG)
    settings = read_object(path) if path is not None else {}
    name = settings.get("tokenizer_class")
    keys = {"model_type": "led" if settings.get("model_type") == "led" else "longformer"}
    return {**keys, "tokenizer_class": name} if isinstance(name, str) else keys


def _weights(fetch: Fetch, model: str) -> tuple[Path, ...]:
    for single, index in _WEIGHTS:
        if (path := fetch(single)) is not None:
            return (path,)
        if (path := fetch(index)) is not None:
            return tuple(_shard(fetch, path, name) for name in _shard_names(path, PurePosixPath(single).suffix))
    if fetch(MANIFEST) is not None:
        raise ExportError(f"{model} is a bundle, not a checkpoint; give the checkpoint that it was made from")
    raise ExportError(f"{model} has no weights: neither model.safetensors nor pytorch_model.bin; save the model again")


def _shard_names(index: Path, suffix: str) -> list[str]:
    data = read_object(index)
    names = data.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(data.get("metadata"), dict):
        raise ExportError(f"{index} has no weight_map or no metadata; save the model again")
    for name in names.values():
        # A plain name may be a link, as in the hub's cache. A path may point out of the checkpoint's folder.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or not name.endswith(suffix):
            raise ExportError(
                f"{index} names {str(name)[:80]!r}, but only a {suffix} file of its own folder may hold weights; "
                "save the model again"
            )
    return sorted(set(names.values()))


def _shard(fetch: Fetch, index: Path, name: str) -> Path:
    path = fetch(name)
    if path is None:
        raise ExportError(f"{index} names {name!r}, which is missing; fetch the weights again")
    return path


def check_dtypes(file: Path) -> None:
    """Refuse integers and 8-bit floats: they are quantized weights, which cannot be used without their scales.

    Raises:
        ExportError: the file holds such weights, is broken, or is a pickle of more than tensors.
    """
    with readable(file):
        for name, dtype in _dtypes(file):
            if dtype not in _FLOATS and not name.endswith("_ids"):  # older checkpoints hold position_ids
                raise ExportError(
                    f"{file} holds {name} as {dtype}; lfx reads float64, float32, float16 and bfloat16 weights"
                )


def _dtypes(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open has no __iter__
                yield name, tensors.get_slice(name).get_dtype()
        return
    for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
        if isinstance(tensor, torch.Tensor):
            yield str(name), str(tensor.dtype).removeprefix("torch.")


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Convert an exception while a weight file is read to an ExportError."""
    try:
        yield
    except ExportError:
        raise
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"the weights of {os.fspath(file)} are a pickle of more than tensors, which can run code; save the model "
            "again, as safetensors"
        ) from error
    except Exception as error:
        raise ExportError(
            f"the weights of {os.fspath(file)} cannot be read: {one_line(error)}; fetch or save them again"
        ) from error
