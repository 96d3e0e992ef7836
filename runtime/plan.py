"""`MODEL.plan.json`, the manifest of a plan: signature, bundle, TensorRT version, target and digest.

A model that writes texts has two plans: `MODEL.plan` is the encoder's, and `MODEL.plan.decoder` the decoder's. One
manifest describes both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from lfx.checks import COUNT, NUMBER, file_path, shown
from lfx.errors import ArtifactError, BuildError
from lfx.files import locked
from lfx.manifest import FILE, MAX_JSON_BYTES, QUANTIZATION, parse_sealed, read_limited, sealed, sha256
from lfx.runtime.profile import DecoderProfile, Profile, Range
from lfx.signature import Signature

PLAN_FORMAT_VERSION = 1
SUFFIX = ".plan"
DECODER_SUFFIX = ".decoder"
_CURE = "build it again with: lfx build-engine"
# The fields of the JSON besides the signature's; see `lfx.checks.check_shape`.
_PLAN: dict[str, Any] = {
    "flavor": str,
    "tensorrt_version": str,
    "target": str,
    "profiles": [{"batch": str, "seqlen": str}],
    "plugin_version": (str, NoneType),
    "attention_nodes": int,
    "plugin_layers": int,
    "bundle": {"name": str, "sha256": str},
    "source": dict,
    "quantization": QUANTIZATION,
    "options": {"workspace_bytes?": COUNT, "optimization_level?": COUNT, "flags?": [str]},
    "versions": {"*": str},
    "conversion": {"outputs?": {"*": {"max_abs_difference": NUMBER, "limit": NUMBER}}},
    "plan": FILE,
    "decoder_plan?": {
        "profiles": [{"batch": str, "tokens": str, "past": str, "seqlen": str}],
        "generation": dict,
        "plan": FILE,
    },
}


@dataclass(frozen=True)
class DecoderPlan:
    """The decoder's plan of a model that writes texts.

    Attributes:
        profiles: one or more optimization profiles, by their index in the plan.
        generation: the checkpoint's defaults of `Engine.generate`, since no file of the bundle may be beside the plan.
        plan: {"sha256", "bytes"} of the plan.
    """

    profiles: tuple[DecoderProfile, ...]
    generation: dict[str, Any]
    plan: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON."""
        axes = [{name: str(size) for name, size in vars(profile).items()} for profile in self.profiles]
        return {"profiles": axes, "generation": self.generation, "plan": self.plan}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderPlan:
        """Read it from JSON types that were checked against `_PLAN`.

        Raises:
            BuildError: a profile is not valid.
        """
        profiles = tuple(
            DecoderProfile(**{name: Range.parse(entry[name], name, int(name != "past")) for name in _AXES})
            for entry in data["profiles"]
        )
        return cls(profiles, data["generation"], data["plan"])


_AXES = tuple(field.name for field in dataclasses.fields(DecoderProfile))


