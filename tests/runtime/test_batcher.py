"""`Batcher`: outputs, grouping, maximum delay, overload, cancellation, close."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfx.errors import InputError, LfxError, OverloadError
from lfx.export import export
from lfx.runtime import Batcher, Engine
from tests.conftest import MakeBundle
from tests.models import VOCAB_SIZE, tiny_model

LONG = 60.0  # seconds; a test waits this long only if something hangs


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Iterator[Engine]:
    with Engine(bundle(), threads=1) as opened:
        yield opened


def documents(count: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB_SIZE, int(n)) for n in random.integers(1, 100, count)]


class Recorded:
    """An Engine that records the sizes of its batches and can be made to wait."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.groups: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fails: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_together(self, requests: list[Any], **options: Any) -> Any:
        self.groups.append(len(requests))
        self.entered.set()
        assert self.gate.wait(LONG)
        if self.fails is not None:
            raise self.fails
        return self._engine.run_together(requests, **options)


def answers_alike(outputs: dict[str, Any], expected: dict[str, Any]) -> bool:
    return outputs.keys() == expected.keys() and all(
        outputs[name].shape == expected[name].shape and np.allclose(outputs[name], expected[name], atol=1e-5)
        for name in expected
    )


def test_each_thread_gets_its_own_outputs(engine: Engine) -> None:
    sequences = documents(64)
    answers: list[Any] = [None] * len(sequences)
    with Batcher(engine, max_delay_ms=20, workers=2) as batcher:

        def ask(i: int) -> None:
            answers[i] = batcher.submit(sequences[i]).result(LONG)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(sequences))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(answers_alike(answers[i], engine.run(ids)) for i, ids in enumerate(sequences))


def test_masks_apply_to_their_own_request(engine: Engine) -> None:
    ids = np.arange(3, 33)
    mask, marks = np.ones_like(ids), np.zeros_like(ids)
    mask[20:], marks[[0, 7]] = 0, 1
    with Batcher(engine, max_delay_ms=200) as batcher:
        plain, masked = batcher.submit(ids), batcher.submit(ids, mask, marks)
        assert answers_alike(masked.result(LONG), engine.run(ids, mask, marks))
        assert answers_alike(plain.result(LONG), engine.run(ids))
    assert not answers_alike(masked.result(), plain.result())


def test_concurrent_requests_run_as_one_batch(engine: Engine) -> None:
    recorded = Recorded(engine)
    with Batcher(recorded, max_delay_ms=500) as batcher:  # type: ignore[arg-type]
        futures = [batcher.submit(np.arange(3, 40)) for _ in range(8)]
        [future.result(LONG) for future in futures]
    assert recorded.groups == [8]


def test_a_full_batch_does_not_wait(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=3_000_000, token_budget=64) as batcher:
        futures = [batcher.submit(np.arange(3, 19)) for _ in range(4)]  # 64 tokens
        [future.result(LONG) for future in futures]


def test_a_single_request_waits_max_delay(engine: Engine) -> None:
    engine.warm_up([(1, 10)])
    with Batcher(engine, max_delay_ms=50) as batcher:
        start = time.monotonic()
        batcher.submit(np.arange(3, 13)).result(LONG)
        elapsed = time.monotonic() - start
    assert elapsed >= 0.045


def test_very_different_lengths_run_in_separate_batches(engine: Engine) -> None:
    recorded = Recorded(engine)
    with Batcher(recorded, max_delay_ms=300) as batcher:  # type: ignore[arg-type]
        futures = [batcher.submit(np.arange(3, 3 + n)) for n in (5, 96, 5, 96, 5)]
        [future.result(LONG) for future in futures]
    assert sorted(recorded.groups) == [2, 3]


def test_a_bad_request_is_refused_at_once_and_other_requests_are_answered(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=100) as batcher:
        good = batcher.submit(np.arange(3, 20))
        for bad in ([VOCAB_SIZE], [], "text", [[3, 4], [5, 6]], list(range(3, 3 + 200))):
            with pytest.raises(InputError):
                batcher.submit(bad)
        assert answers_alike(good.result(LONG), engine.run(np.arange(3, 20)))


