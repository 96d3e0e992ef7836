"""Finding and loading the checkpoint that an artifact is compared with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lfx.checks import file_path
from lfx.errors import ArtifactError, InputError


def checkpoint_of(model: Path, recorded: Mapping[str, Any] | None, source: str | None, command: str) -> str:
    """Return the checkpoint that an artifact is compared with, a folder or a hub id.

    The manifest is untrusted: a folder of this machine that it names is used, a hub id is not.

    Args:
        model: the artifact, for messages.
        recorded: the manifest's `source`; None without a manifest.
        source: the checkpoint that the caller named, which takes precedence.
        command: the command to suggest in an error, with {} for the artifact and {} for the checkpoint.
    Raises:
        InputError: the manifest names no folder of this machine, and the caller named no checkpoint.
    """
    if source is not None:
        if not isinstance(source, str) or not source:
            raise InputError(f"source is {source!r}; give a checkpoint folder or a hub id")
        return source
    name, source_type = (recorded.get("model"), recorded.get("kind")) if recorded is not None else (None, None)
    valid = isinstance(name, str) and bool(name) and name.isprintable()
    if source_type == "folder" and valid and Path(str(name)).is_absolute() and file_path(name, "source").is_dir():
        return str(name)
    reason, checkpoint = "does not say which checkpoint it was made from", "CHECKPOINT"
    if source_type == "hub" and valid:
        reason = f"says it was made from {name} of the hub, which is loaded only when you ask for it"
        checkpoint = str(name)
    elif source_type == "folder" and valid:
        reason = f"was made from the folder {name}, which is not here"
    elif source_type == "module":
        reason = "was made from a module in memory; save that with save_pretrained"
    raise InputError(f"{model} {reason}; give: {command.format(shlex.quote(str(model)), shlex.quote(checkpoint))}")


def load_checkpoint(source: str, task: str, recorded: Mapping[str, Any] | None, step: Callable[[str], None]) -> Any:
    """Load the model that an artifact is compared with.

    Args:
        recorded: the manifest's `source`, with the digest of the weights; None without a manifest.
    Raises:
        ExportError: the checkpoint cannot be loaded.
        ArtifactError: its weights are not those that the artifact was exported from.
    """
    step("importing torch")
    from lfx.export.load import load, weights_sha256

    step("loading the checkpoint")
    pooling = recorded.get("pooling") if recorded is not None else None
    module, _ = load(source, task, pooling)
    if recorded is not None and weights_sha256(module) != recorded.get("sha256"):
        raise ArtifactError(
            f"{source} has other weights than the bundle was made from (sha256 differs); "
            "give the checkpoint that it was made from with --source, or export again"
        )
    return module
