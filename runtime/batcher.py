"""`Batcher`: requests that arrive together run together, and none waits longer for company than it was promised."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from lfx.checks import real_number, whole_number
from lfx.errors import InputError, LfxError, OverloadError, one_line
from lfx.runtime import forks
from lfx.runtime.batching import batches
from lfx.runtime.engine import AHEAD, Engine, Outputs, check_cuttable
from lfx.runtime.inputs import Batch, prepare
from lfx.signature import Signature

_log = logging.getLogger("lfx")
MAX_WORKERS = 1024
_HOUR_MS = 3_600_000


class _Worker(threading.Thread):
    """A thread that runs batches, and the callbacks of their futures."""


class _Answer(Future[Outputs]):
    """The future of one request."""

    def add_done_callback(self, fn: Callable[[Future[Outputs]], object]) -> None:
        """As `Future.add_done_callback`; what `fn` raises is logged, and neither a worker nor other callbacks see it.

        A SystemExit or KeyboardInterrupt goes on in a thread of the caller's own.
        """

        def call(future: Future[Outputs]) -> None:
            try:
                fn(future)
            except BaseException as error:
                _log.exception("a callback of a request raised %s", type(error).__name__)
                if not isinstance(error, Exception) and not isinstance(threading.current_thread(), _Worker):
                    raise

        super().add_done_callback(call)

    def begin(self) -> bool:
        """Whether it is to be computed; those who wait for a cancelled one are told."""
        try:
            return self.set_running_or_notify_cancel()
        except (RuntimeError, InvalidStateError):  # whoever has the future answered it
            return False

    def answer(self, result: Outputs | BaseException) -> None:
        """Give the result, or the error."""
        try:
            if isinstance(result, BaseException):
                self.set_exception(result)
            else:
                self.set_result(result)
        except InvalidStateError:  # whoever has the future answered it
            pass

    def abandon(self, error: BaseException) -> None:
        """In a child process: give an error where there is no answer; callbacks belong to the parent."""
        self._condition = threading.Condition()  # another thread may have held it, and would for ever
        answered, cancelled = self.done(), self.cancelled()
        if answered and not cancelled:
            return
        Future.__init__(self)  # without those who wait for it in the parent
        if cancelled:
            self.cancel()
            self.begin()
        else:
            self.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Request:
    batch: Batch
    arrived: float  # time.monotonic
    future: _Answer

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

    It works in the process that made it. After a fork, requests and `submit` in the child get an LfxError, and `close`
    returns at once; make a new Engine and a new Batcher there.

    Args:
        engine: runs the batches; it is not closed with the Batcher.
        max_delay_ms: longest wait for company, 0 to an hour. 0 takes what is there.
        token_budget: most tokens of a batch, padding included, 1 or more; default: the engine's.
        max_pending: most waiting requests, 1 or more; one more is an OverloadError, so that a server can refuse it at
            once.
        workers: batches that run at the same time, 1 to 1,024.
    Raises:
        InputError: an argument of another type or out of range, a closed Engine, or a model whose outputs cannot be cut
            to each sequence's length.
        LfxError: the Engine was made before a fork, or the system starts no more threads.
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
        if not isinstance(getattr(engine, "signature", None), Signature):
            raise InputError(f"engine is {type(engine).__name__}; give an Engine")
        self._delay = real_number(max_delay_ms, "max_delay_ms", 0, _HOUR_MS) / 1000
        self._budget = whole_number(
            engine.token_budget if token_budget is None else token_budget, "token_budget", low=1
        )
        self._max_pending = whole_number(max_pending, "max_pending", low=1)
        workers = whole_number(workers, "workers", 1, MAX_WORKERS)
        engine.check_usable()
        check_cuttable(engine.signature)
        self._engine = engine
        self._waiting: deque[_Request] = deque()
        self._running: set[_Request] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._broken: BaseException | None = None
        self._forked = False
        self._workers: list[_Worker] = []
        forks.watch(self)
        try:
            for _ in range(workers):
                worker = _Worker(target=self._work, name="lfx-batcher", daemon=True)
                worker.start()
                self._workers.append(worker)
        except RuntimeError as error:
            self.close()
            raise LfxError(f"{len(self._workers)} of {workers} workers could be started; give fewer") from error

    def submit(self, ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Future[Outputs]:
        """Hand in one sequence; arguments as `Engine.run`'s.

        Returns:
            A future of what `Engine.run` returns for this sequence, the batch axis of 1 included.
        Raises:
            InputError: the model cannot take it, or it is more than one sequence; its neighbours never learn of it.
            OverloadError: `max_pending` requests are waiting, or the Batcher is closed.
            LfxError: the Batcher was made before a fork, or one of its workers died.
        """
        self._check_process()
        arrived = time.monotonic()
        try:
            batch = prepare(ids, attention_mask, global_attention_mask, self._engine.signature)
            shape = batch.feeds["input_ids"].shape
            if shape[0] != 1:
                raise InputError(f"{shape[0]} sequences came; submit them one by one, and they run together")
            request = _Request(batch, arrived, _Answer())
            with self._changed:
                if self._broken is not None:
                    raise LfxError(f"a worker of this Batcher died ({one_line(self._broken)}); make a new one")
                if self._closed:
                    raise OverloadError("this Batcher is closed; make a new one")
                if len(self._waiting) >= self._max_pending:
                    self._drop_cancelled()
                if len(self._waiting) >= self._max_pending:
                    raise OverloadError(f"{self._max_pending} requests are waiting already; try again later")
                self._waiting.append(request)
                self._changed.notify()
        except LfxError:
            self._engine.metrics.failed()
            raise
        return request.future

    async def run(self, ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Outputs:
        """`submit` for asyncio. A cancelled call that still waits is not computed."""
        return await asyncio.wrap_future(self.submit(ids, attention_mask, global_attention_mask))

    def close(self) -> None:
        """Run what is waiting, and stop. Calling it again does nothing.

        From a future's callback it returns at once, and what is waiting is run after it; so it does in a child process.
        """
        if self._forked:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # Workers of two Batchers that close each other's from callbacks would wait for each other.
        if not isinstance(threading.current_thread(), _Worker):
            for worker in self._workers:
                worker.join()

    def forked(self) -> None:
        """In a child process: whoever waits gets an error, since no worker is there."""
        self._forked = self._closed = True
        self._changed = threading.Condition()
        error = LfxError(forks.made_before("Batcher"))
        for request in {*self._waiting, *self._running}:
            request.future.abandon(error)
        self._waiting, self._running = deque(), set()

    def _check_process(self) -> None:
        if self._forked:
            raise LfxError(forks.made_before("Batcher"))

    def __reduce__(self) -> NoReturn:
        raise InputError("a Batcher cannot be pickled or copied: its workers are threads; make one in each process")

    def _drop_cancelled(self) -> None:
        cancelled = {request for request in self._waiting if request.future.cancelled()}
        self._waiting = deque(request for request in self._waiting if request not in cancelled)
        for request in cancelled:
            request.future.begin()

    def _work(self) -> None:
        group: list[_Request] | None = []
        try:
            while (group := self._next_group()) is not None:
                self._run(group)
                with self._changed:
                    self._running.difference_update(group)
        except BaseException as error:
            _log.exception("a worker of a Batcher died")
            with self._changed:
                self._broken, self._closed = error, True
                lost = [*(group or ()), *self._waiting]
                self._waiting.clear()
                self._changed.notify_all()
            self._fail(lost, LfxError(f"a worker of this Batcher died: {one_line(error)}"))

    def _next_group(self) -> list[_Request] | None:
        """Requests to run together, as soon as they are due; none where nothing can be run; None to stop."""
        with self._changed:
            self._wait_until_due()
            if not self._waiting:
                return None
            try:
                return self._take()
            except BaseException as error:  # the Engine was closed: nobody is left waiting for an answer
                failure, lost = error, list(self._waiting)
                self._waiting.clear()
        self._fail(lost, failure)
        return []

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
        groups = batches(lengths, budget, self._engine.supports_shape, pad=self._engine.signature.may_pad)
        group = next([alike[i] for i in found] for found in groups if any(alike[i] is oldest for i in found))
        self._running.update(group)  # first, so that a child process finds every request in one of the two
        chosen = set(group)
        self._waiting = deque(r for r in self._waiting if r not in chosen)
        self._changed.notify()  # another worker may take the next
        return group

    def _run(self, group: list[_Request]) -> None:
        running = [request for request in group if request.future.begin()]
        if not running:
            return
        try:
            results = self._engine.run_together([request.batch for request in running])
            answers = list(zip(running, results, strict=True))
        except BaseException as error:
            self._fail(running, error)
            return
        now = time.monotonic()
        for request, result in answers:
            self._engine.metrics.answered(now - request.arrived)
            request.future.answer(result)

    def _fail(self, requests: Iterable[_Request], error: BaseException) -> None:
        for request in requests:
            if request.future.running() or request.future.begin():
                self._engine.metrics.failed()
                request.future.answer(error)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
