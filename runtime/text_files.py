"""The files of texts beside a model: the tokenizer's, the labels' and the prompts', where they are and what they hold.

In a bundle, each is compared with its entry in the manifest when it is read.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfx.checks import file_path, parse_json
from lfx.errors import ArtifactError, one_line
from lfx.manifest import LAYOUT_FOLDER, MANIFEST, Manifest

TOKENIZER, CONFIG, TOKENIZER_CONFIG = "tokenizer.json", "config.json", "tokenizer_config.json"
PROMPTS = "config_sentence_transformers.json"
MAX_FILE_BYTES = 1 << 29  # of a tokenizer or a config; the largest known tokenizers have a tenth of that


@dataclass(frozen=True)
class ListedFolder:
    """The bundle of a single .onnx file that is no bundle's own: its folder, or in the layout of the hub the one above.

    Attributes:
        folder: the bundle.
        files: those that its lfx.json lists.
    """

    folder: Path
    files: Mapping[str, Any]

    @classmethod
    def around(cls, model: Path) -> ListedFolder | None:
        """Find and read the bundle of an .onnx file; None if it is in none.

        Raises:
            ArtifactError: the lfx.json is broken.
        """
        folder = folder_around(model)
        files = listed_files(folder)
        return None if files is None else cls(folder, files)


def folder_around(model: Path) -> Path:
    """The folder of the bundle that an .onnx file may be in: its own, or in the layout of the hub the one above."""
    folder = Path(os.path.realpath(model.parent))
    is_layout = folder.name == LAYOUT_FOLDER and os.path.lexists(folder.parent / MANIFEST)
    return folder.parent if is_layout else folder


def text_folder(model: Path, manifest: Any) -> Path:
    """Return the folder of the tokenizer: the bundle, or for a plan the bundle of that name in the plan's folder.

    If there is no such bundle, the folder of the plan or the .onnx file is returned. The bundle of an .onnx file in the
    layout of the hub is the folder around it.

    Args:
        model: the bundle, the .onnx file or the plan.
        manifest: `text_source` of an Engine that opened it.
    Raises:
        ArtifactError: the bundle of that name is not the one that the plan was built from.
    """
    return text_files(model, manifest)[0]


def text_files(model: Path, manifest: Any) -> tuple[Path, Mapping[str, Any] | None]:
    """Return `text_folder`, and the files that the manifest of the bundle lists which an Engine has opened.

    The files are those of that manifest, not of the lfx.json in the folder, which may have been replaced. For a folder
    that is no such bundle they are None.
    """
    if isinstance(manifest, ListedFolder):
        return manifest.folder, manifest.files
    if isinstance(manifest, Manifest):
        return (model if model.is_dir() else model.parent), manifest.files
    if model.is_dir():
        return model, None
    recorded = getattr(manifest, "bundle", None)
    if not recorded:
        return folder_around(model) if manifest is None else model.parent, None
    bundle = file_path(model.parent / Path(str(recorded.get("name", ""))).name, "the bundle that the plan names")
    if not bundle.is_dir():
        return model.parent, None
    data = read_file(bundle / MANIFEST)
    if data is None or hashlib.sha256(data).hexdigest() != recorded["sha256"]:
        raise ArtifactError(
            f"{bundle} is not the bundle that {model} was built from, so its tokenizer and labels may be others; build "
            "the plan again, or move it to another folder and give --tokenizer"
        )
    return bundle, Manifest.parse(data, bundle / MANIFEST).files


def listed_files(folder: Path) -> Mapping[str, Any] | None:
    """The files that a bundle's manifest lists; None if the folder is no bundle."""
    return Manifest.read(folder).files if os.path.lexists(folder / MANIFEST) else None


def read_listed(path: Path, listed: Mapping[str, Any] | None) -> bytes | None:
    """`read_file`, and compare the content with the entry of a manifest.

    Args:
        listed: the files of the manifest; None = the file is read as it is.
    Raises:
        ArtifactError: the manifest does not list the file, or the file was changed after the export.
    """
    if listed is None:
        return read_file(path)
    entry = listed.get(path.name)
    if entry is None and os.path.lexists(path):
        raise ArtifactError(
            f"{path} is not listed in {MANIFEST}, so its content cannot be checked; remove it, or name the folder "
            "with --tokenizer"
        )
    data = read_file(path)
    if entry is not None and hashlib.sha256(data or b"").hexdigest() != entry["sha256"]:
        raise ArtifactError(
            f"{path} was changed after the export (sha256 differs), or the bundle was replaced since it was opened; "
            "open it again, or export the model again"
        )
    return data


def read_file(path: Path) -> bytes | None:
    """Read a file of a bundle; None if it does not exist.

    Raises:
        ArtifactError: the path is no regular file, cannot be read, or has more than `MAX_FILE_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} cannot be read: it is no file; export the model again")
        if status.st_size > MAX_FILE_BYTES:
            raise ArtifactError(
                f"{path} has {status.st_size:,} bytes, above the {MAX_FILE_BYTES:,} that lfx reads; export the "
                "model again"
            )
        with path.open("rb") as file:  # no more than its size, since a file of /proc may have no end
            return file.read(status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {one_line(error)}; export the model again") from error


def json_object(data: bytes | None, path: Path) -> dict[str, Any]:
    """Parse a file's JSON object; an empty one if the file does not exist.

    Args:
        data: content of the file, or None.
        path: path of the file, for messages.
    Raises:
        ArtifactError: the file holds no JSON object.
    """
    if data is None:
        return {}
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({one_line(error)}); export the model again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds {type(value).__name__}, not a JSON object; export the model again")
    return value
