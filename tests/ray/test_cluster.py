"""Signals that arrive while Ray starts, or while an actor imports. Ray is replaced, where a test says so."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import lfx.ray.actor
from lfx.errors import LfxError
from lfx.ray.actor import DocumentActor
from lfx.ray.cluster import connected
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


@pytest.mark.parametrize(
    ("address", "brings_job"),
    [(None, True), ("10.0.0.1:6379", True), ("ray://10.0.0.1:10001", False), ("auto", False)],
)
def test_a_job_keeps_its_folder_out_unless_it_runs_in_the_cluster(
    address: str | None, brings_job: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray sends the options of a job of ray:// as JSON, which a JobConfig is not."""
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.2:10001")
    monkeypatch.setattr("lfx.ray.cluster._wait_for", lambda address: None)
    given: list[dict[str, Any]] = []
    ray: Any = ModuleType("ray")
    vars(ray).update(is_initialized=lambda: False, init=lambda **options: given.append(options), shutdown=lambda: None)
    vars(ray).update(job_config=SimpleNamespace(JobConfig=object), _private=SimpleNamespace(worker=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with connected(address):
        assert ("job_config" in given[0]) == brings_job


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9\n",
            "Ray: 2.9.0 Python: 3.9",
        ),
        (
            "Failure from server:\nTraceback (most recent call last):\n  File\nRuntimeError: no port\n",
            "server: RuntimeErr",
        ),
        ("", "ValueError"),
    ],
    ids=["versions", "traceback", "empty"],
)
def test_a_cluster_that_refuses_says_why(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError(error)

    ray: Any = ModuleType("ray")
    vars(ray).update(is_initialized=lambda: False, init=refuse)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(LfxError) as caught, connected("ray://10.0.0.1:10001"):
        pass
    text = str(caught.value)
    assert text.startswith("no Ray cluster at ray://10.0.0.1:10001: ")
    assert message in text
    assert "\n" not in text
    assert "Traceback" not in text


def test_an_address_where_nothing_listens_is_an_error_before_ray_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tries such an address 20 times, for 41 s each."""
    ray: Any = ModuleType("ray")
    vars(ray).update(is_initialized=lambda: False, init=lambda **_: pytest.fail("Ray tries it"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("lfx.ray.cluster._CONNECT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(LfxError, match=f"no Ray cluster at {address}: .*refused"), connected(address):
        pass


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