def test_more_than_max_pending_requests_are_an_overload(engine: Engine) -> None:
    recorded = Recorded(engine)
    recorded.gate.clear()
    with Batcher(recorded, max_delay_ms=0, max_pending=2) as batcher:  # type: ignore[arg-type]
        running = batcher.submit([3, 4])
        assert recorded.entered.wait(LONG)
        waiting = [batcher.submit([3, 4, 5]) for _ in range(2)]
        with pytest.raises(OverloadError, match="2 requests are waiting already"):
            batcher.submit([3])
        recorded.gate.set()
        assert all(future.result(LONG) for future in (running, *waiting))


def test_a_cancelled_request_is_not_computed(engine: Engine) -> None:
    recorded = Recorded(engine)
    recorded.gate.clear()
    with Batcher(recorded, max_delay_ms=0) as batcher:  # type: ignore[arg-type]
        running = batcher.submit([3, 4])
        assert recorded.entered.wait(LONG)
        cancelled, kept = batcher.submit([5, 6, 7]), batcher.submit([5, 6, 7])
        assert cancelled.cancel()
        recorded.gate.set()
        assert kept.result(LONG)
        assert running.result(LONG)
    assert recorded.groups == [1, 1]
    with pytest.raises(CancelledError):
        cancelled.result()


def test_an_error_of_the_backend_reaches_all_requests_of_its_batch_and_no_other(engine: Engine) -> None:
    recorded = Recorded(engine)
    recorded.fails = LfxError("out of memory")
    with Batcher(recorded, max_delay_ms=50) as batcher:  # type: ignore[arg-type]
        lost = [batcher.submit([3, 4]) for _ in range(2)]
        for future in lost:
            with pytest.raises(LfxError, match="out of memory"):
                future.result(LONG)
        recorded.fails = None
        assert batcher.submit([3, 4]).result(LONG)


def test_a_request_that_the_backend_fails_on_does_not_fail_the_others_of_its_batch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(feeds: dict[str, Any], *names: Any, **options: Any) -> Any:
        if (feeds["input_ids"] == 9).any():
            raise LfxError("id 9 is outside a table of the model")
        return infer(feeds, *names, **options)

    infer = engine._backend.infer  # type: ignore[union-attr]
    monkeypatch.setattr(engine._backend, "infer", fail)
    recorded = Recorded(engine)
    with Batcher(recorded, max_delay_ms=300) as batcher:  # type: ignore[arg-type]
        futures = [batcher.submit([3, token]) for token in (4, 9, 5)]
        for future, token in zip(futures, (4, 9, 5), strict=True):
            if token == 9:
                with pytest.raises(LfxError, match="outside a table"):
                    future.result(LONG)
            else:
                assert answers_alike(future.result(LONG), engine.run([3, token]))
    assert recorded.groups == [3, 1, 1, 1]


def test_requests_fail_when_the_engine_is_closed_first(bundle: MakeBundle) -> None:
    engine = Engine(bundle(), threads=1)
    with Batcher(engine, max_delay_ms=100) as batcher:
        lost = batcher.submit([3, 4])
        engine.close()
        with pytest.raises(InputError, match="closed"):
            lost.result(LONG)
        with pytest.raises(InputError, match="closed"):
            batcher.submit([3, 4]).result(LONG)


def test_a_callback_that_is_no_function_is_refused(bundle: MakeBundle) -> None:
    wrong: Any = 5
    with Engine(bundle(), threads=1) as engine, Batcher(engine) as batcher:
        future = batcher.submit([3, 4])
        with pytest.raises(InputError, match="fn is 5; give a function"):
            future.add_done_callback(wrong)
        assert future.result(LONG)


def test_a_callback_may_submit_again_after_the_engine_is_closed(bundle: MakeBundle) -> None:
    engine = Engine(bundle(), threads=1)
    again: list[Future[Any]] = []
    with Batcher(engine, max_delay_ms=200) as batcher:
        lost = [batcher.submit([3, 4]) for _ in range(2)]
        lost[0].add_done_callback(lambda _: again.append(batcher.submit([3, 4])))
        engine.close()
        for future in lost:
            with pytest.raises(InputError, match="closed"):
                future.result(LONG)
        with pytest.raises(InputError, match="closed"):
            again[0].result(LONG)


