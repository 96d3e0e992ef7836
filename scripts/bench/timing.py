"""Interleaved device timing of functions on an NVIDIA GPU, by CUDA graphs and CUDA events.

Functions that run on the host are timed by lfx.runtime.bench.measure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

DEVICE = "cuda"
FLUSH_BYTES = 1 << 29  # written before each timing: larger than any L2, and long enough to hide the launch latency


@dataclass
class Contender:
    """A function to time.

    Attributes:
        run: enqueues the work of one round.
        calls: number of calls of the measured operation in one round.
        on_host: timed by the host's clock, with a synchronization before and after; otherwise by events on the stream.
    """

    run: Callable[[], Any]
    calls: int = 1
    on_host: bool = False


def capture(run: Callable[[Any], Any], sets: Iterable[Any]) -> tuple[Any, list[Any]]:
    """Capture one CUDA graph of run(s) for all s in `sets`, after a warm-up; returns the graph and the outputs.

    The outputs stay alive during the capture, so that no two calls write to the same memory.
    """
    import torch

    sets = list(sets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: libraries create handles and workspaces, torch.compile compiles
        for one in [*sets[:1], *sets]:
            run(one)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(one) for one in sets]
    return graph, outputs


def interleaved(contenders: dict[str, Contender], rounds: int, flush: Callable[[], Any]) -> dict[str, list[float]]:
    """Time all contenders, alternating; returns microseconds per call in each round.

    Args:
        flush: enqueued before each contender. It evicts the L2, and keeps the device busy while the host enqueues the
            work, so that the events measure device time without launch latency.
    """
    import torch

    times: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            flush()
            if contender.on_host:
                torch.cuda.synchronize()
                started = time.perf_counter()
                contender.run()
                torch.cuda.synchronize()
                times[name].append(1e6 * (time.perf_counter() - started) / contender.calls)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contender.run()
            end.record()
            times[name].append((start, end))
    torch.cuda.synchronize()
    for name, measured in times.items():
        calls = contenders[name].calls
        times[name] = [t if isinstance(t, float) else 1e3 * t[0].elapsed_time(t[1]) / calls for t in measured]
    return times


def flusher() -> Callable[[], Any]:
    """Return a function that overwrites the L2."""
    import torch

    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    return scratch.zero_


def rounds_for(contenders: dict[str, Contender], flush: Callable[[], Any], seconds: float, limit: int) -> int:
    """Return the number of rounds that fit into `seconds`, 5 to `limit`, by timing one."""
    import torch

    interleaved(contenders, 1, flush)
    torch.cuda.synchronize()
    started = time.perf_counter()
    interleaved(contenders, 1, flush)
    return max(5, min(limit, int(seconds / (time.perf_counter() - started))))


def summary(microseconds: list[float]) -> dict[str, float]:
    """Return median, 5th and 95th percentile."""
    p5, p95 = np.percentile(microseconds, [5, 95])
    return {"median_us": statistics.median(microseconds), "p5_us": float(p5), "p95_us": float(p95)}


def ratio(times: list[float], baseline: list[float]) -> float:
    """Return the median over the rounds of time over baseline time."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))
