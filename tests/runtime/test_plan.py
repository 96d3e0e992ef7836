"""A plan and its JSON: both come from one build, and the types in the JSON are checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import ArtifactError
from lfx.files import private_folder
from lfx.manifest import sealed, sha256
from lfx.runtime import verify
from lfx.runtime.plan import PlanManifest, json_path, publish
from lfx.runtime.profile import Profile, Range
from lfx.signature import Signature, TensorSpec

IDS = (TensorSpec("input_ids", "int64", ("batch", "sequence")),)
SIGNATURE = Signature("LongformerModel", "feature-extraction", "fp32", IDS, (TensorSpec("out", "float32", ()),), (8,))


def _write(path: Path, content: bytes) -> None:
    """Write a plan of these bytes and its JSON."""
    path.write_bytes(content)
    PlanManifest(
        signature=SIGNATURE,
        flavor="tensorrt-rtx",
        tensorrt_version="1.0",
        target="sm89",
        profiles=(Profile(Range(1, 1, 8), Range(1, 64, 128)),),
        plugin_version=None,
        attention_nodes=4,
        plugin_layers=0,
        bundle={"name": "model", "sha256": "0" * 64},
        source={"model": "model", "kind": "folder", "sha256": "0" * 64},
        quantization={},
        options={"workspace_bytes": None, "optimization_level": None, "flags": []},
        versions={"numpy": "2"},
        conversion={},
        plan={"sha256": sha256(path), "bytes": len(content)},
    ).write(path)


def test_plans_that_are_published_at_once_keep_their_own_json(tmp_path: Path) -> None:
    plan = tmp_path / "one.plan"

    def build_often(seed: int) -> None:
        for i in range(40):
            with private_folder(tmp_path, plan.name) as private:
                content = hashlib.sha256(f"{seed} {i}".encode()).digest() * (seed + 1)
                _write(private / plan.name, content)
                publish(private / plan.name, plan)

    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            try:
                build_often(seed)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    PlanManifest.read(plan).verify(plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.plan", "one.plan.json"]


def test_a_plan_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    plan = tmp_path / "one.plan"
    for path in (plan, json_path(plan)):
        (tmp_path / f"kept {path.name}").write_text("years of work")
        path.symlink_to(f"kept {path.name}")
    with private_folder(tmp_path, plan.name) as private:
        _write(private / plan.name, b"new")
        publish(private / plan.name, plan)
    PlanManifest.read(plan).verify(plan)
    assert [path.read_text() for path in tmp_path.glob("kept*")] == ["years of work"] * 2


def test_a_plan_that_is_replaced_while_it_is_checked_is_not_called_changed(tmp_path: Path) -> None:
    plan = tmp_path / "one.plan"
    _write(plan, b"plan")
    manifest = PlanManifest.read(plan)
    plan.write_bytes(b"play")
    with pytest.raises(ArtifactError, match="was changed after the build"):
        manifest.verify(plan)
    _write(plan, b"play")
    with pytest.raises(ArtifactError, match=r"one\.plan was replaced while it was read; run it again"):
        manifest.verify(plan)


@pytest.mark.parametrize("name", ["one.plan", "one.plan.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_plan_of_pipes_is_refused(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    plan = tmp_path / "one.plan"
    _write(plan, b"plan")
    manifest = PlanManifest.read(plan)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"one\.plan"):
        verify(plan)
    if name == "one.plan":
        with pytest.raises(ArtifactError, match=r"one\.plan"):
            manifest.verify(plan)  # as for the decoder's plan, at which `read` does not look


def test_a_plan_of_another_size_is_not_read(tmp_path: Path) -> None:
    plan = tmp_path / "one.plan"
    _write(plan, b"plan")
    os.truncate(plan, 1 << 40)  # a sparse file; its digest would take an hour
    with pytest.raises(ArtifactError, match=r"has 1099511627776 bytes where one\.plan\.json says 4"):
        verify(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"flavor": []},
        {"target": None},
        {"profiles": []},
        {"profiles": [5]},
        {"profiles": [{"batch": 5, "seqlen": "8"}]},
        {"profiles": [{"batch": "8:1", "seqlen": "8"}]},
        {"profiles": [{"batch": "1", "seqlen": "²"}]},
        {"attention_nodes": True},
        {"bundle": {}},
        {"bundle": {"name": "../../etc", "sha256": ""}},
        {"bundle": {"name": "..", "sha256": ""}},
        {"bundle": {"name": "", "sha256": ""}},
        {"options": {"flags": "REFIT"}},
        {"options": {"flags": [5]}},
        {"options": {"workspace_bytes": "8"}},
        {"versions": {"numpy": []}},
        {"conversion": []},
        {"plan": {"sha256": "", "bytes": "8"}},
    ],
    ids=str,
)
def test_json_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    plan = tmp_path / "one.plan"
    _write(plan, b"plan")
    PlanManifest.read(plan)
    data = json.loads(json_path(plan).read_text())
    json_path(plan).write_text(json.dumps(sealed({**data, **change})))
    with pytest.raises(ArtifactError, match=r"one\.plan\.json.* is broken"):
        PlanManifest.read(plan)


@pytest.mark.parametrize("name", ["x" * 254, "a/" * 2500, "a\0b"])
def test_a_path_that_cannot_exist_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be opened"):
        PlanManifest.read(Path(name))
