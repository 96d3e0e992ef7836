"""A plan and its JSON: what was built, from what, for which machine, and whether the file is still that."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from lfx.checks import COUNT, NUMBER, check_shape, file_path, shown
from lfx.errors import ArtifactError, BuildError
from lfx.files import locked
from lfx.manifest import FILE, QUANTIZATION, parse_sealed, read_json_file, sealed, sha256
from lfx.runtime.profile import Profile, Range
from lfx.signature import Signature

PLAN_FORMAT_VERSION = 1
SUFFIX = ".plan"
_AGAIN = "build it again with: lfx build-engine"
# What the JSON holds beside the signature; see `lfx.checks.check_shape`.
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
}


@dataclass(frozen=True)
class PlanManifest:
    """The content of `MODEL.plan.json`.

    Attributes:
        signature: of the model as the plan takes it: its precision, its longest sequence, its global slots.
        flavor: "tensorrt" or "tensorrt-rtx".
        tensorrt_version: of the library that built the plan.
        target: compute capability that it was built for, such as "sm89".
        profiles: ranges of shapes, tuned for one each.
        plugin_version: of the lfx plugin, None where the plan does not use it.
        attention_nodes: attention nodes of the ONNX graph; plugin_layers: how many of them are plugin layers.
        bundle: {"name", "sha256" of its lfx.json}. source: that bundle's, so that `lfx parity` finds the checkpoint.
        quantization: of the bundle, where it is int8; else empty.
        conversion: what the check of the precision conversion measured; empty where nothing was converted.
        plan: {"sha256", "bytes"} of the plan.
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

    def to_dict(self) -> dict[str, Any]:
        """The JSON that stands beside the plan, and that `lfx inspect --json` prints."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "signature"}
        fields["profiles"] = [{"batch": str(p.batch), "seqlen": str(p.seqlen)} for p in self.profiles]
        return sealed({"plan_format_version": PLAN_FORMAT_VERSION, **self.signature.to_dict(), **fields})

    def write(self, plan: Path) -> None:
        """Write the JSON beside `plan`."""
        json_path(plan).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, plan: Path) -> PlanManifest:
        """Read the JSON beside a plan; the plan itself is not looked at.

        Raises:
            ArtifactError: no plan, no JSON, or one that is cut, changed or of another format.
        """
        path = json_path(plan)
        file_path(path, "plan", ArtifactError)
        if not plan.is_file():
            raise ArtifactError(f"{plan} does not exist; build it with: lfx build-engine BUNDLE")
        if not path.is_file():
            raise ArtifactError(f"{plan} has no {path.name} beside it, so nothing says what it is; {_AGAIN}")
        return cls.parse(read_json_file(path, _AGAIN), path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> PlanManifest:
        """The JSON of a plan from the bytes of its file.

        Args:
            path: of the file, for messages.
        Raises:
            ArtifactError: it is cut, changed or of another format.
        """
        data = parse_sealed(content, path, "plan_format_version", PLAN_FORMAT_VERSION, _AGAIN)
        signature = Signature.from_dict(data)
        try:
            check_shape(data, _PLAN, str(path))
            profiles = tuple(
                Profile(Range.parse(p["batch"], "batch"), Range.parse(p["seqlen"], "seqlen")) for p in data["profiles"]
            )
        except ValueError as error:
            raise ArtifactError(f"{error}; {_AGAIN}") from error
        except BuildError as error:
            raise ArtifactError(f"{path} is broken: {error}") from error
        if not profiles:
            raise ArtifactError(f"{path} is broken: it has no profile; {_AGAIN}")
        name = data["bundle"]["name"]  # a tokenizer is read from the folder of this name
        if Path(name).name != name or name == "..":
            raise ArtifactError(f"{path} is broken: the bundle {shown(name)} is no name of a folder; {_AGAIN}")
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)[1:]}
        return cls(signature, **{**fields, "profiles": profiles})

    def verify(self, plan: Path) -> None:
        """Compare the plan with its digest.

        Raises:
            ArtifactError: the plan was cut or changed, or is another one.
        """
        try:
            size, digest = plan.stat().st_size, sha256(plan)
        except OSError as error:
            raise ArtifactError(f"{plan} cannot be read: {error.strerror}; {_AGAIN}") from error
        if size != self.plan["bytes"]:
            raise ArtifactError(
                f"{plan} has {size} bytes where {json_path(plan).name} says {self.plan['bytes']}: "
                "it is cut, or another plan; build it again with: lfx build-engine"
            )
        if digest != self.plan["sha256"]:
            raise ArtifactError(
                f"{plan} was changed after the build (sha256 differs); build it again with: lfx build-engine"
            )


def publish(built: Path, plan: Path) -> None:
    """Give a plan and its JSON their names; of several processes that do so at once, one gives both.

    Raises:
        OSError: they cannot be renamed.
    """
    with locked(plan):
        built.replace(plan)
        json_path(built).replace(json_path(plan))


def json_path(plan: Path) -> Path:
    """Where the JSON of a plan stands."""
    return plan.with_name(plan.name + ".json")
