"""Checks of the arguments of `export`, made before any work is done, and those that the graphs are made by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lfx.checks import file_path, one_of, whole_number
from lfx.errors import ExportError
from lfx.export.rewrite import GlobalTokens
from lfx.signature import GLOBAL_MODES, POOLINGS, PRECISIONS, SENTENCE_EMBEDDING, TASKS


@dataclass(frozen=True)
class GraphOptions:
    """The arguments of `export` that determine the graphs.

    Attributes:
        tokens: the rule for global tokens.
        opset, precision, max_seqlen, inline_functions: see `lfx.export.export`.
    """

    tokens: GlobalTokens
    opset: int
    precision: str
    max_seqlen: int | None
    inline_functions: bool


def check_choices(task: Any, precision: Any, global_attention: Any, inline_functions: Any, progress: Any) -> None:
    """Check the arguments that have a fixed set of values, and the type of `progress`.

    Raises:
        ExportError: an argument has another type, or a value that is not allowed.
    """
    one_of(task, "task", ("auto", *TASKS), ExportError)
    one_of(precision, "precision", PRECISIONS, ExportError)
    one_of(global_attention, "global_attention", GLOBAL_MODES, ExportError)
    if not isinstance(inline_functions, bool):
        raise ExportError(f"inline_functions is {type(inline_functions).__name__}; give True or False")
    check_progress(progress)


def check_pooling(pooling: Any, task: str) -> None:
    """Check the argument `pooling`, which is for sentence embeddings; None = no pooling.

    Raises:
        ExportError: it is unknown, or the task is another.
    """
    if pooling is None:
        return
    one_of(pooling, "pooling", POOLINGS, ExportError)
    if task not in ("auto", SENTENCE_EMBEDDING):
        raise ExportError(
            f"pooling {pooling!r} is for the task {SENTENCE_EMBEDDING}, not {task}; leave one of them out"
        )


def check_progress(progress: Any) -> None:
    """Check the type of `progress`.

    Raises:
        ExportError: it is no function.
    """
    if not callable(progress):
        raise ExportError(
            f"progress is {type(progress).__name__}; give a function that takes a string, or leave it out"
        )


def at_least_1(value: Any, name: str) -> int | None:
    """Return an argument as an int of 1 or more; None stays None.

    Raises:
        ExportError: it has another type, or is below 1.
    """
    return None if value is None else whole_number(value, name, 1, error=ExportError)


def model_name(model: Any) -> str:
    """Return the folder or hub id as a string.

    Raises:
        ExportError: it is empty, or no path.
    """
    file_path(model, "model", ExportError)
    name = os.fspath(model)
    if not name:
        raise ExportError("model is empty; give a checkpoint folder, a hub id or an nn.Module")
    return str(name)
