"""What an Engine has done: counters, readable from Python and as Prometheus text."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lfx.errors import InputError, require
from lfx.runtime import forks

# Upper edges of the latency histogram, seconds: a tiny model on a GPU to a long document on a laptop.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)


@dataclass(frozen=True)
class Snapshot:
    """The counters at one moment.

    Attributes:
        requests: answered calls of `Engine.run`, and answered requests of a `Batcher`; failed: those that raised an
            error. What `Engine.stream` computes is in the counts below, and not in these.
        sequences, batches: what the backend computed.
        tokens: real ones; padding_tokens: computed beside them, to make a batch rectangular or because the caller's
            mask hides them.
        latency_counts: answered calls by latency, one count for each of LATENCY_BUCKETS and one above them all.
        latency_seconds: sum over all answered calls.
    """

    requests: int = 0
    failed: int = 0
    sequences: int = 0
    batches: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    latency_counts: tuple[int, ...] = (0,) * (len(LATENCY_BUCKETS) + 1)
    latency_seconds: float = 0.0

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that were padding, 0 to 1."""
        computed = self.tokens + self.padding_tokens
        return self.padding_tokens / computed if computed else 0.0


class Metrics:
    """Counters of one Engine. Thread-safe; a collector of the package prometheus_client."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counts = dict.fromkeys(("requests", "failed", "sequences", "batches", "tokens", "padding_tokens"), 0)
        self._latency_counts = [0] * (len(LATENCY_BUCKETS) + 1)
        self._latency_seconds = 0.0
        forks.watch(self)

    def forked(self) -> None:
        """In a child process: another thread may have held the lock."""
        self._lock = threading.RLock()

    def answered(self, seconds: float) -> None:
        """One call was answered after `seconds`."""
        place = next((i for i, edge in enumerate(LATENCY_BUCKETS) if seconds <= edge), len(LATENCY_BUCKETS))
        with self._lock:
            self._counts["requests"] += 1
            self._latency_counts[place] += 1
            self._latency_seconds += seconds

    def failed(self) -> None:
        """One call raised an error."""
        with self._lock:
            self._counts["failed"] += 1

    def computed(self, sequences: int, tokens: int, padding_tokens: int) -> None:
        """The backend computed one batch."""
        with self._lock:
            self._counts["batches"] += 1
            self._counts["sequences"] += sequences
            self._counts["tokens"] += tokens
            self._counts["padding_tokens"] += padding_tokens

    def snapshot(self) -> Snapshot:
        """All counters, of one moment."""
        with self._lock:
            return Snapshot(
                **self._counts, latency_counts=tuple(self._latency_counts), latency_seconds=self._latency_seconds
            )

    def prometheus(self) -> str:
        """The counters in Prometheus' text format, for an endpoint /metrics of your own.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        client = require("prometheus_client", "metrics")
        registry = client.CollectorRegistry()
        registry.register(self)
        return str(client.generate_latest(registry).decode())

    def register(self, registry: Any = None) -> None:
        """Have a registry collect the counters; it takes those of one Engine, since their names are the same.

        Args:
            registry: default: `prometheus_client.REGISTRY`.
        Raises:
            DependencyError: prometheus_client is not installed.
            InputError: the registry has the counters of an Engine already.
        """
        client = require("prometheus_client", "metrics")
        if registry is not None and not callable(getattr(registry, "register", None)):
            raise InputError(f"registry is {type(registry).__name__}; give a prometheus_client.CollectorRegistry")
        try:
            (client.REGISTRY if registry is None else registry).register(self)
        except ValueError as error:
            raise InputError(
                "this registry has the metrics of an Engine already; give each Engine a registry of its own: "
                "engine.metrics.register(prometheus_client.CollectorRegistry())"
            ) from error

    def describe(self) -> Iterable[Any]:
        """The names, which a registry compares with those that it has."""
        return self.collect()

    def collect(self) -> Iterable[Any]:
        """What prometheus_client asks of a collector; see `register`."""
        core = require("prometheus_client.core", "metrics")
        now = self.snapshot()
        for name, help_text in (
            ("requests", "Calls that were answered"),
            ("failed", "Calls that raised an error"),
            ("sequences", "Sequences that the backend computed"),
            ("batches", "Batches that the backend computed"),
            ("tokens", "Real tokens that were computed"),
            ("padding_tokens", "Padding tokens that were computed beside them"),
        ):
            yield core.CounterMetricFamily(f"lfx_{name}", help_text, value=getattr(now, name))
        total, buckets = 0, []
        for edge, count in zip((*map(str, LATENCY_BUCKETS), "+Inf"), now.latency_counts, strict=True):
            total += count
            buckets.append((edge, total))
        yield core.HistogramMetricFamily(
            "lfx_latency_seconds", "Latency of the answered calls", buckets=buckets, sum_value=now.latency_seconds
        )
