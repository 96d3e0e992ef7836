"""`lfx.json`, the manifest of a bundle: signature, source, validation and the digest of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lfx.checks import NUMBER, check_shape, parse_json, shown
from lfx.errors import ArtifactError
from lfx.signature import Signature

FORMAT_VERSION = 1
MANIFEST = "lfx.json"
MODEL = "model.onnx"
ENCODER_MODEL = "encoder_model.onnx"  # in place of MODEL in the bundle of a model that writes texts
WEIGHTS = "model.onnx.data"
LAYOUT_FOLDER = "onnx"  # of the ONNX files of a bundle in the layout of the hub
# The key of the digest of all other fields.
_DIGEST = "manifest_sha256"
MAX_JSON_BYTES = 64_000_000
_PART_BYTES = 1 << 20  # number of bytes that are hashed at a time
# The fields of a manifest besides the signature's; see `lfx.checks.check_shape`. A measured error is a number and never
# null: the export fails when an error is not finite.
_MEASURED = {"max_abs_error": NUMBER, "tolerance": NUMBER}
QUANTIZATION: dict[str, Any] = {
    "activations?": str,
    "weight_bits?": int,
    "layers?": {"*": {"scale": NUMBER, "zero_point": int}},
    "accuracy?": {
        "reference": str,
        "outputs": {
            "*": {
                **_MEASURED,
                "unfused_max_abs_error": NUMBER,
                "cosine": NUMBER,
                "label_agreement?": NUMBER,
                "max_abs_value?": NUMBER,
            }
        },
        "texts?": {"texts": int, "text_agreement": NUMBER, "tokens": int, "token_agreement": NUMBER},
    },
}
FILE = {"sha256": str, "bytes": int}
_MANIFEST: dict[str, Any] = {
    "opset": int,
    "inlined": bool,
    "model_file?": str,
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
        signature: inputs, outputs and limits of the model.
        opset: version of the default ONNX domain, 17 to 23.
        source: {"model": hub id, folder or class name, "kind": "hub", "folder" or "module", "sha256": of the weights}.
        versions: package name -> version at export.
        inlined: whether the lfx functions are inlined, so that the graph has no attention nodes.
        model_file: path of the ONNX file in the bundle; in the layout of the hub `onnx/model.onnx`.
        validation: errors measured against PyTorch at export; see `lfx.parity.Report.to_dict`.
        files: name -> {"sha256", "bytes"} of every other file of the bundle.
        quantization: settings and measured accuracy of an int8 bundle, see `lfx.export.quantize`; else empty.
    """

    signature: Signature
    opset: int
    source: dict[str, Any]
    versions: dict[str, str]
    inlined: bool = False
    model_file: str = MODEL
    validation: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of `lfx.json`, which `lfx inspect --json` prints too."""
        return sealed(
            {
                "format_version": FORMAT_VERSION,
                **self.signature.to_dict(),
                "opset": self.opset,
                "inlined": self.inlined,
                **({"model_file": self.model_file} if self.model_file != MODEL else {}),
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
            path.relative_to(bundle).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(bundle.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        text = json.dumps(dataclasses.replace(self, files=files).to_dict(), indent=1)
        (bundle / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Read `lfx.json` of a bundle; no other file is read.

        Raises:
            ArtifactError: there is no bundle, or its manifest is truncated, changed or of another format.
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
        return cls.parse(read_limited(path, MAX_JSON_BYTES, _cure(bundle)), path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Manifest:
        """Parse the bytes of a manifest.

        Args:
            path: path of the manifest, for messages.
        Raises:
            ArtifactError: the manifest is truncated, changed or of another format.
        """
        data, signature = parse_sealed(content, path, ("format_version", FORMAT_VERSION), _MANIFEST, _cure(path.parent))
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        return cls(signature=signature, **fields)

    def verify(self, bundle: Path, names: Collection[str] | None = None) -> dict[str, Path]:
        """Compare the files of the bundle with their digests.

        Args:
            names: compare these files alone, those of them that `files` has.
        Returns:
            Name -> the regular file that was hashed: the file of that name, or the file that a link of that name points
            to.
        Raises:
            ArtifactError: a file is missing, truncated, changed or outside the bundle.
        """
        if names is None and self.model_file not in self.files:
            raise ArtifactError(f"{bundle / MANIFEST} lists no {self.model_file}; export the model again")
        digests: dict[tuple[int, int], str] = {}  # many names may be links to one large file
        return {
            name: self._verified(bundle.resolve(), name, entry, digests)
            for name, entry in self.files.items()
            if names is None or name in names
        }

    def _verified(self, bundle: Path, name: str, entry: Mapping[str, Any], digests: dict[tuple[int, int], str]) -> Path:
        path = bundle / name
        if str(PurePosixPath(name)) != name:
            raise ArtifactError(f"{bundle / MANIFEST} names {shown(name)}; write the path without '.' and empty parts")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{bundle / MANIFEST} names {name!r}, which is outside the bundle")
        try:
            folder, file = path.parent.resolve(), path.resolve()
            is_file = file.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a cycle of links
            raise ArtifactError(f"{bundle / MANIFEST} names {name!r}, which cannot be opened: {error}") from error
        if not is_file:
            raise ArtifactError(f"{path} is missing; {_cure(bundle)}")
        if folder != path.parent:
            raise ArtifactError(f"{path.parent} is a link; a bundle's files may be links, and its folders may not")
        status = file.stat()
        size, inode = status.st_size, (status.st_dev, status.st_ino)
        if size != entry["bytes"]:
            raise ArtifactError(f"{path} has {size} bytes where {MANIFEST} says {entry['bytes']}; {_cure(bundle)}")
        try:
            if inode not in digests:
                digests[inode] = sha256(file, size)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}; make it readable") from error
        if digests[inode] != entry["sha256"]:
            raise ArtifactError(f"{path} was changed after the export (sha256 differs); {_cure(bundle)}")
        return file


def _cure(bundle: Path) -> str:
    """What to do about a broken file of a bundle, which may be in the cache of huggingface_hub."""
    # CACHE/models--ORG--NAME/snapshots/COMMIT has links to files in CACHE/models--ORG--NAME/blobs.
    snapshots = bundle.absolute().parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return f"remove {snapshots.parent}, so that it is fetched again"
    return "export the model again"


def locate(path: Path) -> tuple[Path | None, Path]:
    """Find the bundle and the ONNX file that a path names.

    Args:
        path: a bundle's folder, an .onnx file, or the model.onnx or encoder_model.onnx of a bundle, which names it.
    Returns:
        The folder of the bundle, or None for an .onnx file outside a bundle; and the ONNX file. The content of a folder
        is not checked.
    Raises:
        ArtifactError: the path is another type of file, or the system cannot look it up.
    """
    try:
        is_file = path.is_file()
        in_bundle = is_file and path.name in (MODEL, ENCODER_MODEL) and (path.parent / MANIFEST).is_file()
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
    """Add the digest of all fields of a JSON object to it; the order of the fields does not matter."""
    fields = {key: value for key, value in data.items() if key != _DIGEST}
    return {**fields, _DIGEST: hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}


def read_limited(path: Path, max_bytes: int, cure: str) -> bytes:
    """Read a file of at most `max_bytes`, up to the size that it reports, since a file of /proc may have no end.

    Args:
        cure: what to do about a broken file; the end of the message.
    Raises:
        ArtifactError: the file cannot be read, or has more bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, max_bytes + 1))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; {cure}") from error
    if len(content) > max_bytes:
        raise ArtifactError(f"{path} has more than {max_bytes:,} bytes; {cure}")
    return content