def test_callbacks_may_close_the_batcher(engine: Engine) -> None:
    recorded, closed = Recorded(engine), [threading.Event() for _ in range(4)]
    recorded.gate.clear()
    batcher = Batcher(recorded, max_delay_ms=0, token_budget=2, workers=2)  # type: ignore[arg-type]
    futures = [batcher.submit([3, 4]) for _ in closed]
    for future, event in zip(futures, closed, strict=True):
        future.add_done_callback(lambda _, event=event: (batcher.close(), event.set()))  # type: ignore[misc]
    recorded.gate.set()
    assert all(future.result(LONG) for future in futures)  # those that were pending too
    assert all(event.wait(LONG) for event in closed)
    with pytest.raises(OverloadError, match="closed"):
        batcher.submit([3, 4])


@pytest.mark.parametrize("interrupted", ["submit", "submit, and submits", "close"])
def test_a_signal_handler_may_close_the_batcher_while_its_thread_is_inside(interrupted: str, engine: Engine) -> None:
    batcher, futures, handled = Batcher(engine, max_delay_ms=0), list[Future[Any]](), list[bool]()
    notify_all = batcher._changed.notify_all

    def handle() -> None:
        if not handled:
            handled.append(True)
            if interrupted == "submit, and submits":
                futures.append(batcher.submit([5]))
            batcher.close()

    class Interrupted(deque[Any]):
        def append(self, request: Any) -> None:
            super().append(request)
            handle()

    def use() -> None:
        if interrupted == "close":
            batcher._changed.notify_all = lambda: (handle(), notify_all())[1]  # type: ignore[method-assign]
        else:
            batcher._pending = Interrupted()
            futures.append(batcher.submit([3, 4]))
        batcher.close()

    using = threading.Thread(target=use, daemon=True)
    using.start()
    using.join(LONG)
    assert handled
    assert not using.is_alive()
    assert all(future.result(LONG) for future in futures)
    assert not any(worker.is_alive() for worker in batcher._workers)


def test_close_does_not_wait_for_the_delay_after_the_engine_is_closed(bundle: MakeBundle) -> None:
    engine = Engine(bundle(), threads=1)
    batcher = Batcher(engine, max_delay_ms=3_000_000)
    lost = [batcher.submit([3, 4]) for _ in range(3)]
    engine.close()
    batcher.close()
    assert all(isinstance(future.exception(LONG), InputError) for future in lost)


def test_cancelled_requests_do_not_count_as_pending(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=3_000_000, max_pending=2) as batcher:
        for _ in range(6):
            assert batcher.submit([3, 4]).cancel()
        future = batcher.submit([3, 4])
    assert future.result(LONG)


