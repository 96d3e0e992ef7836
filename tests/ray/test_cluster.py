"""Signals that arrive while Ray starts, or while an actor imports. Ray is replaced, where a test says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lfx.ray.actor
from lfx.ray.actor import DocumentActor
from lfx.ray.engine import EngineOptions

# A process of its own: a signal, or the error that it raises, must not reach the process of the tests.
SIGTERM_WHILE_RAY_STARTS = """
import signal, sys
from types import ModuleType, SimpleNamespace
from lfx.ray.cluster import connected

def interrupt(number, frame):
    raise KeyboardInterrupt

def start(**_):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit({status}))
    signal.raise_signal(signal.SIGTERM)

ray = sys.modules["ray"] = ModuleType("ray")
vars(ray).update(is_initialized=lambda: False, init=start, job_config=SimpleNamespace(JobConfig=object))
signal.signal(signal.SIGTERM, interrupt)
try:
    with connected(None):
        print("Ray has started")
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGTERM) is interrupt)
"""


@pytest.mark.parametrize("status", [15, 1], ids=["driver", "head-node"])
def test_sigterm_while_ray_starts_is_handled_as_at_other_times(status: int) -> None:
    """`ray.init` replaces the handler by one that ends the process without a message."""
    code = SIGTERM_WHILE_RAY_STARTS.format(status=status)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("interrupted True\n", 0), done.stderr


def test_sigterm_while_an_actor_imports_ends_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the pool starts another one; an error of `open` would end the run."""

    def interrupted(options: EngineOptions) -> None:
        try:
            sys.exit(1)  # as Ray's handler does, in the process of an actor
        except SystemExit as error:
            raise ImportError("initialization failed") from error  # as a module in C++ does

    monkeypatch.setattr(lfx.ray.actor, "DocumentEngine", interrupted)
    with pytest.raises(SystemExit):
        DocumentActor().open(EngineOptions("model"), "jsonl")


def test_another_error_of_an_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: EngineOptions) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(lfx.ray.actor, "DocumentEngine", broken)
    with pytest.raises(ImportError, match="libcudart"):
        DocumentActor().open(EngineOptions("model"), "jsonl")
