"""A folder of sentence-transformers: its files, copied for `convert` and `export`, and the checks of its modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lfx.checks import json_text, parse_json
from lfx.errors import ExportError, one_line
from lfx.export.checkpoint import Fetch, check_dtypes
from lfx.export.companions import with_limit
from lfx.export.settings import read_object, without_code
from lfx.files import copy
from lfx.runtime.text_files import PROMPTS

MODULES = "modules.json"
_MODULES_BYTES, _MOST_MODULES = 1_000_000, 100
_CARRIED = ("Pooling", "Normalize", "Dense", "Dropout", "LayerNorm")
_WITH_WEIGHTS = ("Dense", "LayerNorm")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ENCODER = "sentence_bert_config.json"
# Older versions name the settings of the encoder by its family; the first of these that exists counts.
_ENCODERS = (
    _ENCODER,
    *(f"sentence_{name}_config.json" for name in ("roberta", "distilbert", "camembert", "xlm-roberta")),
)


def copy_modules(fetch: Fetch, folder: Path, max_seqlen: int) -> None:
    """Copy the files of sentence-transformers beside a converted encoder; none if the checkpoint has no modules.json.

    Raises:
        ExportError: a module is of a class that lfx does not know, or lies outside the checkpoint's folder; or a file
            is broken.
    """
    path = fetch(MODULES)
    if path is None:
        return
    modules = read_modules(path)
    for module in modules[1:]:
        _copy_module(fetch, folder, module["path"])
    (folder / MODULES).write_text(json_text(modules, indent=2), encoding="utf-8")
    if (path := fetch(PROMPTS)) is not None:
        settings = read_object(path)
        check_function(settings, "activation_fn", path)
        _write(folder / PROMPTS, settings)
    path, encoder = read_settings_of(fetch)
    if path is not None:
        _write(folder / _ENCODER, with_limit(encoder, max_seqlen))


def check_modules(fetch: Fetch) -> None:
    """Check, before the slow steps of an export, that `copy_settings` can read the modules.

    Raises:
        ExportError: modules.json is broken, or a module lies outside the checkpoint's folder.
    """
    if (path := fetch(MODULES)) is not None:
        list_modules(path)


def copy_settings(fetch: Fetch, folder: Path) -> None:
    """Copy the settings of sentence-transformers into a bundle: JSON files only, whatever the classes of the modules.

    Raises:
        ExportError: a module lies outside the checkpoint's folder, or a file is broken.
    """
    names = [_ENCODER, PROMPTS]
    path = fetch(MODULES)
    if path is not None:
        modules = list_modules(path)
        (folder / MODULES).write_text(json_text(modules, indent=2), encoding="utf-8")
        names += [*_ENCODERS[1:], *(f"{module['path']}/config.json" for module in modules if module["path"])]
    for name in names:
        if (path := fetch(name)) is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            _write(folder / name, read_object(path))


def read_settings_of(fetch: Fetch) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the settings of the encoder; None and no settings if there are none."""
    path = next((file for name in _ENCODERS if (file := fetch(name)) is not None), None)
    return path, {} if path is None else read_object(path)