def parse_sealed(
    content: bytes, path: Path, version: tuple[str, int], shape: dict[str, Any], cure: str
) -> tuple[dict[str, Any], Signature]:
    """Parse a JSON object written with `sealed` that holds a signature and the fields of `shape`.

    Args:
        path: path of the file, for messages.
        version: name of the field of the format version, and the version that this lfx reads.
        shape: types of the fields; see `lfx.checks.check_shape`.
        cure: what to do about a broken file; the end of the message.
    Returns:
        The object, and the signature in it.
    Raises:
        ArtifactError: the content is not JSON, has another format version, was changed, or has a field that is missing,
            of another type or out of range.
    """
    version_key, supported = version
    try:
        data = parse_json(content)
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); {cure}") from error
    file_version = data.get(version_key) if isinstance(data, dict) else None
    if not isinstance(data, dict) or file_version != supported:
        if type(file_version) is int and file_version > supported:
            cure = f"install a newer lfx, or {cure}"
        raise ArtifactError(f"{path} has format version {shown(file_version)}; this lfx reads {supported}: {cure}")
    if data != sealed(data):
        raise ArtifactError(f"{path} was changed after it was written (its {_DIGEST} differs); {cure}")
    signature = Signature.from_dict(data)
    try:
        check_shape(data, shape, str(path))
    except ValueError as error:
        raise ArtifactError(f"{error}; {cure}") from error
    return data, signature


def sha256(path: Path, size: int | None = None) -> str:
    """Hex digest of a file, or of its first `size` bytes; give `size` for a file that may have no end, as in /proc.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size > 0 and (part := file.read(min(size, _PART_BYTES))):
            digest.update(part)
            size -= len(part)
        return digest.hexdigest()
