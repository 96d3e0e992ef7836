"""Counters of an Engine, readable from Python and as Prometheus text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lfx.checks import shown
from lfx.errors import InputError, require
from lfx.runtime import forks
from lfx.runtime.inputs import Feeds

# Upper bounds of the latency histogram's buckets, in seconds: from a tiny model on a GPU to a long document on a CPU.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)


@dataclass(frozen=True)
class Snapshot:
    """The values of all counters at one moment.

    Attributes:
        requests: number of answered calls of `Engine.run` and `Engine.embed` and answered requests of a `Batcher`.
            Neither this nor `failed` counts documents of `Engine.stream`; the counters below do.
        failed: number of calls and requests that raised an error.
        sequences: number of sequences that the backend computed.
        batches: number of batches that the backend computed.
        tokens: number of real tokens that the backend computed.
        padding_tokens: number of masked tokens that the backend computed, padded by lfx or masked by the caller.
        latency_counts: answered calls by latency (not cumulative), one count for each of LATENCY_BUCKETS and one for
            longer calls.
        latency_seconds: sum of the latencies of all answered calls.
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
        """padding_tokens as a fraction of all computed tokens, 0 to 1."""
        computed = self.tokens + self.padding_tokens
        return self.padding_tokens / computed if computed else 0.0


class Metrics:
    """Counters of one Engine. Thread-safe. It is also a collector for the package prometheus_client."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counts = dict.fromkeys(("requests", "failed", "sequences", "batches", "tokens", "padding_tokens"), 0)
        self._latency_counts = [0] * (len(LATENCY_BUCKETS) + 1)
        self._latency_seconds = 0.0
        forks.watch(self)

    def forked(self) -> None:
        """Replace the lock in a child process, since another thread of the parent may have held it."""
        self._lock = threading.RLock()

    def answered(self, seconds: float) -> None:
        """Count a call that was answered after `seconds`."""
        bucket = next((i for i, edge in enumerate(LATENCY_BUCKETS) if seconds <= edge), len(LATENCY_BUCKETS))
        with self._lock:
            self._counts["requests"] += 1
            self._latency_counts[bucket] += 1
            self._latency_seconds += seconds

    def failed(self) -> None:
        """Count a call that raised an error."""
        with self._lock:
            self._counts["failed"] += 1

    def computed(self, sequences: int, tokens: int, padding_tokens: int) -> None:
        """Count a batch that the backend computed: its sequences, real tokens and masked tokens."""
        with self._lock:
            self._counts["batches"] += 1
            self._counts["sequences"] += sequences
            self._counts["tokens"] += tokens
            self._counts["padding_tokens"] += padding_tokens

    def computed_batch(self, feeds: Feeds) -> None:
        """Count a batch that the backend computed, by its inputs."""
        ids = feeds["input_ids"]
        real = int(feeds["attention_mask"].sum()) if "attention_mask" in feeds else ids.size
        self.computed(len(ids), real, ids.size - real)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count the call in this block: as answered after the block's time, or as failed if it raises an error."""
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.failed()
            raise
        self.answered(time.perf_counter() - start)

    def snapshot(self) -> Snapshot:
        """A consistent copy of all counters."""
        with self._lock:
            return Snapshot(
                **self._counts, latency_counts=tuple(self._latency_counts), latency_seconds=self._latency_seconds
            )

    def prometheus(self) -> str:
        """The counters in the Prometheus text format, for an endpoint such as /metrics.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        client = require("prometheus_client", "metrics")
        registry = client.CollectorRegistry()
        registry.register(self)
        return str(client.generate_latest(registry).decode())

    def register(self, registry: Any = None) -> None:
        """Add the counters to a registry of prometheus_client, which then collects them.

        A registry takes the counters of one Engine only, since those of two would have the same names.

        Args:
            registry: a CollectorRegistry. Default: `prometheus_client.REGISTRY`.
        Raises:
            DependencyError: prometheus_client is not installed.
            InputError: the argument is no registry, or the registry has the counters of an Engine already.
        """
        client = require("prometheus_client", "metrics")
        if not isinstance(registry, client.CollectorRegistry | None):
            raise InputError(f"registry is {shown(registry)}; give a prometheus_client.CollectorRegistry()")
        try:
            (client.REGISTRY if registry is None else registry).register(self)
        except ValueError as error:
            raise InputError(
                "this registry has the metrics of an Engine already; give each Engine a registry of its own: "
                "engine.metrics.register(prometheus_client.CollectorRegistry())"
            ) from error

    def describe(self) -> Iterable[Any]:
        """The metric families; a registry compares their names with those that it has."""
        return self.collect()

    def collect(self) -> Iterable[Any]:
        """Yield the metric families; prometheus_client calls this. See `register`."""
        return families({(): self.snapshot()})


def families(snapshots: Mapping[tuple[str, ...], Snapshot], labels: Sequence[str] = ()) -> Iterator[Any]:
    """Yield the metric families of prometheus_client for the counters of several Engines.

    Args:
        snapshots: values of the labels -> the counters with these labels.
        labels: names of the labels.
    Raises:
        DependencyError: prometheus_client is not installed.
    """
    core = require("prometheus_client.core", "metrics")
    for name, help_text in (
        ("requests", "Calls that were answered"),
        ("failed", "Calls that raised an error"),
        ("sequences", "Sequences that the backend computed"),
        ("batches", "Batches that the backend computed"),
        ("tokens", "Real tokens that were computed"),
        ("padding_tokens", "Padding tokens that were computed"),
    ):
        counter = core.CounterMetricFamily(f"lfx_{name}", help_text, labels=labels)
        for values, snapshot in snapshots.items():
            counter.add_metric(values, getattr(snapshot, name))
        yield counter
    histogram = core.HistogramMetricFamily("lfx_latency_seconds", "Latency of the answered calls", labels=labels)
    for values, snapshot in snapshots.items():
        cumulative, buckets = 0, []
        for edge, count in zip((*map(str, LATENCY_BUCKETS), "+Inf"), snapshot.latency_counts, strict=True):
            cumulative += count
            buckets.append((edge, cumulative))
        histogram.add_metric(values, buckets=buckets, sum_value=snapshot.latency_seconds)
    yield histogram
