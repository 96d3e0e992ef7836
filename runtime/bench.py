"""Latency and throughput of one or more contenders: interleaved runs on the same ids, in one process."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.checks import shown, whole_number
from lfx.errors import InputError, require
from lfx.files import replacing, why_unwritten

Run = Callable[[NDArray[np.int64]], Any]
# Generates a number of tokens for ids, (batch, seqlen), and calls a function after each.
Generate = Callable[[NDArray[np.int64], int, Callable[[], None]], Any]


def measure(
    contenders: Mapping[str, Run],
    lengths: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    rounds: int = 5,
    warm_up: bool = True,
    vocab_size: int = 32,
    progress: Callable[[str], None] = lambda step: None,
) -> list[dict[str, Any]]:
    """Time each contender at each length and batch size.

    All contenders get the same random ids and take turns (A B A B …) after one warm-up run each, so that a machine that
    slows down affects all of them.

    Args:
        contenders: name -> a function of ids, (batch, seqlen) int64. The others are compared with the first one.
        lengths: numbers of tokens of a sequence, 1 or more each.
        batch_sizes: 1 or more each.
        rounds: number of timed runs of each contender, 1 or more.
        warm_up: whether each contender runs once before it is timed. False is for contenders that have run before and
            take minutes.
        vocab_size: ids are 3 to vocab_size - 1; with a vocabulary of 4 or fewer they are all 3.
        progress: called with a description of each step.
    Returns:
        One row for each batch size, length and contender: contender, seqlen, batch, rounds, p50_ms, p5_ms, p95_ms,
        tokens_per_second (at p50) and times_the_first, the median over the rounds of the contender's time divided by
        the first contender's: above 1 if the first is faster.
    Raises:
        InputError: an argument has another type or is out of range, or there is nothing to measure.
    """
    rounds, vocab_size = _check_options(contenders, lengths, batch_sizes, rounds, vocab_size)
    rows = []
    for batch in batch_sizes:
        for length in lengths:
            ids = np.random.default_rng([batch, length]).integers(3, max(vocab_size, 4), (batch, length))
            step = f"batch {batch}, {length} tokens"
            for name, run in contenders.items() if warm_up else ():
                progress(f"{step}: {name}, warming up")
                run(ids)
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for i in range(rounds):
                progress(f"{step}: round {i + 1} of {rounds}")
                for name, run in contenders.items():
                    start = time.perf_counter()
                    run(ids)
                    seconds[name].append(time.perf_counter() - start)
            first = next(iter(seconds.values()))
            rows += [_row(name, batch, length, times, first) for name, times in seconds.items()]
    return rows


def measure_generation(
    contenders: Mapping[str, Generate],
    lengths: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    new_tokens: int = 128,
    rounds: int = 5,
    warm_up: bool = True,
    vocab_size: int = 32,
    progress: Callable[[str], None] = lambda step: None,
) -> list[dict[str, Any]]:
    """Time the prefill and the decoding of each contender at each length and batch size; see `measure`.

    The prefill is the time to the first token: the encoder, and the first step of the decoder.

    Args:
        contenders: name -> a function of ids, the number of tokens and a callback, which is called after each token.
        new_tokens: number of tokens of each row, 2 or more.
    Returns:
        One row for each batch size, length and contender: contender, seqlen, batch, new_tokens, rounds, prefill_p50_ms,
        prefill_p5_ms, prefill_p95_ms, prefill_tokens_per_second; decode_tokens_per_second (median over the rounds; of
        all rows together), decode_p5_tokens_per_second, decode_p95_tokens_per_second; and prefill_times_the_first and
        decode_times_the_first, the medians of the contender's time divided by the first contender's.
    Raises:
        InputError: an argument has another type or is out of range, or a contender writes another number of tokens.
    """
    rounds, vocab_size = _check_options(contenders, lengths, batch_sizes, rounds, vocab_size)
    new_tokens = whole_number(new_tokens, "new_tokens", 2)
    rows = []
    for batch in batch_sizes:
        for length in lengths:
            ids = np.random.default_rng([batch, length]).integers(3, max(vocab_size, 4), (batch, length))
            step = f"batch {batch}, {length} tokens"
            for name, run in contenders.items() if warm_up else ():
                progress(f"{step}: {name}, warming up")
                _time_generation(name, run, ids, 2)
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            for i in range(rounds):
                progress(f"{step}: round {i + 1} of {rounds}")
                for name, run in contenders.items():
                    seconds[name].append(_time_generation(name, run, ids, new_tokens))
            first = next(iter(seconds.values()))
            rows += [_generation_row(name, batch, length, new_tokens, times, first) for name, times in seconds.items()]
    return rows


def _time_generation(name: str, run: Generate, ids: NDArray[np.int64], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last one."""
    times = [time.perf_counter()]
    run(ids, new_tokens, lambda: times.append(time.perf_counter()))
    if len(times) != new_tokens + 1:
        raise InputError(f"{name} writes {len(times) - 1} tokens where {new_tokens} are measured; forbid its end token")
    return times[1] - times[0], times[-1] - times[1]


