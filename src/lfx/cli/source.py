"""The checkpoint that an artifact is compared with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lfx.checks import file_path
from lfx.errors import ArtifactError, InputError


def checkpoint_of(model: Path, known: Mapping[str, Any] | None, source: str | None, command: str) -> str:
    """The checkpoint that an artifact is compared with.

    A manifest may come from a stranger, so it decides only where it names a folder of this machine.

    Args:
        known: the manifest's `source`; None where there is no manifest.
        source: what the caller named; it comes first.
        command: the command to give where it is not known, with {} for the artifact and {} for the checkpoint.
    Raises:
        InputError: it is not known, or is to be fetched and was not named by the caller.
    """
    if source is not None:
        if not isinstance(source, str) or not source:
            raise InputError(f"source is {source!r}; give a checkpoint folder or a hub id")
        return source
    name, kind = (known.get("model"), known.get("kind")) if known is not None else (None, None)
    named = isinstance(name, str) and bool(name) and name.isprintable()
    if kind == "folder" and named and Path(str(name)).is_absolute() and file_path(name, "source").is_dir():
        return str(name)
    reason, place = "does not say which checkpoint it was made from", "CHECKPOINT"
    if kind == "hub" and named:
        reason, place = f"says it was made from {name} of the hub, which is loaded only when you ask for it", str(name)
    elif kind == "folder" and named:
        reason = f"was made from the folder {name}, which is not here"
    elif kind == "module":
        reason = "was made from a module in memory; save that with save_pretrained"
    raise InputError(f"{model} {reason}; give: {command.format(shlex.quote(str(model)), shlex.quote(place))}")


def load_checkpoint(source: str, task: str, known: Mapping[str, Any] | None, step: Callable[[str], None]) -> Any:
    """Load the model that an artifact is compared with.

    Args:
        known: the manifest's `source`; None where there is no manifest, and so no digest to compare.
    Raises:
        ExportError: it cannot be loaded.
        ArtifactError: its weights are not those that the artifact was made from.
    """
    step("importing torch")
    from lfx.export.load import load, weights_sha256

    step("loading the checkpoint")
    module, _ = load(source, task)
    if known is not None and weights_sha256(module) != known.get("sha256"):
        raise ArtifactError(
            f"{source} has other weights than the bundle was made from (sha256 differs); "
            "give the right checkpoint with --source, or export again"
        )
    return module
