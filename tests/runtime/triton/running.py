"""A real tritonserver for the tests: the one of nvidia-pytriton, on free ports of the loopback interface."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tritonclient.grpc
import tritonclient.http

ROOT = Path(__file__).resolve().parents[3]
WAIT_SECONDS = 120.0  # longer than anything takes; no test measures time
# The folder with bin/, backends/ and python_backend_stubs/; `make install` puts it there.
SERVER = Path(os.environ.get("LFX_TRITONSERVER", ROOT / "build" / "triton" / "pytriton" / "tritonserver"))
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SERVICES = ("http", "grpc", "metrics")
LAST_LINE = "Started Metrics Service"  # of a server that takes requests


@dataclass
class Running:
    """A server.

    Attributes:
        ports: "http", "grpc" and "metrics" -> port.
        lines: what the server printed.
    """

    process: subprocess.Popen[str]
    ports: dict[str, int]
    lines: list[str] = field(default_factory=list)

    @property
    def http(self) -> str:
        """Address of the HTTP service, without http://."""
        return f"127.0.0.1:{self.ports['http']}"

    def client(self, protocol: str) -> Any:
        """A tritonclient; protocol is "http" or "grpc"."""
        if protocol == "grpc":
            return tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self.ports['grpc']}")
        return tritonclient.http.InferenceServerClient(
            self.http, connection_timeout=WAIT_SECONDS, network_timeout=WAIT_SECONDS
        )

    def metrics(self) -> dict[str, float]:
        """Name and labels -> value."""
        text = httpx.get(f"http://127.0.0.1:{self.ports['metrics']}/metrics", trust_env=False).text
        lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


@contextlib.contextmanager
def running(repository: Path, *options: str) -> Iterator[Running]:
    """A server on a model repository, which takes requests."""
    with tempfile.TemporaryDirectory() as folder:
        backends = _backends(Path(folder))
        server, reader = _start(repository, backends, options)
        try:
            yield server
        finally:
            _end(server)
            reader.join(WAIT_SECONDS)


def _start(repository: Path, backends: Path, options: tuple[str, ...]) -> tuple[Running, threading.Thread]:
    for _ in range(3):  # another process may take a port after it was chosen
        ports = dict(zip(SERVICES, _free_ports(len(SERVICES)), strict=True))
        command = [
            str(SERVER / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            *(f"--{service}-address=127.0.0.1" for service in SERVICES),
            *(f"--{service}-port={port}" for service, port in ports.items()),
            "--exit-timeout-secs=2",  # a client that was not closed keeps its connection
            *options,
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
            start_new_session=True,  # the processes of the Python backend are in its group, and end with it
        )
        server, ready = Running(process, ports), threading.Event()
        reader = threading.Thread(target=_read, args=(server, ready), daemon=True)
        reader.start()
        if ready.wait(WAIT_SECONDS) and any(LAST_LINE in line for line in server.lines):
            return server, reader
        _end(server)
        if not any("Address already in use" in line for line in server.lines):
            break
    raise AssertionError("\n".join(server.lines))


def _end(server: Running) -> None:
    server.process.terminate()
    try:
        server.process.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _backends(folder: Path) -> Path:
    """A folder of the server's backends, with the program that runs models in this version of Python."""
    stub = SERVER / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    assert stub.is_file(), f"{stub} does not exist; run make install, with a Python for which nvidia-pytriton has one"
    python = folder / "python"
    python.mkdir()
    for file in (SERVER / "backends" / "python").iterdir():
        (python / file.name).symlink_to(file)
    (python / stub.name).unlink(missing_ok=True)
    (python / stub.name).symlink_to(stub)
    return folder


def _read(server: Running, ready: threading.Event) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line.rstrip("\n"))
        if LAST_LINE in line:
            ready.set()
    ready.set()  # it ended


def _environment() -> dict[str, str]:
    """The environment in which the server's Python is this one, with its packages.

    The server's Python ignores PYTHONPATH. It takes the first python3 of the PATH for itself, and so the packages of a
    virtual environment.
    """
    assert (Path(sys.prefix) / "bin" / "python3").exists()
    libraries = [str(_folder_of_libpython()), str(SERVER.parent.parent / "nvidia_pytriton.libs")]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))},
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "OMP_NUM_THREADS": "1",
    }


def _folder_of_libpython() -> Path:
    """The folder of this Python's library. That of another 3.11 does not run the standard library of this one."""
    name = f"libpython{PYTHON}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    for path in (folder, folder / str(sysconfig.get_config_var("MULTIARCH"))):
        if (path / name).is_file():
            return path
    raise AssertionError(f"{name} is not in {folder}; install it (Debian: apt-get install libpython{PYTHON})")
