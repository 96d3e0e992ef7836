"""Requests that arrive together run together: right answers, the latency bound, overload, cancelling, closing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
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

LONG = 60.0  # seconds; no test waits so long unless something hangs


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Iterator[Engine]:
    with Engine(bundle(), threads=1) as opened:
        yield opened


def documents(count: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB_SIZE, int(n)) for n in random.integers(1, 100, count)]


class Recorded:
    """An Engine whose batches are counted, and may be held back."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.groups: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fails: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_together(self, requests: list[Any]) -> Any:
        self.groups.append(len(requests))
        self.entered.set()
        assert self.gate.wait(LONG)
        if self.fails is not None:
            raise self.fails
        return self._engine.run_together(requests)


def answers_alike(found: dict[str, Any], right: dict[str, Any]) -> bool:
    return found.keys() == right.keys() and all(
        found[name].shape == right[name].shape and np.allclose(found[name], right[name], atol=1e-5) for name in right
    )


def test_every_thread_gets_its_own_answer(engine: Engine) -> None:
    wanted = documents(64)
    found: list[Any] = [None] * len(wanted)
    with Batcher(engine, max_delay_ms=20, workers=2) as batcher:

        def ask(i: int) -> None:
            found[i] = batcher.submit(wanted[i]).result(LONG)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(wanted))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(answers_alike(found[i], engine.run(ids)) for i, ids in enumerate(wanted))


def test_masks_go_with_their_request(engine: Engine) -> None:
    ids = np.arange(3, 33)
    mask, marks = np.ones_like(ids), np.zeros_like(ids)
    mask[20:], marks[[0, 7]] = 0, 1
    with Batcher(engine, max_delay_ms=200) as batcher:
        plain, masked = batcher.submit(ids), batcher.submit(ids, mask, marks)
        assert answers_alike(masked.result(LONG), engine.run(ids, mask, marks))
        assert answers_alike(plain.result(LONG), engine.run(ids))
    assert not answers_alike(masked.result(), plain.result())


def test_what_arrives_together_runs_together(engine: Engine) -> None:
    recorded = Recorded(engine)
    with Batcher(recorded, max_delay_ms=500) as batcher:  # type: ignore[arg-type]
        futures = [batcher.submit(np.arange(3, 40)) for _ in range(8)]
        [future.result(LONG) for future in futures]
    assert recorded.groups == [8]


def test_a_full_batch_does_not_wait(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=3_000_000, token_budget=64) as batcher:
        futures = [batcher.submit(np.arange(3, 19)) for _ in range(4)]  # 64 tokens
        [future.result(LONG) for future in futures]


def test_nobody_waits_longer_for_company_than_promised(engine: Engine) -> None:
    engine.warm_up([(1, 10)])
    with Batcher(engine, max_delay_ms=50) as batcher:
        start = time.monotonic()
        batcher.submit(np.arange(3, 13)).result(LONG)
        taken = time.monotonic() - start
    assert 0.045 <= taken < 2.0  # the bound, and a slow machine's computing


def test_lengths_apart_run_in_batches_of_their_own(engine: Engine) -> None:
    recorded = Recorded(engine)
    with Batcher(recorded, max_delay_ms=300) as batcher:  # type: ignore[arg-type]
        futures = [batcher.submit(np.arange(3, 3 + n)) for n in (5, 96, 5, 96, 5)]
        [future.result(LONG) for future in futures]
    assert sorted(recorded.groups) == [2, 3]


def test_a_bad_request_is_refused_at_once_and_its_neighbours_are_answered(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=100) as batcher:
        good = batcher.submit(np.arange(3, 20))
        for bad in ([VOCAB_SIZE], [], "text", [[3, 4], [5, 6]], list(range(3, 3 + 200))):
            with pytest.raises(InputError):
                batcher.submit(bad)
        assert answers_alike(good.result(LONG), engine.run(np.arange(3, 20)))


def test_more_than_may_wait_is_an_overload(engine: Engine) -> None:
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
        unwanted, wanted = batcher.submit([5, 6, 7]), batcher.submit([5, 6, 7])
        assert unwanted.cancel()
        recorded.gate.set()
        assert wanted.result(LONG)
        assert running.result(LONG)
    assert recorded.groups == [1, 1]
    with pytest.raises(CancelledError):
        unwanted.result()


def test_an_error_of_the_backend_reaches_every_request_of_the_batch_and_no_other(engine: Engine) -> None:
    recorded = Recorded(engine)
    recorded.fails = LfxError("out of memory")
    with Batcher(recorded, max_delay_ms=50) as batcher:  # type: ignore[arg-type]
        lost = [batcher.submit([3, 4]) for _ in range(2)]
        for future in lost:
            with pytest.raises(LfxError, match="out of memory"):
                future.result(LONG)
        recorded.fails = None
        assert batcher.submit([3, 4]).result(LONG)


