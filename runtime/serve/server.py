"""Runs the server in this process: opens the models, answers requests, and stops within a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from lfx.errors import InputError, LfxError, one_line
from lfx.runtime.serve.app import make_app
from lfx.runtime.serve.lines import flush_lines
from lfx.runtime.serve.memory import memory
from lfx.runtime.serve.protocol import STOP_GRACE_SECONDS, make_protocol
from lfx.runtime.serve.service import NO_THREAD, Service
from lfx.runtime.serve.settings import KEEP_ALIVE_SECONDS, Settings
from lfx.runtime.serve.stats import Stats

Report = Callable[[str], None]  # is called with each line for the operator
Announce = Callable[[dict[str, Any]], None]  # is called with each state, for scripts
OTHER_FILES = 64  # open files of the process besides its connections
BACKLOG = 2048  # connections that the system queues until a worker accepts them
# Number of connections that a worker accepts at a time, so that the workers share a burst of connections.
_ACCEPTED_AT_A_TIME = 4
_CHECK_SECONDS = 0.25  # between two checks of the clients' time limits
_CANCELLED_REPLY_SECONDS = 1.0  # to send the replies to cancelled requests
_EXIT_SECONDS = 5.0  # after stop_seconds: to cancel the remaining requests, and to finish the batch in progress


def listen(settings: Settings) -> socket.socket:
    """A socket that listens at the address of the settings.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows it lets two servers have one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"{settings.host}:{settings.port} cannot be listened on: {one_line(error)}; choose another --host or --port"
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The address of a listening socket, for a browser."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server of one process.

    Args:
        settings: what is served.
        report: is called with each line for the operator.
        worker: index of this process among the workers.
        workers: number of worker processes.
        folder: of the workers' sockets; see `Stats`.
        early: whether connections are accepted while the models are being opened, so that /health can report that.
    Attributes:
        failure: the error that ended the server; None = it was stopped.
    """

    def __init__(
        self,
        settings: Settings,
        report: Report,
        *,
        worker: int = 0,
        workers: int = 1,
        folder: Path | None = None,
        early: bool = True,
    ) -> None:
        self.service = Service(settings)
        self.stats = Stats(self.service, worker, folder, workers)
        self.failure: LfxError | None = None
        self._settings, self._report, self._early, self._workers = settings, report, early, workers
        self._when_ready: Callable[[], None] = lambda: None
        self._tasks: list[asyncio.Task[None]] = []
        # The first item: it is asked to stop. The second: it has stopped. A signal handler may put them.
        self._stops: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._opener: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        self._max_connections = connection_limit(settings.max_connections)
        config = uvicorn.Config(
            make_app(self.service, self.stats),
            http=make_protocol(
                settings.client_seconds, self._max_connections, lambda: self.service.state == "stopping"
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(round(settings.stop_seconds), 1),
            backlog=BACKLOG if workers == 1 else _ACCEPTED_AT_A_TIME,
        )
        super().__init__(config)
        self.service.unread_bytes = self._unread_bytes

    def _unread_bytes(self) -> int:
        return sum(connection.unread_bytes for connection in self.server_state.connections)  # type: ignore[union-attr]

    def run_on(self, sock: socket.socket, when_ready: Callable[[], None]) -> None:
        """Answer on a listening socket until a SIGTERM or SIGINT, or until the models cannot be opened.

        Args:
            when_ready: is called once, when the models are ready.
        Raises:
            LfxError: a model cannot be opened, or the system gives no thread.
        """
        self._when_ready = when_ready
        start_thread(self._watch, "lfx-watchdog")  # now, since a signal handler must not need a thread
        if self._max_connections < self._settings.max_connections:
            self._report(f"takes {self._max_connections} connections, since the system limits open files (ulimit -n)")
        try:
            self.run([sock])
            with self.capture_signals():  # it waits for threads, and the watchdog must not end before
                self.service.close()
        finally:
            flush_lines()
            for _ in range(2):  # one if the server was asked to stop, two if not
                self._stops.put(None)
        if self.failure is not None:
            raise self.failure

    def exit_if_opening(self) -> None:
        """End the process at once, with status 0, if a model is still being opened.

        At a normal exit Python ends that thread when it returns from C++ code, which aborts the process.
        """
        if self._opener is not None and self._opener.is_alive():
            flush_lines()
            os._exit(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the models, and accept connections: before that if `early`, otherwise afterwards."""
        self._loop = asyncio.get_running_loop()
        await self.stats.start()
        opening = asyncio.create_task(self._open())
        self._tasks = [opening, asyncio.create_task(self._check_clients())]
        if not self._early:
            while not opening.done() and not self.should_exit:
                await asyncio.wait([opening], timeout=0.1)
        if not self.should_exit:
            await super().startup(sockets)
            for sock in sockets or []:
                sock.listen(BACKLOG)  # uvicorn has set the backlog to _ACCEPTED_AT_A_TIME

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()

        def load() -> None:
            error: LfxError | None = None
            try:
                self.service.load()
            except LfxError as problem:
                error = problem
            except BaseException as problem:
                error = LfxError(f"the models cannot be opened: {one_line(problem)}")
            with contextlib.suppress(RuntimeError):  # the loop was closed: the server stopped meanwhile
                loop.call_soon_threadsafe(_complete, opened, error)

        try:
            # A daemon: the server stops without waiting for a model to be opened.
            self._opener = start_thread(load, "lfx-open")
            await opened
        except LfxError as error:
            self.failure, self.should_exit = error, True
            return
        if not self.should_exit:
            self._when_ready()

    async def _check_clients(self) -> None:
        """Close the connections of clients that are too slow."""
        while True:
            await asyncio.sleep(min(_CHECK_SECONDS, self._settings.client_seconds / 4))
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                connection.check_time(now)  # type: ignore[union-attr]  # it is a `protocol.Protocol`

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, answer the requests in progress, and cancel the rest after stop_seconds."""
        self.service.state = "stopping"
        self.stats.stop()
        await _accept_queued(sockets or [])
        await super().shutdown(sockets)
        # uvicorn has cancelled the remaining requests; `Gate` replies 503 to their clients.
        remaining = [task for task in self.server_state.tasks if not task.done()]
        if remaining:
            await asyncio.wait(remaining, timeout=_CANCELLED_REPLY_SECONDS)
        for task in self._tasks:
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at the first SIGTERM or SIGINT; see `handle_exit` for the second.

        uvicorn raises the signal again after the server has stopped; here the process ends with status 0 instead.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
        numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop the server; a second signal cancels the requests in progress.

        It does not in one of several workers, which the supervisor tells to: a service manager such as systemd sends
        SIGTERM to all processes, and the supervisor passes it on.
        """
        if self.should_exit:
            if self._workers == 1:
                self.cancel()
            return
        self.should_exit = True
        self.service.state = "stopping"
        self._stops.put(None)
        self._report(f"stopping: {self.service.in_progress} texts are in progress")

    def cancel(self) -> None:
        """Cancel the requests in progress; any thread and a signal handler may call it."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._cancel_requests)

    def _cancel_requests(self) -> None:
        """Cancel the requests in progress; `Gate` replies 503 to their clients."""
        for task in list(self.server_state.tasks):
            task.cancel()
        asyncio.get_running_loop().call_later(_CANCELLED_REPLY_SECONDS, self._abort_connections)

    def _abort_connections(self) -> None:
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _watch(self) -> None:
        """End the process if a stop takes too long: a batch that is being computed cannot be cancelled."""
        self._stops.get()
        seconds = self._settings.stop_seconds + _EXIT_SECONDS
        try:
            self._stops.get(timeout=seconds)
        except queue.Empty:
            self._report(f"the batch in progress did not end within {seconds:g} s")
            flush_lines()
            os._exit(1)


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        LfxError: the system gives no thread.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise LfxError(f"{name}: {one_line(error)}: {NO_THREAD}") from error
    return thread


async def _accept_queued(sockets: list[socket.socket]) -> None:
    """Let asyncio accept the connections that the system has queued: it would reset them when the sockets are closed.

    Clients that go on connecting do not keep the sockets open for longer than STOP_GRACE_SECONDS.
    """
    if not hasattr(select, "poll"):
        return
    poll = select.poll()
    for sock in sockets:
        poll.register(sock.fileno(), select.POLLIN)
    end, empty = time.monotonic() + STOP_GRACE_SECONDS, 0
    while time.monotonic() < end:
        empty = 0 if poll.poll(0) else empty + 1
        if empty == 2:  # asyncio accepts a connection in one turn of its loop, and begins to read it in the next
            return
        await asyncio.sleep(0)


def _complete(opened: asyncio.Future[None], error: LfxError | None) -> None:
    if opened.done():
        return
    if error is None:
        opened.set_result(None)
    else:
        opened.set_exception(error)


def connection_limit(wanted: int) -> int:
    """Raise the limit of open files as far as the system allows; return the number of connections that fit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        files = max(soft, 10_240) if hard == resource.RLIM_INFINITY else hard  # macOS takes no more
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - OTHER_FILES, 1))


def serve(settings: Settings, report: Report, announce: Announce) -> None:
    """Serve in this process until a SIGTERM or SIGINT.

    Args:
        settings: what is served.
        report: is called with each line for the operator.
        announce: is called when the server listens, and when it is ready.
    Raises:
        InputError: the address cannot be used.
        LfxError: a model cannot be opened.
    """
    sock = listen(settings)
    address = address_of(sock)
    announce({"state": "opening", "address": address, "models": list(settings.models)})
    report(f"{address} is opening {', '.join(settings.models)}")
    server = Server(settings, report)

    def when_ready() -> None:
        now = memory()
        announce({"state": "ready", "address": address, "worker": 0, "pid": os.getpid()})
        report(f"{address} is ready" + (f": {now}" if now else ""))

    server.run_on(sock, when_ready)
    report("stopped")
    server.exit_if_opening()
