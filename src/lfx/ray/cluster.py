"""Starting Ray on this machine or connecting to a cluster, and the number of actors that fit in it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lfx.checks import real_number, whole_number
from lfx.errors import InputError, LfxError, one_line, require

# Ray reports its use to its makers unless it is told not to, and warns about GPUs that a task without GPUs cannot see.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_MOST_GPUS = 1e6
_CONNECT_S = 20.0  # how long a cluster is waited for that does not answer


@dataclass(frozen=True)
class PoolSize:
    """Size of a pool of actors.

    Args:
        actors: number of actors. Default: as many as the cluster has CPUs for, and one CPU less, which is left for
            reading and writing; with `gpus`, as many as it has GPUs for.
        cpus, gpus: number of CPUs and GPUs of an actor; a fraction of a GPU shares it.
    Raises:
        InputError: an argument has another type or is out of range.
    """

    actors: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        whole_number(1 if self.actors is None else self.actors, "actors", 1)
        whole_number(self.cpus, "cpus", 1)
        real_number(self.gpus, "gpus", 0, _MOST_GPUS)

    def fit(self, nodes: list[dict[str, float]], *, may_grow: bool) -> int:
        """The number of actors to start.

        Args:
            nodes: resources of each machine of the cluster, such as {"CPU": 2.0}.
            may_grow: whether machines may join later, so that a larger pool is not an error.
        Raises:
            InputError: the actors do not fit.
        """
        fits = sum(self._fits(node) for node in nodes)
        needs = f"{self.cpus} CPU{'s' * (self.cpus > 1)}" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
        if not may_grow and fits < (self.actors or 1):
            machines = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise InputError(
                f"{self.actors or 1} actors of {needs} do not fit: the machines have {machines}; {fits} fit, so give "
                "fewer --actors, --cpus or --gpus"
            )
        if self.actors is not None:
            return self.actors
        if self.gpus:
            return max(fits, 1)
        spare = sum(node.get("CPU", 0) for node in nodes) - fits * self.cpus
        return max(fits - (spare < 1), 1)

    def _fits(self, node: dict[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) // self.cpus)
        return min(by_cpu, int(node.get("GPU", 0) / self.gpus + 1e-9)) if self.gpus else by_cpu


@contextmanager
def connected(address: str | None) -> Iterator[ModuleType]:
    """Connect to Ray, and yield the module `ray`; a connection that exists already is used and left open.

    Args:
        address: address of a cluster, such as 10.0.0.1:6379 or ray://10.0.0.1:10001. Default: Ray is started on this
            machine, and stopped.
    Raises:
        LfxError: there is no cluster, or Ray cannot start.
        DependencyError: ray is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    ray = require("ray", "ray")
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        if address is not None:
            _wait_for(address)
        with _own_signals():
            if not _has_proxy(address):
                options["job_config"] = _job_without_current_folder(ray)
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:
        what = "Ray cannot start" if address is None else f"no Ray cluster at {address}"
        raise LfxError(f"{what}: {_reason(error)}") from error
    try:
        # Ray prints each death of an actor to stdout, where results go; the pool reports it.
        ray._private.worker._worker_logs_enabled = False
        yield ray
    finally:
        ray.shutdown()


def _wait_for(address: str) -> None:
    """Wait until HOST:PORT answers; Ray itself would try for a quarter of an hour. Other addresses are left to Ray.

    Raises:
        OSError: it does not answer.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    end = time.monotonic() + _CONNECT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(1.0)


def _reason(error: Exception) -> str:
    """Ray's error as one line: all its lines, such as the versions that differ; of a traceback the first and the last.

    One line alone may be "Version mismatch: The cluster was started with:".
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = [lines[0], lines[-1]]
    return one_line(Exception(" ".join(lines) or type(error).__name__), 500)


def _has_proxy(address: str | None) -> bool:
    """Whether the job is a process of the cluster, as with ray://HOST:PORT; it has nothing of the current folder."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS")
    return address is not None and "://" in address


def _job_without_current_folder(ray: Any) -> Any:
    """Settings of a job whose workers import modules from the installation alone.

    Ray puts the current folder, in which anybody's bundle may be, and the script's first on sys.path of the workers,
    unless the job brings a folder of its own.
    """

    class Job(ray.job_config.JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return Job()


def machines(ray: Any) -> list[dict[str, float]]:
    """The resources of each machine of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which `ray.init` replaces by one that ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's handler raises it
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
