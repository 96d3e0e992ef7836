"""Counters of all workers of the server, for GET /metrics.

A request for /metrics reaches one worker. It asks the others over Unix sockets in a private folder, so that a scrape
has the counters of all workers, each with its own label.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lfx.errors import one_line, require
from lfx.runtime.metrics import Snapshot, families
from lfx.runtime.serve.memory import memory
from lfx.runtime.serve.service import Service

_log = logging.getLogger("lfx")
_WORKER_SECONDS = 1.0  # longest wait for another worker
_MAX_BYTES = 1 << 20  # of the counters of another worker


class Stats:
    """The counters of one worker.

    Args:
        service: its models.
        worker: number of the worker, from 0.
        folder: where the workers' sockets are; None for a single process.
        workers: number of workers.
    """

    def __init__(self, service: Service, worker: int = 0, folder: Path | None = None, workers: int = 1) -> None:
        self._service, self._worker, self._folder, self._workers = service, worker, folder, workers
        self._requests: Counter[tuple[str, str]] = Counter()
        self._server: asyncio.Server | None = None

    def count(self, route: str, status: int) -> None:
        """Count a reply; status 0 = the client disconnected before it."""
        self._requests[route, str(status) if status else "gone"] += 1

    async def start(self) -> None:
        """Offer this worker's counters to the other workers; if the folder cannot have a socket, log that."""
        if self._folder is None:
            return
        path = self._folder / f"{self._worker}.sock"
        try:
            path.unlink(missing_ok=True)  # left by a worker that was killed
            self._server = await asyncio.start_unix_server(self._send_values, path)
        except OSError as error:  # the path is too long, or the file system has no sockets
            _log.warning(
                "worker %d: /metrics of the other workers lacks this worker's counters: %s: %s; set TMPDIR to another "
                "folder with a short path",
                self._worker,
                path,
                one_line(error),
            )

    def stop(self) -> None:
        """Stop offering the counters."""
        if self._server is not None:
            self._server.close()

    async def _send_values(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(json.dumps(self._values()).encode())
            await writer.drain()
        writer.close()

    def _values(self) -> dict[str, Any]:
        """The counters as JSON types."""
        now = memory()
        return {
            "worker": self._worker,
            "pid": os.getpid(),
            "state": self._service.condition,
            "in_progress": self._service.in_progress,
            "memory": None if now is None else dataclasses.asdict(now),
            "requests": [[route, status, count] for (route, status), count in self._requests.items()],
            "models": {
                name: dataclasses.asdict(model.engine.metrics.snapshot())
                for name, model in self._service.models.items()
            },
        }

    async def all_workers(self) -> list[dict[str, Any]]:
        """The counters of all workers that answer."""
        if self._folder is None:
            return [self._values()]
        others = [i for i in range(self._workers) if i != self._worker]
        answers = await asyncio.gather(*(_read_values(self._folder / f"{i}.sock") for i in others))
        return sorted([self._values(), *(answer for answer in answers if answer)], key=lambda one: int(one["worker"]))

    async def prometheus(self) -> str:
        """The counters of all workers in the Prometheus text format.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        client = require("prometheus_client", "serve")
        registry = client.CollectorRegistry()
        registry.register(_Collector(await self.all_workers()))
        return str(client.generate_latest(registry).decode())


async def _read_values(path: Path) -> dict[str, Any] | None:
    """Read the counters of the worker that listens on this socket; None if it does not answer."""
    try:
        async with asyncio.timeout(_WORKER_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                values: dict[str, Any] = json.loads(await reader.read(_MAX_BYTES))
            finally:
                writer.close()
    except (OSError, ValueError, TimeoutError):  # the worker is starting, or was killed
        return None
    return values


class _Collector:
    """A collector of prometheus_client, of the counters of the workers."""

    def __init__(self, workers: Sequence[dict[str, Any]]) -> None:
        self._workers = workers

    def describe(self) -> Iterable[Any]:
        """The metric families; a registry compares their names."""
        return self.collect()

    def collect(self) -> Iterable[Any]:
        """Yield the metric families."""
        core = require("prometheus_client.core", "serve")
        yield from families(
            {
                (name, str(one["worker"])): Snapshot(**{**values, "latency_counts": tuple(values["latency_counts"])})
                for one in self._workers
                for name, values in one["models"].items()
            },
            ["model", "worker"],
        )
        replies = core.CounterMetricFamily(
            "lfx_http_replies", "Replies by route and status", labels=["route", "status", "worker"]
        )
        for one in self._workers:
            for route, status, count in one["requests"]:
                replies.add_metric([route, status, str(one["worker"])], count)
        yield replies
        gauges: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
            "lfx_texts_in_progress": (
                "Texts that are being tokenized, are waiting or are being computed, or whose reply is not made yet",
                lambda one: one["in_progress"],
            ),
            "lfx_ready": ("1 if the models are ready", lambda one: float(one["state"] == "ready")),
            "lfx_resident_bytes": ("Resident memory", lambda one: (one["memory"] or {}).get("resident")),
            "lfx_shared_bytes": (
                "Resident memory in pages of files, which workers share",
                lambda one: (one["memory"] or {}).get("shared"),
            ),
        }
        for name, (help_text, value) in gauges.items():
            gauge = core.GaugeMetricFamily(name, help_text, labels=["worker"])
            for one in self._workers:
                number = value(one)
                if number is not None:
                    gauge.add_metric([str(one["worker"])], number)
            yield gauge
