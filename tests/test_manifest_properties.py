"""Random manifests, plan JSON and metadata of models: they are read, or are an ArtifactError."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfx.cli.inspect import rows
from lfx.errors import ArtifactError
from lfx.manifest import FORMAT_VERSION, MODEL, Manifest, sealed
from lfx.runtime.plan import PLAN_FORMAT_VERSION, PlanManifest
from lfx.runtime.profile import Profile, Range
from lfx.signature import Signature
from tests.test_manifest import MANIFEST_VALUE, SIGNATURE

PATH = Path("lfx.json")
ENTRY = {"sha256": "0" * 64, "bytes": 5}
QUANTIZATION = {
    "activations": "uint8",
    "weight_bits": 7,
    "layers": {"encoder.layer.0.output.dense": {"scale": 0.1, "zero_point": 3}},
    "accuracy": {
        "reference": "float32",
        "outputs": {
            "logits": {
                "max_abs_error": 0.1,
                "unfused_max_abs_error": 0.1,
                "tolerance": 0.2,
                "cosine": 0.99,
                "label_agreement": 1.0,
            }
        },
    },
}
MANIFEST_DATA = {**MANIFEST_VALUE.to_dict(), "files": {MODEL: ENTRY}, "quantization": QUANTIZATION}
PLAN_DATA = PlanManifest(
    signature=SIGNATURE,
    flavor="tensorrt",
    tensorrt_version="10.14",
    target="sm89",
    profiles=(Profile(Range(1, 1, 8), Range(1, 128, 4096)),),
    plugin_version="1",
    attention_nodes=2,
    plugin_layers=2,
    bundle={"name": "b", "sha256": "0" * 64},
    source={"model": "m", "kind": "folder", "sha256": "0" * 64},
    quantization={},
    options={"flags": []},
    versions={"onnx": "1"},
    conversion={"checked": True, "outputs": {"logits": {"max_abs_difference": 0.1, "limit": 0.2}}},
    plan=ENTRY,
).to_dict()

numbers = st.one_of(st.integers(-5, 5), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *path) for key, inner in items for path in paths(inner))]


@st.composite
def spoiled(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with one to three of its values replaced or removed."""
    data = json.loads(json.dumps(copy.deepcopy(original)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(data)[1:]))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()) and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(json_values)
        if not paths(data)[1:]:
            break
    return data


def parse_manifest(data: Any) -> Manifest | None:
    try:
        return Manifest.parse(json.dumps(sealed(data)).encode(), PATH)
    except ArtifactError as error:
        assert "\n" not in str(error)
        return None


def parse_plan(data: Any) -> PlanManifest | None:
    try:
        return PlanManifest.parse(json.dumps(sealed(data)).encode(), PATH)
    except ArtifactError as error:
        assert "\n" not in str(error)
        return None


@given(spoiled(MANIFEST_DATA))
def test_a_manifest_with_changed_values_is_refused_or_usable(data: dict[str, Any]) -> None:
    manifest = parse_manifest({**data, "format_version": FORMAT_VERSION})
    if manifest is not None:
        assert all(isinstance(cell, str) for row in rows(manifest) for cell in row)
        json.dumps(manifest.to_dict())


@pytest.mark.slow
@given(spoiled(PLAN_DATA))
def test_a_plan_s_json_with_changed_values_is_refused_or_usable(data: dict[str, Any]) -> None:
    manifest = parse_plan({**data, "plan_format_version": PLAN_FORMAT_VERSION})
    if manifest is not None:
        assert all(isinstance(cell, str) for row in rows(manifest) for cell in row)
        json.dumps(manifest.to_dict())


@given(json_values)
def test_any_json_is_a_manifest_or_refused(value: Any) -> None:
    fields = value if isinstance(value, dict) else {"x": value}
    parse_manifest({**fields, "format_version": FORMAT_VERSION})
    parse_plan({**fields, "plan_format_version": PLAN_FORMAT_VERSION})


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes) -> None:
    for parse in (Manifest.parse, PlanManifest.parse):
        try:
            parse(content, PATH)
        except ArtifactError:
            continue
        raise AssertionError("it was taken")


@given(spoiled(SIGNATURE.to_dict()))
def test_a_signature_with_changed_values_is_refused_or_read_unchanged(data: dict[str, Any]) -> None:
    try:
        signature = Signature.from_dict(data)
    except ArtifactError:
        return
    stored = json.loads(json.dumps(signature.to_dict()))
    assert {key: stored[key] for key in data if key in stored} == {key: data[key] for key in data if key in stored}


def test_the_unchanged_files_are_read() -> None:
    manifest, plan = parse_manifest(MANIFEST_DATA), parse_plan(PLAN_DATA)
    assert manifest is not None
    assert plan is not None
    assert Signature.from_dict(SIGNATURE.to_dict()) == SIGNATURE
