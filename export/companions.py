"""The files beside the graph: config.json and the tokenizer's, without anything that names code to fetch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from lfx.checks import json_text
from lfx.errors import ExportError, one_line
from lfx.export.checkpoint import read_object, without_code

_KINDS = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises: ExportError: it is neither None nor a tokenizer of transformers."""
    if tokenizer is not None and not isinstance(tokenizer, _KINDS):
        raise ExportError(
            f"tokenizer is {type(tokenizer).__name__}; give one of transformers, such as AutoTokenizer loads, or "
            "PreTrainedTokenizerFast(tokenizer_object=...)"
        )


def write_config(config: Any, folder: Path) -> None:
    """Write the config.json of a model; its config object stays as it is. A config of no known kind is left out.

    Raises:
        ExportError: a setting that JSON cannot hold.
    """
    if not isinstance(config, transformers.PreTrainedConfig):
        return
    try:  # not with save_pretrained, which copies the source of a registered class, and changes the object
        settings = json.loads(config.to_json_string())
    except Exception as error:
        raise ExportError(f"the model's config cannot be written as JSON: {one_line(error)}") from error
    _write(folder / "config.json", settings)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer, or of a processor that holds one; None writes nothing.

    Raises:
        ExportError: it cannot be saved.
    """
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise  # the disk: the bundle's writer says what to do
    except Exception as error:
        raise ExportError(f"the tokenizer cannot be saved: {one_line(error)}") from error
    for path in folder.rglob("*.py"):
        path.unlink()  # the source of a registered class
    drop_code(folder)


def drop_code(folder: Path) -> None:
    """Take what names code out of the config files of a folder.

    Raises:
        ExportError: one of them is no JSON object.
    """
    for path in folder.glob("*config.json"):
        settings = read_object(path)
        if (plain := without_code(settings)) != settings:
            _write(path, plain)


def _write(path: Path, settings: Any) -> None:
    path.write_text(json_text(without_code(settings), indent=2) + "\n", encoding="utf-8")
