"""`lfx serve` as a process: starting, stopping with requests in flight, and workers that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lfx.errors import InputError, LfxError
from lfx.runtime.serve import supervisor
from lfx.runtime.serve.server import _accept_queued, listen
from lfx.runtime.serve.settings import Settings, named_models
from tests.conftest import MakeBundle, MakeLed
from tests.marks import fast_if
from tests.runtime.serve import running
from tests.runtime.serve.running import WAIT_SECONDS, Command, wait_until
from tests.runtime.test_import import lfx_without

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM")
BODY = {"inputs": "the quick brown fox"}


@pytest.fixture(scope="module")
def model(bundle: MakeBundle) -> Path:
    return bundle("text-classification")


def gauge(client: httpx.Client, name: str) -> float:
    """The sum of a metric over the workers."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def ask(address: str) -> httpx.Response:
    """Ask on a connection of its own."""
    return httpx.post(f"{address}/run", json=BODY, timeout=WAIT_SECONDS)


@pytest.mark.slow
def test_at_sigterm_what_came_is_answered_and_nothing_new_is_taken(model: Path) -> None:
    with Command(model, "--max-delay", "8000", "--stop-time", "100") as server, server.client() as client:
        server.wait_for("is ready")
        host, port = server.address.removeprefix("http://").split(":")
        half = socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
        text = json.dumps(BODY).encode()
        half.sendall(b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text[:5]))
        silent = socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
        with ThreadPoolExecutor(40) as pool:
            replies = [
                pool.submit(httpx.post, f"{server.address}/run", json=BODY, timeout=WAIT_SECONDS) for _ in range(40)
            ]
            wait_until(lambda: gauge(client, "lfx_texts_in_progress") == 40)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("stopping: 40 texts are in progress")
            half.sendall(text[5:])
            assert silent.recv(100) == b""  # no request came on it
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
            assert [reply.result().status_code for reply in replies] == [200] * 40
            assert half.recv(100).startswith(b"HTTP/1.1 200 ")
        half.close()
        silent.close()
        assert server.wait() == 0
        assert server.lines[-1] == "stopped"


