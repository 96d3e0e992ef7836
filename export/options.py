"""Checks of what `export` is asked to do, before any work is done."""

from __future__ import annotations

import os
from typing import Any

from lfx.checks import file_path, one_of, whole_number
from lfx.errors import ExportError
from lfx.signature import GLOBAL_MODES, PRECISIONS, TASKS


def check_choices(task: Any, precision: Any, global_attention: Any, inline_functions: Any, progress: Any) -> None:
    """Raises: ExportError: an option of another type, or with a value that it cannot have."""
    one_of(task, "task", ("auto", *TASKS), ExportError)
    one_of(precision, "precision", PRECISIONS, ExportError)
    one_of(global_attention, "global_attention", GLOBAL_MODES, ExportError)
    if not isinstance(inline_functions, bool):
        raise ExportError(f"inline_functions is {type(inline_functions).__name__}; give True or False")
    if not callable(progress):
        raise ExportError(f"progress is {type(progress).__name__}; give a function of one text, or leave it out")


def at_least_1(value: Any, name: str) -> int | None:
    """A whole number from 1, or None where the option was left out. Raises: ExportError: anything else."""
    return None if value is None else whole_number(value, name, 1, error=ExportError)


def model_name(model: Any) -> str:
    """The folder or hub id that was given, as text. Raises: ExportError: it can be neither."""
    file_path(model, "model", ExportError)
    name = os.fspath(model)
    if not name:
        raise ExportError("model is empty; give a checkpoint folder, a hub id or an nn.Module")
    return str(name)
