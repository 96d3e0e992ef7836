"""Writing config.json and the tokenizer's files into a bundle, without the keys that name code to fetch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from lfx.checks import json_text
from lfx.errors import ExportError, one_line
from lfx.export.settings import read_object, without_code
from lfx.runtime.generation.settings import changes_nothing

_LIMITS = ("max_length", "max_seq_length", "model_max_length")
# Settings of a tokenizer that lfx reads. save_pretrained leaves out those that were changed after it was loaded.
_SETTINGS: dict[str, Any] = {
    "truncation_side": "right",
    "split_special_tokens": False,
    "clean_up_tokenization_spaces": False,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": False,
}
_TOKENIZERS = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)


def check_tokenizer(tokenizer: Any) -> None:
    """Check that the tokenizer can be saved.

    Raises:
        ExportError: it is neither None nor a tokenizer or processor of transformers.
    """
    if tokenizer is not None and not isinstance(tokenizer, _TOKENIZERS):
        raise ExportError(
            f"tokenizer is {type(tokenizer).__name__}; give one of transformers, such as AutoTokenizer loads, or "
            "PreTrainedTokenizerFast(tokenizer_object=...)"
        )


def write_config(config: Any, folder: Path) -> None:
    """Write a model's config as config.json; any object but a PreTrainedConfig is ignored. The config is not changed.

    Raises:
        ExportError: a setting cannot be written as JSON.
    """
    if not isinstance(config, transformers.PreTrainedConfig):
        return
    try:  # not save_pretrained: it copies the source of a registered class, and changes the config object
        settings = json.loads(config.to_json_string())
    except Exception as error:
        raise ExportError(f"the model's config cannot be written as JSON: {one_line(error)}") from error
    _write(folder / "config.json", settings)


def check_generation_config(model: Any) -> None:
    """Check that a model's config sets no option of generation.

    transformers 5 takes them from `generation_config` alone, and writes no texts where the config has others.

    Raises:
        ExportError: it does, and they differ from those of the model's generation_config.
    """
    read = getattr(model.config, "_get_generation_parameters", dict)
    options = getattr(model, "generation_config", None)
    ignored = [
        name
        for name, value in sorted(read().items())
        if not changes_nothing(name, value) and value != getattr(options, name, None)
    ]
    if ignored:
        raise ExportError(
            f"the model's config sets {', '.join(ignored)}, which transformers 5 takes from generation_config alone; "
            "set them in model.generation_config, and delete them from model.config"
        )


def write_generation_config(model: Any, folder: Path) -> None:
    """Write the options by which a model writes texts, generation_config.json, as transformers saves them.

    Raises:
        ExportError: an option cannot be written as JSON.
    """
    config = getattr(model, "generation_config", None)
    if not isinstance(config, transformers.GenerationConfig):
        return
    try:
        settings = json.loads(config.to_json_string())
    except Exception as error:
        raise ExportError(f"the model's generation_config cannot be written as JSON: {one_line(error)}") from error
    _write(folder / "generation_config.json", settings)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer or processor; None writes nothing.

    Raises:
        ExportError: the tokenizer cannot be saved.
    """
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise  # atomic_folder turns it into an ExportError that says what to do
    except Exception as error:
        raise ExportError(f"the tokenizer cannot be saved: {one_line(error)}") from error
    for path in folder.rglob("*.py"):
        path.unlink()  # save_pretrained copies the source of a registered class
    drop_code(folder)
    _write_settings(tokenizer, folder / "tokenizer_config.json")


def _write_settings(tokenizer: Any, path: Path) -> None:
    """Write the settings of a tokenizer, or of that of a processor, which its file lacks."""
    if not path.exists():
        return
    tokenizer, saved = getattr(tokenizer, "tokenizer", tokenizer), read_object(path)
    values = {
        name: type(default)(getattr(tokenizer, name, saved.get(name, default))) for name, default in _SETTINGS.items()
    }
    changed = {name: value for name, value in values.items() if saved.get(name, _SETTINGS[name]) != value}
    if changed:
        _write(path, {**saved, **changed})


def drop_code(folder: Path) -> None:
    """Remove the keys that name code from the config files of a folder.

    Raises:
        ExportError: a config file is no JSON object.
    """
    for path in folder.glob("*config.json"):
        settings = read_object(path)
        if (plain := without_code(settings)) != settings:
            _write(path, plain)


def raise_limits(folder: Path, max_seqlen: int, tokenizer_class: str) -> None:
    """Set the longest sequence of the tokenizer in a folder.

    Args:
        max_seqlen: the longest sequence, in tokens.
        tokenizer_class: written where the tokenizer names no class: transformers would choose one by the model's type.
    Raises:
        ExportError: a file is no JSON object.
    """
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if path.exists() else {}
    named = settings.get("tokenizer_class") or tokenizer_class
    settings = with_limit({**settings, "tokenizer_class": named}, max_seqlen)
    _write(path, {**settings, "model_max_length": max_seqlen})
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = read_object(path, path.stat().st_size)
        if isinstance(tokenizer.get("truncation"), dict):
            tokenizer["truncation"] = with_limit(tokenizer["truncation"], max_seqlen)
            path.write_text(json_text(tokenizer), encoding="utf-8")


def with_limit(value: Any, max_seqlen: int) -> Any:
    """Replace the longest sequences in settings of a tokenizer or of sentence-transformers, at any depth."""
    if isinstance(value, dict):
        return {
            key: max_seqlen if key in _LIMITS and type(item) is int else with_limit(item, max_seqlen)
            for key, item in value.items()
        }
    return [with_limit(item, max_seqlen) for item in value] if isinstance(value, list) else value


def _write(path: Path, settings: Any) -> None:
    path.write_text(json_text(without_code(settings), indent=2) + "\n", encoding="utf-8")
