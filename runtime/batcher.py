"""`Batcher`: requests that arrive together run together, and none waits longer for company than it was promised."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lfx.errors import InputError, OverloadError
from lfx.runtime.batching import batches
from lfx.runtime.engine import AHEAD, Engine, Outputs, check_cuttable
from lfx.runtime.inputs import Batch, prepare


@dataclass(frozen=True)
class _Request:
    batch: Batch
    arrived: float  # time.monotonic
    future: Future[Outputs]

    @property
    def length(self) -> int:
        """Tokens of the sequence, or of each choice."""
        return int(self.batch.feeds["input_ids"].shape[-1])

    @property
    def size(self) -> int:
        """Tokens, of all choices."""
        return int(self.batch.feeds["input_ids"].size)

    @property
    def kind(self) -> tuple[int, ...]:
        """What must be equal to run together: the number of choices."""
        return self.batch.feeds["input_ids"].shape[:-1]


class Batcher:
    """Groups single requests into batches of neighbouring lengths. Thread-safe, and a context manager.

    A request is run at the latest `max_delay_ms` after it came, with those of the waiting that fit it, or when a worker
    is free again after that; and at once when a whole batch is waiting.

    Args:
        engine: runs the batches; it is not closed with the Batcher.
        max_delay_ms: longest wait for company. 0 takes what is there.
        token_budget: most tokens of a batch, padding included; default: the engine's.
        max_pending: most waiting requests; one more is an OverloadError, so that a server can refuse it at once.
        workers: batches that run at the same time.
    Raises:
        InputError: an argument out of range, or a model whose outputs cannot be cut to each sequence's length.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_delay_ms: float = 5.0,
        token_budget: int | None = None,
        max_pending: int = 1024,
        workers: int = 1,
    ) -> None:
        budget = engine.token_budget if token_budget is None else token_budget
        if not 0 <= max_delay_ms < 3_600_000 or min(budget, max_pending, workers) < 1:
            raise InputError(
                f"max_delay_ms {max_delay_ms}, token_budget {budget}, max_pending {max_pending}, workers {workers}: "
                "the first must be 0 to an hour, the others 1 or more"
            )
        check_cuttable(engine.signature)
        self._engine, self._delay, self._budget, self._max_pending = engine, max_delay_ms / 1000, budget, max_pending
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._workers = [threading.Thread(target=self._work, name="lfx-batcher", daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def submit(self, ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Future[Outputs]:
        """Hand in one sequence; arguments as `Engine.run`'s.

        Returns:
            A future of what `Engine.run` returns for this sequence, the batch axis of 1 included.
        Raises:
            InputError: the model cannot take it, or it is more than one sequence; its neighbours never learn of it.
            OverloadError: `max_pending` requests are waiting, or the Batcher is closed.
        """
        arrived = time.monotonic()
        try:
            batch = prepare(ids, attention_mask, global_attention_mask, self._engine.signature)
            shape = batch.feeds["input_ids"].shape
            if shape[0] != 1:
                raise InputError(f"{shape[0]} sequences came; submit them one by one, and they run together")
            request = _Request(batch, arrived, Future())
            with self._changed:
                if self._closed:
                    raise OverloadError("this Batcher is closed; make a new one")
                if len(self._waiting) >= self._max_pending:
                    self._waiting = deque(r for r in self._waiting if not r.future.cancelled())
                if len(self._waiting) >= self._max_pending:
                    raise OverloadError(f"{self._max_pending} requests are waiting already; try again later")
                self._waiting.append(request)
                self._changed.notify()
        except (InputError, OverloadError):
            self._engine.metrics.failed()
            raise
        return request.future

    async def run(self, ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Outputs:
        """`submit` for asyncio. A cancelled call that still waits is not computed."""
        return await asyncio.wrap_future(self.submit(ids, attention_mask, global_attention_mask))

    def close(self) -> None:
        """Run what is waiting, and stop. Calling it again does nothing.

        From a future's callback it returns at once, and what is waiting is run after it.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() not in self._workers:
            for worker in self._workers:
                worker.join()

    def _work(self) -> None:
        while True:
            failure: BaseException | None = None
            with self._changed:
                self._wait_until_due()
                if not self._waiting:
                    return
                try:
                    group = self._take()
                except BaseException as error:  # the Engine was closed: nobody is left waiting for an answer
                    group, failure = list(self._waiting), error
                    self._waiting.clear()
            if failure is None:
                self._run(group)
            else:
                self._fail(group, failure)

    def _wait_until_due(self) -> None:
        """Wait until the oldest request has waited long enough, or a whole batch is there, or all is done."""
        while True:
            if not self._waiting:
                if self._closed:
                    return
                self._changed.wait()
                continue
            left = self._waiting[0].arrived + self._delay - time.monotonic()
            if self._closed or left <= 0 or sum(request.size for request in self._waiting) >= self._budget:
                return
            self._changed.wait(left)

    def _take(self) -> list[_Request]:
        """The batch that the oldest request is in."""
        oldest = self._waiting[0]
        alike = [r for r in itertools.islice(self._waiting, AHEAD) if r.kind == oldest.kind]
        choices = max(oldest.size // oldest.length, 1)
        lengths, budget = [r.length for r in alike], max(self._budget // choices, 1)
        groups = batches(lengths, budget, self._engine.takes, pad=self._engine.signature.may_pad)
        group = next([alike[i] for i in found] for found in groups if any(alike[i] is oldest for i in found))
        chosen = set(map(id, group))
        self._waiting = deque(r for r in self._waiting if id(r) not in chosen)
        self._changed.notify()  # another worker may take the next
        return group

    def _run(self, group: list[_Request]) -> None:
        running = [request for request in group if request.future.set_running_or_notify_cancel()]
        if not running:
            return
        try:
            results = self._engine.run_together([request.batch for request in running])
        except BaseException as error:
            self._fail(running, error)
            return
        now = time.monotonic()
        for request, result in zip(running, results, strict=True):
            self._engine.metrics.answered(now - request.arrived)
            request.future.set_result(result)

    def _fail(self, requests: Iterable[_Request], error: BaseException) -> None:
        for request in requests:
            if request.future.running() or request.future.set_running_or_notify_cancel():
                self._engine.metrics.failed()
                request.future.set_exception(error)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