def _generation_row(
    name: str,
    batch: int,
    length: int,
    new_tokens: int,
    seconds: Sequence[tuple[float, float]],
    first: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """A row of `measure_generation`, from the times of a contender and those of the first one."""
    p5, p50, p95 = (1000 * float(p) for p in np.percentile([prefill for prefill, _ in seconds], [5, 50, 95]))
    rates = [batch * (new_tokens - 1) / decode for _, decode in seconds]
    slow, median, fast = (float(rate) for rate in np.percentile(rates, [5, 50, 95]))
    return {
        "contender": name,
        "seqlen": length,
        "batch": batch,
        "new_tokens": new_tokens,
        "rounds": len(seconds),
        "prefill_p50_ms": p50,
        "prefill_p5_ms": p5,
        "prefill_p95_ms": p95,
        "prefill_tokens_per_second": batch * length / p50 * 1000,
        "decode_tokens_per_second": median,
        "decode_p5_tokens_per_second": slow,
        "decode_p95_tokens_per_second": fast,
        "prefill_times_the_first": statistics.median(a[0] / b[0] for a, b in zip(seconds, first, strict=True)),
        "decode_times_the_first": statistics.median(a[1] / b[1] for a, b in zip(seconds, first, strict=True)),
    }


def _check_options(contenders: Any, lengths: Any, batch_sizes: Any, rounds: Any, vocab_size: Any) -> tuple[int, int]:
    """Check the arguments of `measure`; returns rounds and vocab_size."""
    rounds = whole_number(rounds, "rounds", low=1)
    vocab_size = whole_number(vocab_size, "vocab_size", 1, np.iinfo(np.int64).max)
    for name, numbers in (("lengths", lengths), ("batch_sizes", batch_sizes)):
        if not isinstance(numbers, Sequence) or isinstance(numbers, str | bytes) or len(numbers) == 0:
            raise InputError(f"{name} is {shown(numbers)}; give a list of at least one whole number")
        for number in numbers:
            whole_number(number, name, low=1)
    if not isinstance(contenders, Mapping) or len(contenders) == 0:
        raise InputError(f"contenders is {shown(contenders)}; give at least one name and its function")
    return rounds, vocab_size


def _row(name: str, batch: int, length: int, seconds: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """A row of `measure`, from the times of a contender and those of the first one."""
    p5, p50, p95 = (1000 * float(p) for p in np.percentile(seconds, [5, 50, 95]))
    return {
        "contender": name,
        "seqlen": length,
        "batch": batch,
        "rounds": len(seconds),
        "p50_ms": p50,
        "p5_ms": p5,
        "p95_ms": p95,
        "tokens_per_second": batch * length / p50 * 1000,
        "times_the_first": statistics.median(a / b for a, b in zip(seconds, first, strict=True)),
    }


def peak_memory_bytes() -> int | None:
    """Peak resident set size of this process so far, imports included; None if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def check_plot(path: Path) -> None:
    """Check that matplotlib is installed and writes files of this suffix.

    Raises:
        DependencyError: matplotlib is not installed.
        InputError: it writes no such files.
    """
    formats = require("matplotlib.backend_bases", "report").FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise InputError(f"{path} has a suffix that no plot has; give one of: {', '.join(sorted(formats))}")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot tokens per second over sequence length, on log axes, with one line for each contender and batch size.

    Args:
        rows: as `measure` returns them.
        path: path of the figure. Its suffix decides the format; PNG without a suffix.
    Raises:
        DependencyError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with own_style() as pyplot:
        _plot(rows, path, pyplot)


@contextlib.contextmanager
def own_style(**settings: Any) -> Iterator[Any]:
    """Yield matplotlib.pyplot with matplotlib's defaults and these settings, whatever a matplotlibrc file says.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "report")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield pyplot


def _plot(rows: Sequence[Mapping[str, Any]], path: Path, pyplot: Any) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    sizes = sorted({row["batch"] for row in rows})
    for contender, batch in dict.fromkeys((row["contender"], row["batch"]) for row in rows):
        points = [r for r in rows if (r["contender"], r["batch"]) == (contender, batch)]
        points.sort(key=lambda r: r["seqlen"])
        lengths, rates = [r["seqlen"] for r in points], [r["tokens_per_second"] for r in points]
        index, style = contenders.index(contender), ("-", "--", ":", "-.")[sizes.index(batch) % 4]
        label = f"{contender}, batch {batch}"
        axes.plot(lengths, rates, style, color=f"C{index}", marker="osD^vPX*"[index % 8], label=label)
    ticks = sorted({row["seqlen"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_locator(require("matplotlib.ticker", "report").LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="sequence length, tokens", ylabel="tokens per second", title="Throughput over length")
    axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        with replacing(path) as drawn, drawn.open("wb") as file:
            figure.savefig(file, dpi=150, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise InputError(why_unwritten(path, error, "choose another --plot, such as plot.png")) from error
    finally:
        pyplot.close(figure)
