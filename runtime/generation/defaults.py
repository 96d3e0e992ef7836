"""Reads the defaults of a checkpoint's generation: generation_config.json, or the entries of an old config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfx.errors import ArtifactError
from lfx.runtime.generation.settings import CONFIG_FILE, CONFIG_OPTIONS
from lfx.runtime.plan import PlanManifest
from lfx.runtime.text_files import CONFIG, json_object, listed_files, read_listed, text_files


def defaults_of(model: Path, manifest: Any) -> dict[str, Any]:
    """The defaults of a model's options: those of its bundle, or those that a plan was built with.

    Args:
        model: path of the bundle, ONNX file or plan.
        manifest: `text_source` of an Engine that opened it.
    Raises:
        ArtifactError: see `read_defaults`.
    """
    if isinstance(manifest, PlanManifest) and manifest.decoder_plan is not None:
        return manifest.decoder_plan.generation
    return read_defaults(*text_files(model, manifest))


def read_defaults(folder: Path, listed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the defaults of a bundle's options.

    Args:
        folder: the bundle, or the folder of a single ONNX file.
        listed: the files of the bundle that an Engine has opened. Default: those that the lfx.json in the folder lists.
    Returns:
        The entries of generation_config.json. If there is no such file, the entries of config.json that are options of
        generation, as old checkpoints have them.
    Raises:
        ArtifactError: both files are missing; or one is broken, was changed after the export, or is not listed in the
            bundle's lfx.json.
    """
    listed = listed_files(folder) if listed is None else listed
    path = folder / CONFIG_FILE
    data = read_listed(path, listed)
    if data is not None:
        return _checked(json_object(data, path), path)
    path = folder / CONFIG
    data = read_listed(path, listed)
    if data is None:
        raise ArtifactError(
            f"{folder} has neither {CONFIG_FILE} nor {CONFIG}, so the token that ends a text is not known; open the "
            "bundle, or copy these files beside the ONNX file"
        )
    config = json_object(data, path)
    defaults = {name: value for name, value in config.items() if name in CONFIG_OPTIONS and value is not None}
    if config.get("force_bos_token_to_be_generated") is True:
        defaults["forced_bos_token_id"] = config.get("bos_token_id")  # as transformers does
    return _checked(defaults, path)


def _checked(entries: dict[str, Any], path: Path) -> dict[str, Any]:
    if "seed" in entries:  # an option of lfx's own, which no checkpoint may set
        raise ArtifactError(f"{path} sets seed, which is no entry of it; remove it, and export the model again")
    return entries