def test_connections_that_the_system_has_queued_are_answered_at_a_stop(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of several accepts a few connections at a time."""
    monkeypatch.setattr(running, "Server", functools.partial(running.Server, workers=2))
    text = json.dumps(BODY).encode()
    request = b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(text) + text
    with running.running({"cls": model}, stop_seconds=1000.0) as started, contextlib.ExitStack() as stack:
        loop, blocked, go_on = started.server._loop, threading.Event(), threading.Event()
        assert loop is not None
        loop.call_soon_threadsafe(lambda: (blocked.set(), go_on.wait(WAIT_SECONDS)))
        assert blocked.wait(WAIT_SECONDS)
        clients = [
            stack.enter_context(socket.create_connection(started.socket_address, WAIT_SECONDS)) for _ in range(30)
        ]
        for client in clients:
            client.sendall(request)
        started.server.should_exit = True
        go_on.set()
        for client in clients:
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 200")  # to the end of the connection


def test_connections_that_are_accepted_last_are_used() -> None:
    """asyncio accepts a connection in one turn of its loop, and uses it in the next; uvloop does both in one."""

    async def stop(sock: socket.socket) -> int:
        made: list[asyncio.BaseTransport] = []
        protocol = type("Protocol", (asyncio.Protocol,), {"connection_made": lambda _, made_now: made.append(made_now)})
        accepting = await asyncio.get_running_loop().create_server(protocol, sock=sock)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(socket.create_connection(sock.getsockname()))
            await _accept_queued([sock])
            accepting.close()
            await asyncio.sleep(0.1)
            for transport in made:
                transport.close()
        return len(made)

    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert asyncio.run(stop(sock)) == 4


@pytest.mark.slow
def test_workers_that_stop_refuse_connections_while_they_answer(model: Path) -> None:
    with Command(model, "--workers", "2", "--stop-time", "100") as server:
        for _ in range(2):
            server.wait_for("is ready")
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as half:
            text = json.dumps(BODY).encode()
            head = b"POST /run HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            half.sendall(head % len(text) + text[:5])
            server.process.terminate()
            for _ in range(2):
                server.wait_for("stopping")

            def is_refused() -> bool:
                try:
                    socket.create_connection((host, int(port)), timeout=WAIT_SECONDS).close()
                except ConnectionRefusedError:
                    return True
                return False

            wait_until(is_refused)
            half.sendall(text[5:])
            assert half.recv(1000).startswith(b"HTTP/1.1 200")
        assert server.wait() == 0


@fast_if(lambda second: second)
@pytest.mark.parametrize("second", [True, False], ids=["second-signal", "stop-time"])
def test_a_stop_ends_within_its_bound_and_says_so_to_the_clients(model: Path, second: bool) -> None:
    options = ["--max-delay", "3600000", "--stop-time", "3600" if second else "1"]
    with Command(model, *options) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        server.wait_for("is ready")
        late = pool.submit(ask, server.address)
        wait_until(lambda: gauge(client, "lfx_texts_in_progress") == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        if second:
            server.process.send_signal(signal.SIGINT)
        reply = late.result()
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert "the server stopped before the request was answered" in reply.json()["error"]
        assert server.wait() == 0


@fast_if(lambda second: second)
@pytest.mark.parametrize("second", [True, False], ids=["second-signal", "one-signal"])
def test_a_sigterm_to_each_process_is_one_stop(model: Path, second: bool) -> None:
    """systemd and Slurm send it to all; a second one to the supervisor cancels the requests."""
    options = ["--workers", "2", "--max-delay", "3600000" if second else "5000", "--stop-time", "3600"]
    with Command(model, *options) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        lines = [server.wait_for("is ready"), server.wait_for("is ready")]
        late = pool.submit(ask, server.address)
        wait_until(lambda: gauge(client, "lfx_texts_in_progress") == 1)
        for line in lines:
            os.kill(int(re.findall(r"pid (\d+)", line)[0]), signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        for _ in lines:
            server.wait_for("stopping")
        if second:
            server.process.send_signal(signal.SIGINT)  # a second SIGTERM may come before the first one is seen
        assert late.result().status_code == (503 if second else 200)
        assert server.wait() == 0
    assert not [line for line in server.lines if "a new one starts" in line]


@pytest.mark.slow
def test_a_stop_ends_within_its_bound_while_a_token_is_computed(led_bundle: MakeLed) -> None:
    code = f"""
import sys, time
from lfx.runtime.serve.model import ServedModel
def generate(*_, **__):
    print("writing", file=sys.stderr, flush=True)
    time.sleep(3600)
ServedModel.generate = generate
sys.argv = ["lfx", "serve", {str(led_bundle()[1])!r}, "--port", "0", "--json", "--stop-time", "0.5"]
from lfx.cli import main
main()
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    address = [json.loads(process.stdout.readline())["address"] for _ in range(2)][1]
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(httpx.post, f"{address}/generate", json={"inputs": "the fox"}, timeout=WAIT_SECONDS)
        while process.stderr.readline() != "writing\n":
            pass
        process.terminate()
        assert late.result().status_code == 503
    try:
        assert process.wait(WAIT_SECONDS) == 1
    finally:
        process.kill()
    assert "the batch in progress did not end within 5.5 s" in process.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="needs F_SETPIPE_SZ")