def score_function(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a config.json that say which function a CrossEncoder applies to the logits.

    Raises:
        ExportError: it is not a name in torch.nn.
    """
    old = "sbert_ce_default_activation_function"
    check_function(config, old, path)
    settings = {old: config[old]} if config.get(old) is not None else {}
    scores = config.get("sentence_transformers")
    if isinstance(scores, dict) and "activation_fn" in scores:
        check_function(scores, "activation_fn", path)
        settings["sentence_transformers"] = {"activation_fn": scores["activation_fn"]}
    return settings


def check_function(settings: dict[str, Any], name: str, path: Path) -> None:
    """Check a setting that names a function, which sentence-transformers imports by its name.

    Raises:
        ExportError: it is not a name in torch.nn.
    """
    function = settings.get(name)
    if function is not None and not (isinstance(function, str) and function.startswith("torch.nn.")):
        raise ExportError(f"{path}: {name} {str(function)[:80]!r} is no class of torch.nn; remove it")


def list_modules(path: Path) -> list[dict[str, Any]]:
    """Read a modules.json; each module has a path, which is empty or names a folder beside the file.

    Raises:
        ExportError: it cannot be read, or a module lies elsewhere, or its class is in a repository of the hub.
    """
    try:
        if path.stat().st_size > _MODULES_BYTES:
            raise ValueError(f"it has more than {_MODULES_BYTES:,} bytes")
        modules = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ExportError(f"{path} is no list of modules; save the model again with sentence-transformers")
    if len(modules) > _MOST_MODULES:
        raise ExportError(f"{path} has {len(modules):,} modules; at most {_MOST_MODULES} are read")
    for i, module in enumerate(modules):
        where = module.get("path")
        if not isinstance(where, str) or not re.fullmatch(r"(\w[\w.-]*)?", where, re.ASCII):
            raise ExportError(f"{path}: module {i} has the path {str(where)[:80]!r}; give a folder beside modules.json")
        if not re.fullmatch(r"[\w.]*", name := str(module.get("type")), re.ASCII):  # such as org/repository--file.Class
            raise ExportError(f"{path}: module {i} is {name[:80]!r}, which may be code of the hub; name a class")
    return modules


def class_name(module: dict[str, Any]) -> str:
    """Return the class of a module without its package; empty if it is none of sentence-transformers."""
    package, _, name = str(module.get("type")).rpartition(".")
    return name if package.partition(".")[0] == "sentence_transformers" else ""


def read_modules(path: Path) -> list[dict[str, Any]]:
    """`list_modules`, of classes that lfx knows: an encoder beside the file, and modules in folders.

    Raises:
        ExportError: a module is of another class or in another place.
    """
    modules = list_modules(path)
    for i, module in enumerate(modules):
        where = module["path"]
        if class_name(module) not in (("Transformer",) if i == 0 else _CARRIED):
            raise ExportError(
                f"{path}: module {i} is {str(module.get('type'))[:100]!r}; lfx takes a Transformer of "
                f"sentence_transformers, followed by {', '.join(_CARRIED)}"
            )
        if i == 0 and where:
            raise ExportError(
                f"{path} has the encoder in the folder {where[:80]!r}; load the model with sentence-transformers "
                "and save it again, which puts it beside modules.json"
            )
        if i > 0 and not where:
            raise ExportError(f"{path}: module {i} has an empty path; give a folder beside modules.json")
    return modules


def _copy_module(fetch: Fetch, folder: Path, name: str) -> None:
    target = folder / name
    target.mkdir(exist_ok=True)
    if (path := fetch(f"{name}/config.json")) is not None:
        settings = read_object(path)
        check_function(settings, "activation_function", path)
        _write(target / "config.json", settings)
    copy_weights(fetch, folder, name)


def copy_weights(fetch: Fetch, folder: Path, name: str) -> None:
    """Copy the checked weight file of the module in the folder `name`, if it has one.

    Raises:
        ExportError: the file holds something else than floats, or is broken.
    """
    weights = module_weights(fetch, name)
    if weights is not None:
        copy(weights, folder / name / weights.name)


def has_weights(module: dict[str, Any]) -> bool:
    """Whether a module of modules.json is of a class with weights."""
    return class_name(module) in _WITH_WEIGHTS


def module_weights(fetch: Fetch, name: str) -> Path | None:
    """Return the checked weight file of the module in the folder `name`; None if it has none.

    Raises:
        ExportError: the file holds something else than floats, or is broken.
    """
    weights = next((file for kind in _WEIGHTS if (file := fetch(f"{name}/{kind}")) is not None), None)
    if weights is not None:
        check_dtypes(weights)
    return weights


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json_text(without_code(settings), indent=2) + "\n", encoding="utf-8")