class Unmasked(torch.nn.Module):
    """A model without an attention_mask, so that padding cannot be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids).last_hidden_state


@pytest.mark.slow
def test_without_a_mask_only_equal_lengths_run_together(tmp_path: Path) -> None:
    sequences = [np.arange(3, 3 + n) for n in (20, 23, 20, 23)]
    with Engine(export(Unmasked().eval(), tmp_path / "bundle"), threads=1) as engine:
        with Batcher(engine, max_delay_ms=200) as batcher:
            futures = [batcher.submit(ids) for ids in sequences]
            for ids, future in zip(sequences, futures, strict=True):
                assert answers_alike(future.result(LONG), engine.run(ids))
        for ids, row in zip(sequences, engine.stream(sequences), strict=True):
            assert answers_alike({name: array[None] for name, array in row.items()}, engine.run(ids))


def test_the_token_budget_counts_all_choices(bundle: MakeBundle) -> None:
    with Engine(bundle("multiple-choice"), threads=1) as engine:
        recorded = Recorded(engine)
        ids, zero = np.full((4, 20), 5), np.zeros((4, 20), int)
        with Batcher(recorded, max_delay_ms=200, token_budget=160) as batcher:  # type: ignore[arg-type]
            [future.result(LONG) for future in [batcher.submit(ids, None, zero) for _ in range(4)]]
    assert max(recorded.groups) <= 2


def test_close_runs_pending_requests_and_refuses_new_ones(engine: Engine) -> None:
    batcher = Batcher(engine, max_delay_ms=3_000_000)
    futures: list[Future[Any]] = [batcher.submit([3, 4, 5]) for _ in range(3)]
    batcher.close()
    batcher.close()
    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(OverloadError, match="closed"):
        batcher.submit([3])


def test_asyncio_calls_give_the_engine_s_outputs(engine: Engine) -> None:
    sequences = documents(20, seed=1)

    async def ask_all() -> tuple[list[Any], Any]:
        with Batcher(engine, max_delay_ms=20) as batcher:
            together = await asyncio.gather(*(batcher.run(ids) for ids in sequences))
        return together, await engine.run_async(sequences[0])

    together, alone = asyncio.run(ask_all())
    assert all(answers_alike(outputs, engine.run(ids)) for outputs, ids in zip(together, sequences, strict=True))
    assert answers_alike(alone, engine.run(sequences[0]))


def test_multiple_choice_groups_equal_numbers_of_choices(bundle: MakeBundle) -> None:
    random = np.random.default_rng(0)
    with Engine(bundle("multiple-choice"), threads=1) as engine, Batcher(engine, max_delay_ms=100) as batcher:
        sequences = [random.integers(3, VOCAB_SIZE, (choices, 20)) for choices in (2, 3, 2)]
        masks = [np.zeros_like(ids) for ids in sequences]
        futures = [batcher.submit(ids, None, zero) for ids, zero in zip(sequences, masks, strict=True)]
        for ids, zero, future in zip(sequences, masks, futures, strict=True):
            assert answers_alike(future.result(LONG), engine.run(ids, None, zero))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_delay_ms": -1}, "max_delay_ms -1 is out of range"),
        ({"max_delay_ms": float("nan")}, "max_delay_ms nan is out of range"),
        ({"max_delay_ms": 10**400}, "max_delay_ms an int is out of range"),
        ({"max_delay_ms": "5"}, "max_delay_ms is '5'; give a number"),
        ({"max_delay_ms": None}, "max_delay_ms is None; give a number"),
        ({"max_delay_ms": True}, "max_delay_ms is True; give a number"),
        ({"token_budget": 0}, "token_budget 0 is out of range"),
        ({"token_budget": "x"}, "token_budget is 'x'; give a whole number"),
        ({"token_budget": float("nan")}, "token_budget is nan"),
        ({"max_pending": 0}, "max_pending 0 is out of range"),
        ({"max_pending": 2.5}, "max_pending is 2.5; give a whole number"),
        ({"workers": 0}, "workers 0 is out of range; give a whole number from 1 to 1024"),
        ({"workers": 1025}, "workers 1025 is out of range"),
        ({"workers": "2"}, "workers is '2'; give a whole number"),
        ({"engine": None}, "engine is NoneType; give an Engine"),
        ({"engine": "my-bundle"}, "engine is str; give an Engine"),
    ],
    ids=str,
)
def test_arguments_of_another_type_or_out_of_range_are_refused(
    engine: Engine, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Batcher(**{"engine": engine, **wrong})


def test_a_batcher_cannot_be_pickled(engine: Engine) -> None:
    with Batcher(engine) as batcher, pytest.raises(InputError, match="cannot be pickled or copied"):
        pickle.dumps(batcher)


def exits(_: Any) -> None:
    """Raise SystemExit, as a callback."""
    raise SystemExit("mine")


def test_exceptions_of_callbacks_are_logged_and_all_other_requests_are_answered(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded(engine)
    called = threading.Event()
    with Batcher(recorded, max_delay_ms=0) as batcher:  # type: ignore[arg-type]
        for fails in (None, LfxError("out of memory")):
            recorded.fails = fails
            recorded.gate.clear()
            first = batcher.submit([3, 4])
            for callback in (exits, lambda _: 1 / 0, lambda _: called.set()):
                first.add_done_callback(callback)
            recorded.gate.set()
            assert first.exception(LONG) is fails
            assert called.wait(LONG)  # a callback after the two that raised
            called.clear()
        recorded.fails = None
        assert batcher.submit([3, 4]).result(LONG)
    logged = [record for record in caplog.records if record.name == "lfx"]
    assert [str(record.exc_info[0].__name__) for record in logged if record.exc_info and record.exc_info[0]] == [
        "SystemExit",
        "ZeroDivisionError",
    ] * 2


def test_a_callback_may_end_the_caller_s_own_thread(engine: Engine) -> None:
    with Batcher(engine) as batcher:
        done = batcher.submit([3, 4])
        done.result(LONG)
        with pytest.raises(SystemExit):
            done.add_done_callback(exits)


def test_a_worker_that_dies_fails_pending_requests_and_refuses_new_ones(engine: Engine, monkeypatch: Any) -> None:
    batcher = Batcher(engine, max_delay_ms=3_000_000)
    waiting = [batcher.submit([3, 4]) for _ in range(3)]
    monkeypatch.setattr(batcher, "_run", lambda group: 1 / 0)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    for future in waiting:
        assert isinstance(future.exception(LONG), LfxError)
    closing.join(LONG)
    assert not closing.is_alive()
    with pytest.raises(LfxError, match=r"a worker of this Batcher died \(division by zero\); make a new one"):
        batcher.submit([3, 4])
    batcher.close()


def test_a_future_that_the_caller_completed_affects_no_other_request(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=50) as batcher:
        own, other = batcher.submit([3, 4]), batcher.submit([3, 4])
        own.set_result({})
        assert other.result(LONG)
        assert batcher.submit([3, 4]).result(LONG)


def test_waiters_of_cancelled_requests_are_notified_in_an_overload(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=3_000_000, max_pending=2) as batcher:
        unwanted = [batcher.submit([3, 4]) for _ in range(2)]
        assert all(future.cancel() for future in unwanted)
        batcher.submit([3, 4])
        assert not wait(unwanted, LONG).not_done


def test_cancel_close_and_overload_at_any_moment_leave_no_future_unfinished(engine: Engine) -> None:
    random = np.random.default_rng(0)
    for round_number in range(8):
        batcher = Batcher(engine, max_delay_ms=1, max_pending=8, workers=2, token_budget=64)
        futures: list[Future[Any]] = []
        start = threading.Barrier(6)

        def ask(seed: int, batcher: Batcher = batcher, futures: Any = futures, start: Any = start) -> None:
            mine = np.random.default_rng(seed)
            start.wait(LONG)
            for _ in range(30):
                try:
                    future = batcher.submit(mine.integers(3, VOCAB_SIZE, int(mine.integers(1, 30))))
                except OverloadError:
                    continue
                futures.append(future)
                if mine.random() < 0.3:
                    future.cancel()
                elif mine.random() < 0.1:
                    future.add_done_callback(exits)
                elif mine.random() < 0.02:
                    future.add_done_callback(lambda _: batcher.close())

        def close(batcher: Batcher = batcher, start: Any = start, delay: float = float(random.random())) -> None:
            start.wait(LONG)
            time.sleep(delay / 20)
            batcher.close()

        threads = [threading.Thread(target=ask, args=(4 * round_number + i,)) for i in range(4)]
        threads += [threading.Thread(target=close) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
        assert not wait(futures, LONG).not_done


def test_batchers_that_close_each_other_from_callbacks_both_stop(engine: Engine) -> None:
    pair = [Batcher(engine, max_delay_ms=3_000_000) for _ in range(2)]
    closed = [threading.Event() for _ in pair]
    start = threading.Barrier(2)
    for batcher, other, event in zip(pair, reversed(pair), closed, strict=True):

        def close(_: Any, other: Batcher = other, event: threading.Event = event) -> None:
            start.wait(LONG)
            other.close()
            event.set()

        batcher.submit([3, 4]).add_done_callback(close)
    for batcher in pair:
        batcher._delay = 0
        with batcher._changed:
            batcher._changed.notify_all()
    assert all(event.wait(LONG) for event in closed)


def test_a_process_that_ends_completes_the_batch_and_fails_pending_requests(bundle: MakeBundle) -> None:
    program = """
import sys, threading, time
from lfx.runtime import Batcher, Engine

class Slow:
    def __init__(self, engine):
        self.engine, self.entered = engine, threading.Event()
    def __getattr__(self, name):
        return getattr(self.engine, name)
    def run_together(self, requests, **options):
        self.entered.set()
        time.sleep(1)
        return self.engine.run_together(requests, **options)

engine = Slow(Engine(sys.argv[1], threads=1))
batcher = Batcher(engine, max_delay_ms=0)
def show(name):
    return lambda future: print(name, type(future.exception()).__name__, flush=True)
batcher.submit([3, 4]).add_done_callback(show("running"))
engine.entered.wait()
batcher.submit([3, 4]).add_done_callback(show("pending"))
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program, bundle()], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert ended.stdout.splitlines() == ["pending OverloadError", "running NoneType"]
