"""Workers and instances divide the cores that the process may use, which a container may limit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lfx.runtime.serve import supervisor
from lfx.runtime.serve.settings import Settings
from lfx.runtime.triton.requests import _share_of_cores


@pytest.fixture(autouse=True)
def six_of_many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)


def test_workers_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Supervisor:
        def __init__(self, settings: Settings, *others: Any) -> None:
            threads.append(settings.threads)

        def run(self) -> None:
            pass

    threads: list[int | None] = []
    monkeypatch.setattr(supervisor, "_Supervisor", Supervisor)
    supervisor.supervise(Settings({"model": "path"}, port=0, workers=2), print, print)
    assert threads == [3]


def test_instances_in_triton() -> None:
    config = {"instance_group": [{"kind": "KIND_CPU", "count": 3}]}
    assert _share_of_cores(config, Path("model")) == 2
