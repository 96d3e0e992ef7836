"""The counters of an Engine, and their Prometheus text."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from lfx.errors import DependencyError, InputError
from lfx.runtime import Batcher, Engine
from lfx.runtime.metrics import LATENCY_BUCKETS, Metrics
from tests.conftest import MakeBundle


def test_runs_batches_tokens_and_failures_are_counted(bundle: MakeBundle) -> None:
    with Engine(bundle(), threads=1) as engine:
        engine.run([[3, 4, 5], [3, 4, 5]])
        engine.run([[3] * 10, [3] * 8])  # one batch with two padding tokens
        engine.run([3, 4, 5, 6], attention_mask=[1, 1, 1, 0])
        with pytest.raises(InputError):
            engine.run([])
        counts = engine.metrics.snapshot()
    assert (counts.requests, counts.failed, counts.sequences, counts.batches) == (3, 1, 5, 3)
    assert (counts.tokens, counts.padding_tokens) == (6 + 18 + 3, 2 + 1)
    assert counts.padding_share == pytest.approx(3 / 30)
    assert sum(counts.latency_counts) == 3
    assert counts.latency_seconds > 0


def test_streams_count_tokens_and_batchers_count_requests(bundle: MakeBundle) -> None:
    with Engine(bundle(), threads=1) as engine:
        list(engine.stream([[3, 4], [3, 4, 5]]))
        assert engine.metrics.snapshot().requests == 0
        assert engine.metrics.snapshot().tokens == 5
        with Batcher(engine) as batcher:
            batcher.submit([3, 4]).result()
        assert engine.metrics.snapshot().requests == 1
        assert engine.metrics.snapshot().tokens == 7


def test_warm_up_is_not_counted(bundle: MakeBundle) -> None:
    for task in ("feature-extraction", "question-answering", "multiple-choice"):
        with Engine(bundle(task), threads=1) as engine:
            engine.warm_up()
            engine.warm_up([(2, 7)])
            assert engine.metrics.snapshot() == Metrics().snapshot()


def test_no_count_is_lost_between_threads() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.answered(0.02)
            metrics.computed(1, 2, 3)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = metrics.snapshot()
    assert (counts.requests, counts.batches) == (16000, 16000)
    assert (counts.tokens, counts.padding_tokens) == (32000, 48000)
    assert counts.latency_counts[LATENCY_BUCKETS.index(0.025)] == 16000


def test_prometheus_parses_the_text() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    metrics = Metrics()
    metrics.answered(0.003)
    metrics.answered(1000.0)
    metrics.computed(2, 30, 4)
    metrics.failed()
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in parser.text_string_to_metric_families(metrics.prometheus())
        for sample in family.samples
    }
    assert samples["lfx_requests_total", None] == 2
    assert samples["lfx_failed_total", None] == 1
    assert samples["lfx_sequences_total", None] == 2
    assert samples["lfx_tokens_total", None] == 30
    assert samples["lfx_padding_tokens_total", None] == 4
    assert samples["lfx_latency_seconds_count", None] == 2
    assert samples["lfx_latency_seconds_sum", None] == pytest.approx(1000.003)
    assert samples["lfx_latency_seconds_bucket", "0.0025"] == 0
    assert samples["lfx_latency_seconds_bucket", "0.005"] == 1
    assert samples["lfx_latency_seconds_bucket", "60.0"] == 1
    assert samples["lfx_latency_seconds_bucket", "+Inf"] == 2


def test_a_registry_refuses_a_second_engine() -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    first, second = Metrics(), Metrics()
    first.register(registry)
    with pytest.raises(InputError, match=r"metrics of an Engine already; give each Engine a registry of its own"):
        second.register(registry)
    second.register(client.CollectorRegistry())
    assert registry.get_sample_value("lfx_requests_total") == 0


def test_what_is_no_registry_is_refused() -> None:
    client = pytest.importorskip("prometheus_client")
    for registry in (client.CollectorRegistry, client, Metrics(), 5, ""):
        with pytest.raises(InputError, match=r"registry is .*; give a prometheus_client\.CollectorRegistry\(\)"):
            Metrics().register(registry)


def test_without_prometheus_client_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(DependencyError, match=r"longformer-lfx\[metrics\]"):
        Metrics().prometheus()
    with pytest.raises(DependencyError, match=r"longformer-lfx\[metrics\]"):
        Metrics().register()


def test_a_plain_engine_needs_no_prometheus_client(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with Engine(bundle(), threads=1) as engine:
        engine.run(np.arange(3, 9))
        assert engine.metrics.snapshot().requests == 1


def test_a_signal_handler_may_read_the_metrics_that_it_interrupted(bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine, engine.metrics._lock:  # as if a signal interrupted `answered` in this thread
        assert engine.metrics.snapshot().requests == 0