@fast_if(lambda workers: workers == 1)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_reader_of_stderr_that_stops_reading_holds_up_no_answer_and_no_stop(workers: int, model: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "lfx.cli", "serve", str(model), "--port", "0", "--threads", "1", "--json"]
    options = ["--log-requests", "--workers", str(workers)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert process.stdout is not None
    try:
        states = [json.loads(process.stdout.readline()) for _ in range(1 + workers)]
        address = states[0]["address"]
        for _ in range(100):  # of some 100 bytes in the log
            assert httpx.get(f"{address}/health", timeout=WAIT_SECONDS).status_code == 200
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        os.close(reader)


@fast_if(lambda workers: workers == 1)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_script_may_read_the_address_and_close_stdout(workers: int, model: Path) -> None:
    with Command(f"cls={model}", "--workers", str(workers), "--json") as server:
        server.announced()
        assert server.process.stdout is not None
        server.process.stdout.close()
        for _ in range(workers):
            server.wait_for("is ready")
        assert server.stop() == 0
        assert not any("Traceback" in line for line in server.lines)


@pytest.fixture(scope="module")
def workers(model: Path) -> Iterator[Command]:
    """Two workers, ready."""
    with Command(f"cls={model}", "--workers", "2", "--json") as server:
        assert server.announced() == {"state": "opening", "address": server.address, "models": ["cls"]}
        states = [server.announced(), server.announced()]
        assert {state["worker"] for state in states} == {0, 1}
        assert {(state["state"], state["address"]) for state in states} == {("ready", server.address)}
        server.wait_for("is ready")
        server.wait_for("is ready")
        yield server
        assert server.stop() == 0


def test_workers_share_a_port_and_say_their_memory(workers: Command) -> None:
    ready = [line for line in workers.lines if "is ready" in line]
    assert {line.split(" (")[0] for line in ready} == {"worker 0", "worker 1"}
    assert all(re.search(r"\d MB resident", line) for line in ready)
    with workers.client() as client:
        families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
        for name in ("lfx_resident_bytes", "lfx_ready"):
            assert {sample.labels["worker"] for sample in families[name].samples} == {"0", "1"}
            assert all(sample.value > 0 for sample in families[name].samples)
        before = gauge(client, "lfx_requests_total")
        assert {client.post("/run", json=BODY).status_code for _ in range(10)} == {200}
        assert gauge(client, "lfx_requests_total") == before + 10


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_no_answer_is_lost_or_wrong(workers: Command) -> None:
    with workers.client() as client:
        expected = client.post("/predict", json=BODY).json()
    asked = threading.Event()
    broken = []

    def ask_until_answered(_: int) -> Any:
        """Ask on a new connection, and again if it was broken, as HTTP clients do."""
        while True:
            try:
                return httpx.post(f"{workers.address}/predict", json=BODY, timeout=WAIT_SECONDS).json()
            except httpx.TransportError as error:
                broken.append(error)
            finally:
                asked.set()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask_until_answered, i) for i in range(150)]
        assert asked.wait(WAIT_SECONDS)
        pid = int(re.findall(r"worker 1 \(pid (\d+)\) is ready", "\n".join(workers.lines))[-1])
        os.kill(pid, signal.SIGKILL)
        for answer in answers:
            assert [label["label"] for label in answer.result()] == [label["label"] for label in expected]
            assert abs(answer.result()[0]["score"] - expected[0]["score"]) < 1e-5
    assert len(broken) <= 8  # no more than the requests that it had taken
    workers.wait_for(f"worker 1 (pid {pid}) ended with signal 9; a new one starts")
    workers.wait_for("worker 1")
    with workers.client() as client:
        wait_until(lambda: gauge(client, "lfx_ready") == 2)


@pytest.fixture
def replaceable(model: Path, tmp_path: Path) -> Iterator[tuple[Command, Path]]:
    """Two workers, ready, and their bundle, which a test may replace."""
    path = tmp_path / "m"
    shutil.copytree(model, path)
    with Command(path, "--workers", "2") as server:
        server.wait_for("is ready")
        server.wait_for("is ready")
        yield server, path
        assert server.stop() == 0


def kill_worker(server: Command, number: int) -> None:
    """Kill the process that is this worker now."""
    pids = re.findall(rf"worker {number} \(pid (\d+)\) is ready", "\n".join(server.lines))
    os.kill(int(pids[-1]), signal.SIGKILL)


