"""Signals that arrive while Ray starts, or while an actor imports. Ray is replaced, where a test says so."""

from __future__ import annotations

import signal
import sys
from types import FrameType, ModuleType

import pytest

import lfx.ray.actor
from lfx.ray.actor import DocumentActor
from lfx.ray.cluster import connected
from lfx.ray.engine import EngineOptions


@pytest.mark.parametrize("status", [15, 1], ids=["driver", "head-node"])
def test_sigterm_while_ray_starts_is_handled_as_at_other_times(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` replaces the handler by one that ends the process without a message."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(status))
        signal.raise_signal(signal.SIGTERM)  # in this thread, at once; Ray has threads of its own

    ray = ModuleType("ray")
    vars(ray).update(is_initialized=lambda: False, init=start)
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), connected(None):
            raise AssertionError("Ray has started")
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


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
