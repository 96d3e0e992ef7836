"""`Batcher` groups concurrent requests into batches, within a maximum delay for each request."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from lfx.checks import function, real_number, whole_number
from lfx.errors import InputError, LfxError, OverloadError, one_line
from lfx.runtime import forks
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.batching import batches
from lfx.runtime.engine import Engine
from lfx.runtime.inputs import Feeds, prepare, seqlen_of
from lfx.runtime.outputs import output_names
from lfx.runtime.ragged import check_cuttable
from lfx.runtime.streaming import AHEAD
from lfx.signature import Signature

_log = logging.getLogger("lfx")
MAX_WORKERS = 1024
_HOUR_MS = 3_600_000
_EXIT_WAIT_S = 60.0  # a callback that never returns must not keep the process alive


class _Worker(threading.Thread):
    """A thread that runs batches and calls the callbacks of their futures."""


class _RequestFuture(Future[Outputs]):
    """The future of one request."""

    def add_done_callback(self, fn: Callable[[Future[Outputs]], object]) -> None:
        """As `Future.add_done_callback`, but an exception of `fn` ends neither a worker nor other callbacks.

        It is logged. A SystemExit or KeyboardInterrupt is raised again, unless a worker is calling.

        Raises:
            InputError: `fn` is no function.
        """
        function(fn, "fn")

        def call(future: Future[Outputs]) -> None:
            try:
                fn(future)
            except BaseException as error:
                _log.exception("a callback of a request raised %s", type(error).__name__)
                if not isinstance(error, Exception) and not isinstance(threading.current_thread(), _Worker):
                    raise

        super().add_done_callback(call)

    def begin(self) -> bool:
        """Mark the request as running; False if it was cancelled or answered, and need not be computed."""
        try:
            return self.set_running_or_notify_cancel()
        except (RuntimeError, InvalidStateError):  # the caller set a result on the future
            return False

    def answer(self, result: Outputs | BaseException) -> None:
        """Set the result or the exception."""
        try:
            if isinstance(result, BaseException):
                self.set_exception(result)
            else:
                self.set_result(result)
        except InvalidStateError:  # the caller set a result on the future
            pass

    def abandon(self, error: BaseException) -> None:
        """Set an error in a child process if there is no result yet; callbacks run in the parent only."""
        self._condition = threading.Condition()  # a thread of the parent may have held its lock at the fork
        done, cancelled = self.done(), self.cancelled()
        if done and not cancelled:
            return
        Future.__init__(self)  # drops the callbacks and waiters of the parent
        if cancelled:
            self.cancel()
            self.begin()
        else:
            self.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Request:
    feeds: Feeds
    arrived: float  # time.monotonic
    future: _RequestFuture
    outputs: tuple[str, ...] | None = None  # names of those to return; None = all

    @property
    def seqlen(self) -> int:
        """Number of tokens of the sequence, or of each choice."""
        return seqlen_of(self.feeds)

    @property
    def tokens(self) -> int:
        """Number of tokens of all choices together."""
        return int(self.feeds["input_ids"].size)

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """Axes of input_ids before the sequence: (1,), or (1, choices). Requests of one batch have the same."""
        return self.feeds["input_ids"].shape[:-1]


class Batcher:
    """Groups concurrent requests into batches of neighbouring lengths. Thread-safe, and a context manager.

    A batch starts when its oldest request has waited `max_delay_ms`, or as soon as the pending requests have
    `token_budget` tokens; later if all workers are busy.

    A Batcher works only in the process that made it. In a forked child, `submit` raises LfxError, pending requests get
    an LfxError and `close` returns immediately; make a new Engine and a new Batcher there.

    When the process ends, pending requests get an OverloadError and the batch that is being computed is completed.

    Args:
        engine: runs the batches. `close` does not close it.
        max_delay_ms: longest time that a request waits for others, in milliseconds, 0 to 3,600,000. 0 runs what is
            pending without waiting. Default: 5.
        token_budget: largest number of tokens of a batch, padding included, 1 or more. Default: the engine's.
        max_pending: largest number of pending requests, 1 or more; `submit` raises OverloadError above it. Default:
            1,024.
        workers: number of threads, and so of batches that run at the same time, 1 to 1,024. Default: 1.
    Raises:
        InputError: an argument has another type or is out of range, the Engine is closed, or the model has an output
            that cannot be cut to each sequence's length.
        LfxError: the Engine was made before a fork, or the system cannot start the threads.
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
        self._pending: deque[_Request] = deque()
        self._running: set[_Request] = set()
        self._changed = threading.Condition()
        self._inside: set[int] = set()  # threads in `submit` or `close`, which a signal handler may interrupt
        self._closed = False
        self._broken: BaseException | None = None
        self._forked = False
        self._workers: list[_Worker] = []
        forks.watch(self)
        _batchers.add(self)
        try:
            for _ in range(workers):
                worker = _Worker(target=self._work, name="lfx-batcher", daemon=True)
                worker.start()
                self._workers.append(worker)
        except RuntimeError as error:
            self.close()
            raise LfxError(f"{len(self._workers)} of {workers} workers could be started; give fewer") from error

    def submit(
        self,
        ids: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        outputs: Iterable[str] | None = None,
    ) -> Future[Outputs]:
        """Submit one sequence. The arguments are those of `Engine.run`.

        An output is copied for all requests of a batch if one of them asks for it.

        Returns:
            A future of what `Engine.run` returns for this sequence: output name -> array with a batch axis of 1. If the
            run fails, the future has its LfxError.
        Raises:
            InputError: the model cannot take the sequence, the ids are more than one sequence, or an output is not
                known. Other requests are not affected.
            OverloadError: `max_pending` requests are pending, or the Batcher is closed.
            LfxError: the Batcher was made before a fork, or one of its workers died.
        """
        self._check_process()
        arrived = time.monotonic()
        with self._entered():
            try:
                signature = self._engine.signature
                names = None if outputs is None else output_names(signature, outputs)
                sequences = prepare(ids, attention_mask, global_attention_mask, signature)
                if len(sequences) != 1:
                    raise InputError(
                        f"submit was given {len(sequences)} sequences; submit them one by one, and they run together"
                    )
                request = _Request(sequences[0], arrived, _RequestFuture(), names)
                self._add(request)
            except LfxError:
                self._engine.metrics.failed()
                raise
        return request.future

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: it is not closed, no worker has died, and this process made it."""
        return not self._closed

    async def run(
        self,
        ids: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        outputs: Iterable[str] | None = None,
    ) -> Outputs:
        """`submit` for asyncio. A call that is cancelled while it is pending is not computed."""
        return await asyncio.wrap_future(self.submit(ids, attention_mask, global_attention_mask, outputs=outputs))

    def close(self) -> None:
        """Run the pending requests and stop the workers. Calling it again does nothing.

        In a future's callback `close` returns immediately, and the pending requests run after the callback. It does so
        too in a signal handler that interrupts `submit` or `close`, and in a child process.
        """
        if self._forked:
            return
        with self._entered() as was_inside, self._changed:
            self._closed = True
            self._changed.notify_all()
        # If two workers each closed the other's Batcher in a callback, they would wait for each other. A thread that
        # was inside already may hold a lock that the workers need.
        if not was_inside and not isinstance(threading.current_thread(), _Worker):
            for worker in self._workers:
                worker.join()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[bool]:
        """Note that this thread is in `submit` or `close`; yields whether it was already, before a signal."""
        thread = threading.get_ident()
        was_inside = thread in self._inside
        self._inside.add(thread)
        try:
            yield was_inside
        finally:
            if not was_inside:
                self._inside.discard(thread)

    def _add(self, request: _Request) -> None:
        with self._changed:
            if self._broken is not None:
                raise LfxError(f"a worker of this Batcher died ({one_line(self._broken)}); make a new one")
            if self._closed:
                raise OverloadError("this Batcher is closed; make a new one")
            if len(self._pending) >= self._max_pending:
                self._drop_cancelled()
            if len(self._pending) >= self._max_pending:
                raise OverloadError(f"{self._max_pending} requests are waiting already; try again later")
            self._pending.append(request)
            self._changed.notify()

    def forked(self) -> None:
        """Set an error on all open requests in a child process, which has no workers."""
        self._forked = self._closed = True
        self._changed = threading.Condition()
        error = LfxError(forks.made_before("Batcher"))
        for request in {*self._pending, *self._running}:
            request.future.abandon(error)
        self._pending, self._running = deque(), set()

    def _end(self) -> None:
        """Fail the pending requests, and wait for the workers, when the process ends.

        Python ends a daemon thread that returns from C++ code at that time by force, which aborts the process.
        """
        if self._forked:
            return
        with self._changed:
            self._closed, lost = True, list(self._pending)
            self._pending.clear()
            self._changed.notify_all()
        try:
            self._fail(lost, OverloadError("the process ended before this request ran"))
        finally:
            for worker in self._workers:
                worker.join(_EXIT_WAIT_S)

    def _check_process(self) -> None:
        if self._forked:
            raise LfxError(forks.made_before("Batcher"))

    def __reduce__(self) -> NoReturn:
        raise InputError("a Batcher cannot be pickled or copied: its workers are threads; make one in each process")

    def _drop_cancelled(self) -> None:
        """Remove cancelled requests from the pending ones, and notify their waiters."""
        cancelled = {request for request in self._pending if request.future.cancelled()}
        self._pending = deque(request for request in self._pending if request not in cancelled)
        for request in cancelled:
            request.future.begin()

    def _work(self) -> None:
        group: list[_Request] | None = []
        try:
            while (group := self._next_group()) is not None:
                self._run(group)
                with self._changed:
                    self._running.difference_update(group)
                group = []  # while it waits for the next one, nothing keeps the outputs
        except BaseException as error:
            _log.exception("a worker of a Batcher died")
            with self._changed:
                self._broken, self._closed = error, True
                lost = [*(group or ()), *self._pending]
                self._pending.clear()
                self._changed.notify_all()
            self._fail(lost, LfxError(f"a worker of this Batcher died: {one_line(error)}"))

    def _next_group(self) -> list[_Request] | None:
        """Wait for the next batch; an empty list if taking it failed, None when the Batcher is closed and empty."""
        with self._changed:
            self._wait_until_due()
            if not self._pending:
                return None
            try:
                return self._take_group()
            except BaseException as error:  # such as a closed Engine; all pending requests get the error
                failure, lost = error, list(self._pending)
                self._pending.clear()
        self._fail(lost, failure)
        return []

    def _wait_until_due(self) -> None:
        """Wait until the oldest request is due, the pending ones fill a batch, or the Batcher is closed."""
        while True:
            if not self._pending:
                if self._closed:
                    return
                self._changed.wait()
                continue
            remaining = self._pending[0].arrived + self._delay - time.monotonic()
            if self._closed or remaining <= 0 or sum(request.tokens for request in self._pending) >= self._budget:
                return
            self._changed.wait(remaining)

    def _take_group(self) -> list[_Request]:
        """Group the pending requests into batches, and take the batch of the oldest request."""
        oldest = self._pending[0]
        candidates = [r for r in itertools.islice(self._pending, AHEAD) if r.leading_shape == oldest.leading_shape]
        choices = max(oldest.tokens // oldest.seqlen, 1)
        lengths, budget = [r.seqlen for r in candidates], max(self._budget // choices, 1)
        # Not Engine.supports_shape: it checks its arguments, which takes 25 ms for the thousands of calls here.
        groups = batches(lengths, budget, self._engine.shape_check(), pad=self._engine.signature.may_pad)
        group = [candidates[i] for i in next(indices for indices in groups if 0 in indices)]
        # Added to one set before it is removed from the other: a child process then has each request in one of them.
        self._running.update(group)
        taken = set(group)
        self._pending = deque(r for r in self._pending if r not in taken)
        self._changed.notify()  # another worker may take the next batch
        return group

    def _run(self, group: list[_Request]) -> None:
        if requests := [request for request in group if request.future.begin()]:
            self._compute(requests)

    def _compute(self, requests: list[_Request]) -> None:
        """Run requests together and answer them; if that fails, run each alone, since one may be the cause."""
        try:
            names = _all_outputs(requests)
            results = self._engine.run_together([request.feeds for request in requests], outputs=names)
            answers = list(zip(requests, results, strict=True))
        except BaseException as error:
            if len(requests) > 1 and isinstance(error, Exception):
                for request in requests:
                    self._compute([request])
            else:
                self._fail(requests, error)
            return
        now = time.monotonic()
        for request, result in answers:
            self._engine.metrics.answered(now - request.arrived)
            request.future.answer(
                result if request.outputs is None else {name: result[name] for name in request.outputs}
            )

    def _fail(self, requests: Iterable[_Request], error: BaseException) -> None:
        for request in requests:
            if request.future.running() or request.future.begin():
                self._engine.metrics.failed()
                request.future.answer(error)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _all_outputs(requests: Iterable[_Request]) -> list[str] | None:
    """Names of the outputs that the requests ask for together; None = all."""
    names: dict[str, None] = {}
    for request in requests:
        if request.outputs is None:
            return None
        names.update(dict.fromkeys(request.outputs))
    return list(names)


_batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for batcher in list(_batchers):
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # raised by a callback; the other Batchers end too
            batcher._end()