@pytest.mark.slow
def test_a_replacement_that_cannot_start_is_tried_again_and_the_others_answer(
    replaceable: tuple[Command, Path],
) -> None:
    server, path = replaceable
    path.rename(path.with_name("away"))
    kill_worker(server, 1)
    first = server.wait_for("before it was ready")
    assert re.match(r"worker 1 \(pid \d+\) ended with status 1 before it was ready: .*does not exist", first)
    assert first.endswith("a new one starts in 2 s")
    assert ask(server.address).status_code == 200
    assert server.wait_for("before it was ready").endswith("a new one starts in 4 s")
    assert ask(server.address).status_code == 200
    path.with_name("away").rename(path)
    server.wait_for("is ready")
    with server.client() as client:
        wait_until(lambda: gauge(client, "lfx_ready") == 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit")
def test_a_replacement_that_the_system_refuses_is_tried_again_and_the_others_answer(
    replaceable: tuple[Command, Path],
) -> None:
    server, _ = replaceable
    pid, (_, most) = server.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())), most))
    kill_worker(server, 1)
    refused = server.wait_for("cannot start")
    assert refused == "worker 1 cannot start: [Errno 24] Too many open files; a new one starts in 2 s"
    assert ask(server.address).status_code == 200
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
    server.wait_for("is ready")
    with server.client() as client:
        wait_until(lambda: gauge(client, "lfx_ready") == 2)


@pytest.mark.slow
def test_a_bundle_that_is_replaced_is_opened_by_all_workers_once_one_has_opened_it(
    replaceable: tuple[Command, Path], bundle: MakeBundle
) -> None:
    server, path = replaceable

    def identity() -> str:
        return str(httpx.get(f"{server.address}/info", timeout=WAIT_SECONDS).json()["model_sha"])

    old = identity()
    path.rename(path.with_name("old"))
    shutil.copytree(bundle("text-classification", opset=18), path)
    kill_worker(server, 0)
    line = server.wait_for("is restarted")
    assert re.fullmatch(r"worker 1 \(pid \d+\) is restarted: worker 0 \(pid \d+\) has opened other files of m", line)
    server.wait_for("worker 1")  # it stops
    server.wait_for("is ready")
    with server.client() as client:
        wait_until(lambda: gauge(client, "lfx_ready") == 2)
    identities = {identity() for _ in range(10)}
    assert len(identities) == 1
    assert identities != {old}
    assert sum("is restarted" in line for line in server.lines) == 1


@pytest.mark.slow
def test_a_tokenizer_that_is_replaced_is_opened_by_all_workers_once_one_has_opened_it(
    model: Path, tmp_path: Path
) -> None:
    shutil.copy(model / "tokenizer.json", tmp_path)
    with Command(model, "--workers", "2", "--tokenizer", tmp_path) as server:
        server.wait_for("is ready")
        server.wait_for("is ready")
        (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes() + b"\n")
        kill_worker(server, 0)
        server.wait_for("is restarted")
        assert server.stop() == 0