def test_nobody_hangs_when_the_engine_is_closed_first(bundle: MakeBundle) -> None:
    engine = Engine(bundle(), threads=1)
    with Batcher(engine, max_delay_ms=100) as batcher:
        lost = batcher.submit([3, 4])
        engine.close()
        with pytest.raises(InputError, match="closed"):
            lost.result(LONG)
        with pytest.raises(InputError, match="closed"):
            batcher.submit([3, 4]).result(LONG)


def test_a_callback_may_submit_again_when_the_engine_is_gone(bundle: MakeBundle) -> None:
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


def test_callbacks_may_close_it(engine: Engine) -> None:
    recorded, closed = Recorded(engine), [threading.Event() for _ in range(4)]
    recorded.gate.clear()
    batcher = Batcher(recorded, max_delay_ms=0, token_budget=2, workers=2)  # type: ignore[arg-type]
    futures = [batcher.submit([3, 4]) for _ in closed]
    for future, event in zip(futures, closed, strict=True):
        future.add_done_callback(lambda _, event=event: (batcher.close(), event.set()))  # type: ignore[misc]
    recorded.gate.set()
    assert all(future.result(LONG) for future in futures)  # those that waited too
    assert all(event.wait(LONG) for event in closed)
    with pytest.raises(OverloadError, match="closed"):
        batcher.submit([3, 4])


def test_closing_does_not_wait_for_the_delay_when_the_engine_is_gone(bundle: MakeBundle) -> None:
    engine = Engine(bundle(), threads=1)
    batcher = Batcher(engine, max_delay_ms=3_000_000)
    lost = [batcher.submit([3, 4]) for _ in range(3)]
    engine.close()
    batcher.close()
    assert all(isinstance(future.exception(LONG), InputError) for future in lost)


def test_cancelled_requests_take_no_place(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=3_000_000, max_pending=2) as batcher:
        for _ in range(6):
            assert batcher.submit([3, 4]).cancel()
        wanted = batcher.submit([3, 4])
    assert wanted.result(LONG)


class Unmasked(torch.nn.Module):
    """A model that takes no attention_mask, so that no padding can be hidden from it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids).last_hidden_state


def test_without_a_mask_only_equal_lengths_run_together(tmp_path: Path) -> None:
    wanted = [np.arange(3, 3 + n) for n in (20, 23, 20, 23)]
    with Engine(export(Unmasked().eval(), tmp_path / "bundle"), threads=1) as engine:
        with Batcher(engine, max_delay_ms=200) as batcher:
            futures = [batcher.submit(ids) for ids in wanted]
            for ids, future in zip(wanted, futures, strict=True):
                assert answers_alike(future.result(LONG), engine.run(ids))
        with pytest.raises(InputError, match="no token can be masked"):
            list(engine.stream(wanted))


def test_the_budget_counts_every_choice(bundle: MakeBundle) -> None:
    with Engine(bundle("multiple-choice"), threads=1) as engine:
        recorded = Recorded(engine)
        ids, zero = np.full((4, 20), 5), np.zeros((4, 20), int)
        with Batcher(recorded, max_delay_ms=200, token_budget=160) as batcher:  # type: ignore[arg-type]
            [future.result(LONG) for future in [batcher.submit(ids, None, zero) for _ in range(4)]]
    assert max(recorded.groups) <= 2


def test_closing_answers_what_waits_and_refuses_what_comes(engine: Engine) -> None:
    batcher = Batcher(engine, max_delay_ms=3_000_000)
    futures: list[Future[Any]] = [batcher.submit([3, 4, 5]) for _ in range(3)]
    batcher.close()
    batcher.close()
    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(OverloadError, match="closed"):
        batcher.submit([3])


def test_asyncio(engine: Engine) -> None:
    wanted = documents(20, seed=1)

    async def ask_all() -> tuple[list[Any], Any]:
        with Batcher(engine, max_delay_ms=20) as batcher:
            together = await asyncio.gather(*(batcher.run(ids) for ids in wanted))
        return together, await engine.run_async(wanted[0])

    together, alone = asyncio.run(ask_all())
    assert all(answers_alike(found, engine.run(ids)) for found, ids in zip(together, wanted, strict=True))
    assert answers_alike(alone, engine.run(wanted[0]))


def test_multiple_choice_groups_equal_numbers_of_choices(bundle: MakeBundle) -> None:
    random = np.random.default_rng(0)
    with Engine(bundle("multiple-choice"), threads=1) as engine, Batcher(engine, max_delay_ms=100) as batcher:
        wanted = [random.integers(3, VOCAB_SIZE, (choices, 20)) for choices in (2, 3, 2)]
        marks = [np.zeros_like(ids) for ids in wanted]
        futures = [batcher.submit(ids, None, zero) for ids, zero in zip(wanted, marks, strict=True)]
        for ids, zero, future in zip(wanted, marks, futures, strict=True):
            assert answers_alike(future.result(LONG), engine.run(ids, None, zero))


@pytest.mark.parametrize(
    "wrong",
    [{"max_delay_ms": -1}, {"token_budget": 0}, {"max_pending": 0}, {"workers": 0}],
    ids=lambda w: next(iter(w)),
)
def test_arguments_out_of_range_are_refused(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        Batcher(engine, **wrong)
