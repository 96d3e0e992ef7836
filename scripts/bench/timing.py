"""Interleaved timing on an NVIDIA GPU: of CUDA graphs by CUDA events, and of functions by the host's clock."""

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


@dataclass
class Captured:
    """A CUDA graph, and what it reads, whose memory PyTorch would otherwise give to others.

    Attributes:
        run: the captured function, which may hold weights and masks.
        sets: its arguments.
    """

    graph: Any
    run: Callable[[Any], Any]
    sets: list[Any]

    def replay(self) -> None:
        """Enqueue the graph."""
        self.graph.replay()


def capture(run: Callable[[Any], Any], sets: Iterable[Any]) -> tuple[Captured, list[Any]]:
    """Capture one CUDA graph of run(s) for all s in `sets`, after a warm-up; returns it and the outputs.

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
    return Captured(graph, run, sets), outputs


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


def measure(
    contenders: dict[str, Contender], seconds: float, most_rounds: int
) -> tuple[int, dict[str, dict[str, float]]]:
    """Time all contenders, alternating, with the L2 flushed before each.

    Args:
        seconds: approximate duration; the number of rounds is 5 to `most_rounds`.
    Returns:
        The number of rounds; and for each contender median_us, p5_us and p95_us of a call, and times_slower, the median
        over the rounds of its time divided by that of the contender lfx, if there is one.
    """
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE).zero_
    interleaved(contenders, 1, flush)
    torch.cuda.synchronize()
    started = time.perf_counter()
    interleaved(contenders, 1, flush)
    rounds = max(5, min(most_rounds, int(seconds / (time.perf_counter() - started))))
    times = interleaved(contenders, rounds, flush)
    results = {}
    for name, microseconds in times.items():
        p5, p50, p95 = map(float, np.percentile(microseconds, [5, 50, 95]))
        results[name] = {"median_us": p50, "p5_us": p5, "p95_us": p95}
        if "lfx" in times:
            ratios = [a / b for a, b in zip(microseconds, times["lfx"], strict=True)]
            results[name]["times_slower"] = statistics.median(ratios)
    return rounds, results
