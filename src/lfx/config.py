"""What export and runtime agree on: tasks, and `lfx.json`, the manifest of a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from lfx.checks import check_shape, parse_json, shown
from lfx.errors import ArtifactError

FORMAT_VERSION = 1
MANIFEST = "lfx.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
PRECISIONS = ("fp32", "fp16", "bf16")
QUANTIZED = "int8"  # what `lfx quantize` makes of an fp32 bundle
OPSETS = (17, 23)
GLOBAL_MODES = ("mask", "first", "none")
# How the exporter ends the names of two kinds of node; see `export.graph` and `runtime.freeze`.
GLOBAL_SLOTS, GLOBAL_ROWS = "#global_slots", "#global_rows"
# The key under which the manifest carries the digest of all its other fields.
_DIGEST = "manifest_sha256"
GRAPH_INPUTS = ("input_ids", "attention_mask", "global_attention_mask")
_LARGEST = 2**63 - 1
_LARGEST_JSON = 64_000_000  # bytes
NUMBER, COUNT = (int, float), (int, NoneType)
_TENSORS = [{"name": str, "dtype": str, "shape": [(int, str)]}]
# What the JSON of a signature and of a manifest holds; see `lfx.checks.check_shape`.
_SIGNATURE: dict[str, Any] = {
    "architecture": str,
    "task": str,
    "precision": str,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "attention_windows": [int],
    "default_global?": str,
    "global_attention?": str,
    "max_seqlen?": COUNT,
    "vocab_size?": COUNT,
    "max_global?": COUNT,
    "pad_token_id?": int,
    "sep_token_id?": COUNT,
    "ignores_padding?": bool,
    "lfx_version?": str,
}
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
class Task:
    """One task of Hugging Face's.

    Attributes:
        auto_class: the transformers class that loads it.
        architecture: the class name that a checkpoint's config carries.
        default_global: which tokens attend globally when the caller gives no mask, as Hugging Face decides it:
            "none", "first" (the first token), "question" (before the first separator) or "after_question"
            (behind the second separator).
    """

    auto_class: str
    architecture: str
    default_global: str


TASKS: dict[str, Task] = {
    "feature-extraction": Task("AutoModel", "LongformerModel", "none"),
    "fill-mask": Task("AutoModelForMaskedLM", "LongformerForMaskedLM", "none"),
    "text-classification": Task("AutoModelForSequenceClassification", "LongformerForSequenceClassification", "first"),
    "token-classification": Task("AutoModelForTokenClassification", "LongformerForTokenClassification", "none"),
    "question-answering": Task("AutoModelForQuestionAnswering", "LongformerForQuestionAnswering", "question"),
    "multiple-choice": Task("AutoModelForMultipleChoice", "LongformerForMultipleChoice", "after_question"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ONNX name, numpy dtype name, and axes as sizes or names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """What a runtime must know of a model to feed it; stored in the bundle and in the ONNX file itself.

    Attributes:
        max_seqlen: longest sequence in tokens; None = no limit.
        vocab_size: ids are 0 to vocab_size - 1; None = not checked.
        max_global: most global tokens a row may have; None = no limit.
        default_global: what happens when the caller gives no global_attention_mask: see `Task`, or "required": it is
            an error, since the model follows a rule of its own that lfx does not know.
        attention_windows: one-sided window of each layer, tokens.
        ignores_padding: whether padding behind a sequence leaves its outputs what they are. Where it does not, only
            sequences of one length run together.
    """

    architecture: str
    task: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention_windows: tuple[int, ...]
    default_global: str = "none"
    global_attention: str = "mask"
    max_seqlen: int | None = None
    vocab_size: int | None = None
    max_global: int | None = None
    pad_token_id: int = 1
    sep_token_id: int | None = None
    ignores_padding: bool = True
    lfx_version: str = ""

    @property
    def may_pad(self) -> bool:
        """Whether sequences of different lengths may be padded into one batch: masked, and without being looked at."""
        return self.ignores_padding and any(spec.name == "attention_mask" for spec in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Signature:
        """Raises: ArtifactError: a field is missing, of another type or out of range."""
        try:
            check_shape(data, _SIGNATURE, "the model's signature")
        except ValueError as error:
            raise ArtifactError(f"{error}; export the model again") from error
        names = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        for key in ("inputs", "outputs"):
            values[key] = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in values[key])
        values["attention_windows"] = tuple(values["attention_windows"])
        signature = cls(**values)
        signature._check_choices()
        signature._check_ranges()
        return signature

    def _check_choices(self) -> None:
        for name, allowed in (
            ("task", TASKS),
            ("precision", (*PRECISIONS, QUANTIZED)),
            ("global_attention", GLOBAL_MODES),
            ("default_global", {"required", *(task.default_global for task in TASKS.values())}),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ArtifactError(f"{name} {value!r} is not one that this lfx knows; export the model again")

    def _check_ranges(self) -> None:
        ids = self.vocab_size if self.vocab_size is not None else _LARGEST
        for name, value, low, high in (
            *(("attention_windows", window, 1, _LARGEST) for window in self.attention_windows),
            ("max_seqlen", self.max_seqlen, 1, _LARGEST),
            ("vocab_size", self.vocab_size, 1, _LARGEST),
            ("max_global", self.max_global, 1, _LARGEST),
            ("pad_token_id", self.pad_token_id, 0, ids - 1),
            ("sep_token_id", self.sep_token_id, -_LARGEST, _LARGEST),
        ):
            if value is not None and not low <= value <= high:
                raise ArtifactError(f"{name} {value} is out of range, {low} to {high}; export the model again")
        for group in (self.inputs, self.outputs):
            if not group or len({spec.name for spec in group}) < len(group):
                raise ArtifactError("the model's inputs or outputs are none, or named twice; export the model again")


def is_multi_label(signature: Signature, problem_type: Any) -> bool:
    """Whether each class of a head is a decision of its own; `problem_type` of the checkpoint's config."""
    return signature.task == "text-classification" and problem_type == "multi_label_classification"


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
        if sha256(file) != entry["sha256"]:
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


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_fields() -> dict[str, str]:
    """What Linux says of the CPU, by /proc/cpuinfo's names; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The CPU of this machine and the vector instructions that decide its speed, for records."""
    fields = cpu_fields()
    flags = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in fields.get("flags", "").split()]
    return fields.get("model name", platform.processor() or "unknown") + (f" ({', '.join(flags)})" if flags else "")


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
    """Hex digest of a file.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; make it readable") from error
