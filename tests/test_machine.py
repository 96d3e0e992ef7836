"""`usable_cores`: the limits of a container, a service or taskset, with files as Linux has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lfx import machine
from lfx.machine import usable_cores
from lfx.runtime.engine import Engine
from lfx.runtime.serve import supervisor
from lfx.runtime.serve.settings import Settings
from lfx.runtime.triton.requests import _share_of_cores
from tests.conftest import MakeBundle

V2, V1 = "0::/a/b\n", "4:memory:/elsewhere\n3:cpu,cpuacct:/a/b\n0::/\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of control groups, on a machine of 16 cores."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, 16),
        (V2, {}, 16),
        (V2, {"a/b/cpu.max": "max 100000\n"}, 16),
        (V2, {"a/b/cpu.max": "400000 100000\n"}, 4),
        (V2, {"a/b/cpu.max": "290000 100000\n"}, 2),
        (V2, {"a/b/cpu.max": "50000 100000\n"}, 1),
        (V2, {"a/b/cpu.max": "9900000 100000\n"}, 16),
        (V2, {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        (V2, {"cpu.max": "200000 100000\n"}, 2),
        (V2, {"a/b/cpu.max": "what?"}, 16),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"}, 16),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "300000\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, 3),
        ("\n5\n0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
    ],
)
def test_the_cores_are_those_that_the_control_groups_allow(
    own: str, files: dict[str, str], expected: int, groups: Path
) -> None:
    (groups / "own").write_text(own)
    for name, content in files.items():
        path = groups / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert usable_cores() == expected


def test_the_affinity_limits_the_cores(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert usable_cores() == 3


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (16, 0)])
def test_an_engine_has_the_threads_that_its_process_may_use(
    cores: int, expected: int, bundle: MakeBundle, groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    threads = []
    session = onnxruntime.InferenceSession

    def recorded(path: str, options: onnxruntime.SessionOptions, **others: object) -> object:
        threads.append(options.intra_op_num_threads)
        return session(path, options, **others)

    source = bundle()
    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    Engine(source).close()
    assert threads == [expected]  # 0: ONNX Runtime's default


def test_workers_of_a_server_divide_the_cores(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Supervisor:
        def __init__(self, settings: Settings, *others: Any) -> None:
            threads.append(settings.threads)

        def run(self) -> None:
            pass

    threads: list[int | None] = []
    monkeypatch.setattr(supervisor, "_Supervisor", Supervisor)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    supervisor.supervise(Settings({"model": "path"}, port=0, workers=2), print, print)
    assert threads == [3]


def test_instances_in_triton_divide_the_cores(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    config = {"instance_group": [{"kind": "KIND_CPU", "count": 3}]}
    assert _share_of_cores(config, Path("model")) == 2