@dataclass(frozen=True)
class PlanManifest:
    """The content of `MODEL.plan.json`.

    Attributes:
        signature: the plan's signature; its precision, max_seqlen and max_global may differ from the bundle's.
        flavor: "tensorrt" or "tensorrt-rtx".
        tensorrt_version: version of the library that built the plan.
        target: compute capability that the plan was built for, such as "sm89".
        profiles: one or more optimization profiles, by their index in the plan.
        plugin_version: version of the lfx plugin; None if the plan does not use it.
        attention_nodes: number of attention nodes of the ONNX graph.
        plugin_layers: number of these that are plugin layers of the plan.
        bundle: {"name", "sha256" of its lfx.json}.
        source: the bundle's, so that `lfx parity` finds the checkpoint.
        quantization: the bundle's; empty unless it is int8.
        options: {"workspace_bytes", "optimization_level", "flags"}, as `Options` of `build_engine` has them.
        versions: package name -> version at build.
        conversion: result of `check_conversion`: differences of the prepared graph's outputs from the bundle's.
        plan: {"sha256", "bytes"} of the plan.
        decoder_plan: the decoder's plan of a model that writes texts; None for other models.
    """

    signature: Signature
    flavor: str
    tensorrt_version: str
    target: str
    profiles: tuple[Profile, ...]
    plugin_version: str | None
    attention_nodes: int
    plugin_layers: int
    bundle: dict[str, Any]
    source: dict[str, Any]
    quantization: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]
    conversion: dict[str, Any]
    plan: dict[str, Any]
    decoder_plan: DecoderPlan | None = None

    @property
    def has_host_code(self) -> bool:
        """Whether TensorRT runs code of the plan on the CPU: a version-compatible plan carries its own runtime."""
        return "VERSION_COMPATIBLE" in self.options.get("flags", [])

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file, which `lfx inspect --json` prints too."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        fields["profiles"] = [{"batch": str(p.batch), "seqlen": str(p.seqlen)} for p in self.profiles]
        if self.decoder_plan is not None:
            fields["decoder_plan"] = self.decoder_plan.to_dict()
        return sealed({"plan_format_version": PLAN_FORMAT_VERSION, **self.signature.to_dict(), **fields})

    def write(self, plan: Path) -> None:
        """Write the JSON beside `plan`."""
        json_path(plan).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, plan: Path) -> PlanManifest:
        """Read the JSON beside a plan; the plan itself is not read.

        Raises:
            ArtifactError: the plan or its JSON does not exist, or the JSON is truncated, changed or of another format.
        """
        path = json_path(plan)
        file_path(path, "plan", ArtifactError)
        if not plan.is_file():
            raise ArtifactError(f"{plan} does not exist; build it with: lfx build-engine BUNDLE")
        if not path.is_file():
            raise ArtifactError(f"{plan} needs {path.name} beside it, which describes the plan; {_CURE}")
        return cls.parse(read_limited(path, MAX_JSON_BYTES, _CURE), path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> PlanManifest:
        """Parse the bytes of a plan's JSON.

        Args:
            path: path of the JSON file, for messages.
        Raises:
            ArtifactError: the JSON is truncated, changed or of another format.
        """
        data, signature = parse_sealed(content, path, ("plan_format_version", PLAN_FORMAT_VERSION), _PLAN, _CURE)
        try:
            profiles = tuple(
                Profile(Range.parse(p["batch"], "batch"), Range.parse(p["seqlen"], "seqlen")) for p in data["profiles"]
            )
            decoder = DecoderPlan.from_dict(data["decoder_plan"]) if "decoder_plan" in data else None
        except BuildError as error:
            raise ArtifactError(f"{path} is broken: {error}") from error
        if not profiles or (decoder is not None and not decoder.profiles):
            raise ArtifactError(f"{path} is broken: it has no profile; {_CURE}")
        if decoder is not None and signature.decoder is None:
            raise ArtifactError(f"{path} is broken: it has a decoder's plan, and no decoder; {_CURE}")
        name = data["bundle"]["name"]  # `lfx run` reads the tokenizer from the folder of this name
        if Path(name).name != name or name in ("", ".."):
            raise ArtifactError(f"{path} is broken: the bundle {shown(name)} is not the name of a folder; {_CURE}")
        fields = {name: data[name] for name in _FIELDS}
        return cls(signature, **{**fields, "profiles": profiles, "decoder_plan": decoder})

    def files(self, plan: Path) -> dict[Path, dict[str, Any]]:
        """Path of the plan, and of the decoder's if there is one -> {"sha256", "bytes"}."""
        if self.decoder_plan is None:
            return {plan: self.plan}
        return {plan: self.plan, decoder_path(plan): self.decoder_plan.plan}

    def verify(self, plan: Path) -> None:
        """Compare the plan, and the decoder's if there is one, with the digests.

        Raises:
            ArtifactError: a plan is missing, truncated, changed or replaced.
        """
        try:
            for file, entry in self.files(plan).items():
                _verify(file, entry, json_path(plan).name)
        except ArtifactError as error:
            if not self._is_current(plan):
                raise replaced(plan) from error
            raise

    def _is_current(self, plan: Path) -> bool:
        try:
            return PlanManifest.read(plan) == self
        except ArtifactError:
            return False


_FIELDS = tuple(
    field.name for field in dataclasses.fields(PlanManifest) if field.name not in ("signature", "decoder_plan")
)


def replaced(plan: Path) -> ArtifactError:
    """The error for a plan that another build has replaced."""
    return ArtifactError(f"{plan} was replaced while it was read; run it again")


def _verify(plan: Path, entry: dict[str, Any], manifest: str) -> None:
    """Compare a plan with {"sha256", "bytes"}.

    Args:
        manifest: name of the JSON, for messages.
    """
    try:
        status = plan.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise ArtifactError(f"{plan} is no file; {_CURE}")
        if (size := status.st_size) != entry["bytes"]:
            raise ArtifactError(
                f"{plan} has {size} bytes where {manifest} says {entry['bytes']}: it is truncated, or another plan; "
                f"{_CURE}"
            )
        digest = sha256(plan, size)
    except OSError as error:
        raise ArtifactError(f"{plan} cannot be read: {error.strerror}; {_CURE}") from error
    if digest != entry["sha256"]:
        raise ArtifactError(f"{plan} was changed after the build (sha256 differs); {_CURE}")


def publish(built: Path, plan: Path) -> None:
    """Rename a new plan and its other files to their final names, under a lock, so that all come from one process.

    The decoder's plan of an older build is removed if the new one has none.

    Raises:
        OSError: they cannot be renamed.
    """
    decoder, is_stale = decoder_path(plan), False
    with locked(plan):
        if decoder_path(built).exists():
            decoder_path(built).replace(decoder)
        else:
            with contextlib.suppress(ArtifactError):  # there is no older plan, or its JSON is broken
                is_stale = decoder in PlanManifest.read(plan).files(plan)
        built.replace(plan)
        json_path(built).replace(json_path(plan))
        if is_stale:
            decoder.unlink(missing_ok=True)


def decoder_path(plan: Path) -> Path:
    """The path of the decoder's plan of a model that writes texts."""
    return plan.with_name(plan.name + DECODER_SUFFIX)


def json_path(plan: Path) -> Path:
    """The path of a plan's JSON."""
    return plan.with_name(plan.name + ".json")
