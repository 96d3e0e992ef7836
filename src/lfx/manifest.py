"""`lfx.json`, the manifest of a bundle: what was exported, from what, and the digest of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lfx.checks import NUMBER, check_shape, parse_json, shown
from lfx.errors import ArtifactError
from lfx.signature import Signature

FORMAT_VERSION = 1
MANIFEST = "lfx.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
# The key under which the manifest carries the digest of all its other fields.
_DIGEST = "manifest_sha256"
_LARGEST_JSON = 64_000_000  # bytes
# What the JSON of a manifest holds beside the signature; see `lfx.checks.check_shape`.
# Errors that are no numbers are null; those that passed are numbers.
_MEASURED = {"max_abs_error": NUMBER, "tolerance": NUMBER}
QUANTIZATION: dict[str, Any] = {
    "activations?": str,
    "weight_bits?": int,
    "layers?": {"*": {"scale": NUMBER, "zero_point": int}},
    "accuracy?": {
        "reference": str,
        "outputs": {"*": {**_MEASURED, "unfused_max_abs_error": NUMBER, "cosine": NUMBER, "label_agreement?": NUMBER}},
    },
}
FILE = {"sha256": str, "bytes": int}
_MANIFEST: dict[str, Any] = {
    "opset": int,
    "inlined": bool,
    "source": dict,
    "versions": dict,
    "validation": {"outputs?": {"*": {**_MEASURED, "torch_max_abs_error": NUMBER}}},
    "quantization?": QUANTIZATION,
    "files": {"*": FILE},
}


@dataclass(frozen=True)
class Manifest:
    """The content of `lfx.json`.

    Attributes:
        source: {"model": hub id, folder or class name, "kind": "hub", "folder" or "module", "sha256": of the weights}.
        versions: package name -> version, of the export.
        validation: what the export measured against PyTorch; see `lfx.parity.Report.to_dict`.
        files: name -> {"sha256", "bytes"}, of every other file of the bundle.
        quantization: of an int8 bundle what `lfx quantize` did and measured: see `lfx.export.quantize`; else empty.
    """

    signature: Signature
    opset: int
    source: dict[str, Any]
    versions: dict[str, str]
    inlined: bool = False
    validation: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that `lfx.json` holds and `lfx inspect --json` prints."""
        return sealed(
            {
                "format_version": FORMAT_VERSION,
                **self.signature.to_dict(),
                "opset": self.opset,
                "inlined": self.inlined,
                "source": self.source,
                "versions": self.versions,
                "validation": self.validation,
                **({"quantization": self.quantization} if self.quantization else {}),
                "files": self.files,
            }
        )

    def write(self, bundle: Path) -> None:
        """Write `lfx.json` with the digest of every other file in `bundle`."""
        files = {
            str(path.relative_to(bundle)): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(bundle.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        text = json.dumps(dataclasses.replace(self, files=files).to_dict(), indent=1)
        (bundle / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Read `lfx.json` of a bundle; the other files are not looked at.

        Raises:
            ArtifactError: no bundle, or a manifest that is cut, changed or of another format.
        """
        path = bundle / MANIFEST
        try:
            exists, is_file = bundle.exists(), path.is_file()
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{bundle} cannot be opened: {error}") from error
        if not exists:
            raise ArtifactError(f"{bundle} does not exist; make a bundle with: lfx export --model MODEL")
        if not is_file:
            raise ArtifactError(f"{bundle} is no bundle: it has no {MANIFEST}; make one with: lfx export")
        return cls.parse(read_json_file(path, "export the model again"), path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Manifest:
        """A manifest from the bytes of its file.

        Args:
            path: of the file, for messages.
        Raises:
            ArtifactError: it is cut, changed or of another format.
        """
        data = parse_sealed(content, path, "format_version", FORMAT_VERSION, "export the model again")
        signature = Signature.from_dict(data)
        try:
            check_shape(data, _MANIFEST, str(path))
        except ValueError as error:
            raise ArtifactError(f"{error}; export the model again") from error
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        return cls(signature=signature, **fields)

    def verify(self, bundle: Path) -> dict[str, Path]:
        """Compare every file of the bundle with its digest.

        Returns:
            Name -> the plain file that was compared, which a link of that name leads to.
        Raises:
            ArtifactError: a file is missing, cut or changed, or outside the bundle.
        """
        if MODEL not in self.files:
            raise ArtifactError(f"{bundle / MANIFEST} lists no {MODEL}; export the model again")
        return {name: self._verified(bundle.resolve(), name, entry) for name, entry in self.files.items()}

    def _verified(self, bundle: Path, name: str, entry: Mapping[str, Any]) -> Path:
        path = bundle / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{bundle / MANIFEST} names {name!r}, which is outside the bundle")
        try:
            folder, file = path.parent.resolve(), path.resolve()
            is_file = file.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # the last for links in a circle
            raise ArtifactError(f"{bundle / MANIFEST} names {name!r}, which cannot be opened: {error}") from error
        if not is_file:
            raise ArtifactError(f"{path} is missing; export the model again")
        if folder != path.parent:
            raise ArtifactError(f"{path.parent} is a link; a bundle's files may be links, and its folders may not")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(
                f"{path} has {size} bytes where {MANIFEST} says {entry['bytes']}; export the model again"
            )
        try:
            digest = sha256(file)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}; make it readable") from error
        if digest != entry["sha256"]:
            raise ArtifactError(f"{path} was changed after the export (sha256 differs); export the model again")
        return file


def locate(path: Path) -> tuple[Path | None, Path]:
    """The bundle and the ONNX file that `path` stands for.

    Args:
        path: a bundle, or an .onnx file; the model.onnx of a bundle stands for the bundle.
    Returns:
        The bundle's folder, None for an ONNX file without one; and the ONNX file. A folder is not looked into.
    Raises:
        ArtifactError: another kind of file, or a path that cannot be looked at.
    """
    try:
        is_file = path.is_file()
        in_bundle = is_file and path.name == MODEL and (path.parent / MANIFEST).is_file()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be opened: {error}; make a bundle with: lfx export") from error
    if not is_file:
        return path, path / MODEL
    if path.suffix == ".plan":
        raise ArtifactError(f"{path} is a plan; this needs the bundle that it was built from")
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path} is neither a bundle nor an .onnx file; make a bundle with: lfx export")
    return (path.parent if in_bundle else None), path


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of all its fields but that one, whatever their order."""
    fields = {key: value for key, value in data.items() if key != _DIGEST}
    return {**fields, _DIGEST: hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}


def read_json_file(path: Path, cure: str) -> bytes:
    """The bytes of a JSON file of ours.

    Raises:
        ArtifactError: it cannot be read, or is too large to be one; ends with `cure`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; {cure}") from error
    if len(content) > _LARGEST_JSON:
        raise ArtifactError(f"{path} has more than {_LARGEST_JSON:,} bytes; {cure}")
    return content


def parse_sealed(content: bytes, path: Path, version_key: str, version: int, cure: str) -> dict[str, Any]:
    """Parse a JSON object that `sealed` made.

    Args:
        path: of its file, for messages.
    Raises:
        ArtifactError: it is no JSON, of another format version, or was changed since; ends with `cure`.
    """
    try:
        data = parse_json(content)
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); {cure}") from error
    found = data.get(version_key) if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != version:
        raise ArtifactError(f"{path} has format version {shown(found)}; this lfx reads {version}: {cure}")
    if data != sealed(data):
        raise ArtifactError(f"{path} was changed after it was written (its {_DIGEST} differs); {cure}")
    return data


def sha256(path: Path) -> str:
    """Hex digest of a file. Raises: OSError: it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