@pytest.mark.slow
def test_workers_serve_where_the_folder_of_temporary_files_cannot_have_sockets(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("t" * 100)
    folder.mkdir()
    with Command(model, "--workers", "2", TMPDIR=str(folder)) as server:
        wait_until(lambda: sum("is ready" in line for line in server.lines) == 2)
        warnings = [line for line in server.lines if "set TMPDIR to another folder with a short path" in line]
        assert len(warnings) == 2
        assert all("lacks this worker's counters" in line for line in warnings)
        assert ask(server.address).status_code == 200
        with server.client() as client:
            assert gauge(client, "lfx_ready") == 1  # the worker that was asked
        assert server.stop() == 0
        assert "Traceback" not in "\n".join(server.lines)


def test_workers_need_no_folder_of_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have a root file system that cannot be written."""

    def refuse(prefix: str) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(supervisor.tempfile, "TemporaryDirectory", refuse)
    reports: list[str] = []
    with contextlib.ExitStack() as stack:
        assert supervisor._private_folder(stack, reports.append) is None
    assert "one worker only: No usable temporary directory found" in reports[0]


def test_workers_end_with_their_supervisor(model: Path) -> None:
    with Command(model, "--workers", "2") as server:
        lines = [server.wait_for("is ready"), server.wait_for("is ready")]
        pids = [int(re.findall(r"pid (\d+)", line)[0]) for line in lines]
        server.process.kill()
        server.process.wait()

    def is_gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
        except OSError:
            return True

    if sys.platform == "linux":
        wait_until(lambda: all(map(is_gone, pids)))


def failing(*arguments: str | Path) -> str:
    """The one-line error of a start that fails."""
    command = [sys.executable, "-m", "lfx.cli", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@fast_if(lambda workers: workers == "2")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_start_that_fails_is_one_line(workers: str, model: Path, tmp_path: Path) -> None:
    assert "does not exist" in failing(tmp_path / "nowhere", "--port", "0", "--workers", workers)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be listened on" in failing(model, "--port", port, "--workers", workers)


def refuse_threads(patch: pytest.MonkeyPatch, prefix: str = "") -> None:
    """Let the system start no thread whose name begins so."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(prefix):
            raise RuntimeError("can't start new thread")
        start(thread)

    patch.setattr(threading.Thread, "start", refuse)


def test_requests_and_a_stop_need_no_new_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give none: the other processes of a container take threads too."""
    with running.running({"cls": model}) as started, monkeypatch.context() as patch:
        refuse_threads(patch)
        assert ask(started.address).status_code == 200
        started.server.handle_exit(signal.SIGTERM, None)


@pytest.mark.parametrize("name", ["lfx-watchdog", "lfx-open", "lfx-answer"])
def test_a_start_without_a_thread_is_one_line(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_threads(monkeypatch, name)
    settings = Settings({"cls": str(model)}, port=0, threads=1)
    server = running.Server(settings, lambda _: None)
    with listen(settings) as sock, pytest.raises(LfxError, match="can't start new thread"):
        server.run_on(sock, lambda: None)


@fast_if(lambda module: module == "uvicorn")
@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "httptools"])
def test_a_missing_extra_is_one_line_with_the_cure(module: str) -> None:
    done = lfx_without((module,), "serve", "nowhere")
    assert done.returncode == 1
    assert done.stderr == f"error: {module} is not installed; install it with: pip install 'longformer-lfx[serve]'\n"


def test_a_signal_before_the_server_starts_ends_with_status_0() -> None:
    code = """
import sys, time
from lfx.runtime import serve
def importing():
    print("importing", file=sys.stderr, flush=True)
    time.sleep(3600)
serve.check_installed = importing
sys.argv = ["lfx", "serve", "x", "--port", "0"]
from lfx.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    process.terminate()
    assert process.stderr.read() == "stopped before the models were opened\n"
    assert process.wait(WAIT_SECONDS) == 0


def test_a_stop_does_not_wait_for_a_model_that_is_being_opened() -> None:
    code = """
import sys, time
from lfx.runtime.serve import service
def opening(*_):
    print("opening", file=sys.stderr, flush=True)
    time.sleep(3600)
service.ServedModel = opening
sys.argv = ["lfx", "serve", "x", "--port", "0"]
from lfx.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert [process.stderr.readline() for _ in range(2)][1] == "opening\n"
    process.terminate()
    lines = process.stderr.read().splitlines()
    assert process.wait(WAIT_SECONDS) == 0
    assert lines == ["stopping: 0 texts are in progress", "stopped"]


def test_models_are_named_for_their_paths_or_by_name(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_models(("x/my-bundle/", "org/emb=y.plan", str(odd))) == {
        "my-bundle": "x/my-bundle/",
        "org/emb": "y.plan",
        "a-b": str(odd),
    }
    for arguments in (("a/x", "b/x"), ("x=a", "x=b")):
        with pytest.raises(InputError, match="two models are named x; give each another name: NAME=PATH"):
            named_models(arguments)
    for argument in ("a b=c", "../a=c", "/a=c", "a//b=c", "a/=c", "\u00e9=c", "x=", "=", "x" * 201 + "=c"):
        with pytest.raises(InputError):
            named_models((argument,))
