"""A pool of actors: gives them documents, replaces those that end, and runs their documents again."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from lfx.errors import LfxError, one_line
from lfx.ray.actor import DocumentActor, Piece, refused_piece
from lfx.ray.cluster import machines
from lfx.ray.engine import EngineOptions
from lfx.ray.inputs import Document
from lfx.ray.parts import Columns

_QUEUED = 2  # tasks of an actor: one that runs, and one that has arrived when it ends
_MAX_DEATHS = 2  # a task that ends so many actors is split, and refused if it is one document
# Deaths without a finished task between them, for each actor of the pool. To find a document that ends its actor, 256
# documents are halved, which ends 18 actors if it is the first of them, and two for each other such document after it.
_MAX_DEATHS_IN_A_ROW = 40
_MAX_FAILED_STARTS = 3
_WAIT_S, _REPORT_AFTER_S = 1.0, 30.0
_MACHINE_GONE = "its machine is gone"


@dataclass(eq=False)
class Task:
    """Documents that run together.

    Attributes:
        part: number of the part that their rows belong to.
        first: index of their first one in the part.
        deaths: number of actors that ended while they ran it.
        is_suspect: whether it, or the task that it was split from, has ended an actor. No other task waits at the actor
            of a suspect, so that none is lost with it.
    """

    part: int
    first: int
    documents: list[Document]
    deaths: int = 0
    is_suspect: bool = False


@dataclass(eq=False)
class _Slot:
    """An actor and its tasks, the first of which is running."""

    actor: Any
    opening: Any  # None once the model is open
    tasks: deque[tuple[Any, Task]] = field(default_factory=deque)


class Pool:
    """Actors that run tasks. A context manager, which ends them.

    Args:
        ray: the module, connected.
        options: of each actor's Engine.
        file_format: format of the rows, of `lfx.ray.parts.FORMATS`.
        size: number of actors.
        resources: of an actor: num_cpus and num_gpus.
        report: called with a line for each actor that ends, and when no actor can start.
    """

    def __init__(
        self,
        ray: Any,
        options: EngineOptions,
        file_format: str,
        size: int,
        resources: dict[str, float],
        report: Callable[[str], None],
    ) -> None:
        self._ray, self._options, self._format, self._report = ray, options, file_format, report
        # SPREAD: over the machines, so that few actors end with a machine.
        self._make = ray.remote(DocumentActor).options(max_restarts=0, scheduling_strategy="SPREAD", **resources)
        self._opened: tuple[dict[str, Any], Columns] | None = None
        self._deaths_in_a_row = self._failed_starts = 0
        self._retries: deque[Task] = deque()
        self._idle_since, self._is_reported = time.monotonic(), False
        self._slots = [self._start() for _ in range(size)]

    @property
    def actors(self) -> int:
        """Number of actors that have opened the model."""
        return sum(slot.opening is None for slot in self._slots)

    def opened(self) -> tuple[dict[str, Any], Columns]:
        """Wait for the first actor that has opened the model; returns what decides the rows, and their columns.

        Raises:
            LfxError: the model cannot be opened.
        """
        with _connected():
            while self._opened is None:
                for _ in self._wait():
                    raise AssertionError("no task was given")
        return self._opened

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Piece]]:
        """Run tasks; yields them with their rows in the order in which they end. A task may come back in pieces.

        Raises:
            LfxError: the engine fails on every input, all actors end, or the connection to Ray is lost.
        """
        remaining: Iterator[Task | None] = itertools.chain(tasks, itertools.repeat(None))
        with _connected():
            while True:
                has_ended = self._fill(remaining)
                if has_ended and not self._retries and not any(slot.tasks for slot in self._slots):
                    return
                yield from self._wait()

    def _start(self) -> _Slot:
        actor = self._make.remote()
        return _Slot(actor, actor.open.remote(self._options, self._format))

    def _fill(self, tasks: Iterator[Task | None]) -> bool:
        """Give tasks to actors, first to those that have none; returns whether there are no more: None was next."""
        for depth in range(_QUEUED):
            for slot in self._slots:
                if slot.opening is not None or len(slot.tasks) != depth or (depth and self._has_suspect(slot)):
                    continue
                task = self._retries.popleft() if self._retries else next(tasks)
                if task is None:
                    return True
                slot.tasks.append((slot.actor.run.remote(task.documents), task))
        return False

    def _has_suspect(self, slot: _Slot) -> bool:
        """Whether an actor runs a suspect, or a suspect waits for an actor without tasks."""
        return slot.tasks[0][1].is_suspect or (bool(self._retries) and self._retries[0].is_suspect)

    def _wait(self) -> Iterator[tuple[Task, Piece]]:
        """Wait for an actor to open the model or to end a task, for a second at most; yields the tasks that ended."""
        slots = {slot.opening: slot for slot in self._slots if slot.opening is not None}
        slots |= {slot.tasks[0][0]: slot for slot in self._slots if slot.tasks}
        ready, _ = self._ray.wait(list(slots), num_returns=1, timeout=_WAIT_S)
        for ref in ready:
            if slots[ref].opening is not None:
                self._end_opening(slots[ref])
            else:
                yield from self._end_task(slots[ref])
        if self.actors:
            self._idle_since, self._is_reported = time.monotonic(), False
        elif time.monotonic() - self._idle_since > _REPORT_AFTER_S:
            if not machines(self._ray):  # none can join: a cluster that grows has a head
                raise LfxError(
                    "Ray has no machine left: its process there was killed; completed documents are kept, and the same "
                    "command resumes after them"
                )
            if self._is_reported:
                return
            self._is_reported = True
            free = self._ray.available_resources()
            cpus, gpus = free.get("CPU", 0), free.get("GPU", 0)
            self._report(f"no actor has started yet; the cluster has {cpus:g} CPUs and {gpus:g} GPUs free; waiting")

    def _end_opening(self, slot: _Slot) -> None:
        try:
            opened = self._get(slot.opening)
        except (self._ray.exceptions.RayError, MemoryError) as error:
            why = _why(error)
            if why == _MACHINE_GONE:  # not because of the model
                self._note_death(error)
            else:
                self._failed_starts += 1
            self._slots.remove(slot)
            if why == _MACHINE_GONE or self._failed_starts < _MAX_FAILED_STARTS:
                self._slots.append(self._start())
            elif not self._slots:
                raise LfxError(
                    f"{self._failed_starts} actors ended while they opened the model: {why}; give fewer --actors, or "
                    "machines with more memory"
                ) from error
            self._report(f"an actor ended while it opened the model: {why}")
            return
        if self._opened is not None and self._opened != opened:
            names = [name for name, value in self._opened[0].items() if opened[0][name] != value] or ["columns"]
            raise LfxError(
                f"two actors have opened models that differ in {', '.join(names)}; give all machines the same files "
                "and packages"
            )
        self._opened, self._failed_starts, slot.opening = opened, 0, None

    def _end_task(self, slot: _Slot) -> Iterator[tuple[Task, Piece]]:
        """Yield the rows of the first task of an actor; if the actor has ended, replace it and give its tasks back."""
        ref, task = slot.tasks.popleft()
        try:
            piece = self._get(ref)
        except (self._ray.exceptions.RayError, MemoryError) as error:
            self._report(f"an actor ended: {_why(error)}; its documents run again")
            self._ray.kill(slot.actor)
            self._retries.extendleft(other for _, other in reversed(slot.tasks))
            self._slots[self._slots.index(slot)] = self._start()
            yield from self._failed(task, error)
            return
        self._deaths_in_a_row = 0
        yield task, piece

    def _failed(self, task: Task, error: BaseException) -> Iterator[tuple[Task, Piece]]:
        """Queue a task again: alone on its actor, then in halves; yield the error of a task of a single document."""
        task.deaths, task.is_suspect = task.deaths + 1, True
        self._note_death(error)
        if task.deaths < _MAX_DEATHS:
            self._retries.appendleft(task)
        elif len(task.documents) > 1:
            half = len(task.documents) // 2
            parts = (task.first, task.documents[:half]), (task.first + half, task.documents[half:])
            self._retries.extendleft(Task(task.part, *part, is_suspect=True) for part in reversed(parts))
        else:
            assert self._opened is not None
            reason = f"{task.deaths} actors ended while they ran this document: {_why(error)}"
            yield task, refused_piece(task.documents[0], reason, self._opened[1], self._format)

    def _note_death(self, error: BaseException) -> None:
        """Count the end of an actor.

        Raises:
            LfxError: too many have ended since a task was finished.
        """
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= _MAX_DEATHS_IN_A_ROW * len(self._slots):
            raise LfxError(
                f"{self._deaths_in_a_row} actors ended one after another, and none finished its documents: "
                f"{_why(error)}; completed documents are kept, and the same command resumes after them"
            ) from error

    def _get(self, ref: Any) -> Any:
        """The value of a reference.

        Raises:
            RayError: the actor has ended.
            MemoryError: the actor ran out of memory.
            LfxError: what the actor raised.
        """
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LfxError | MemoryError):
                raise error.cause from error
            raise LfxError(f"an actor failed: {type(error.cause).__name__}: {one_line(error.cause)}") from error

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            if not self._ray.is_initialized():  # the connection was lost, and a call would start Ray on this machine
                return
            with contextlib.suppress(Exception):  # it, or the cluster, is gone
                self._ray.kill(slot.actor)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Raise LfxError if the connection to Ray is lost: a client at ray:// raises a ConnectionError or grpc's errors."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ConnectionError) and not type(error).__module__.startswith("grpc"):
            raise
        details = getattr(error, "details", None)  # the text of grpc's errors has several lines
        reason = str(details()) if callable(details) else one_line(error)
        raise LfxError(
            f"the connection to Ray was lost: {reason}; completed documents are kept, and the same command resumes "
            "after them"
        ) from error


def _why(error: BaseException) -> str:
    """Why an actor ended, from Ray's error of several lines."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "outofmemory" in type(error).__name__.lower() or "memory monitor" in text:
        return "out of memory"
    if "unavailable" in type(error).__name__.lower():
        return "its machine does not answer"
    if "node has died" in text or "node died" in text or "node is dead" in text:
        return _MACHINE_GONE
    if "worker process has died" in text or "unexpectedly" in text:
        return "its process was killed"
    return one_line(error)
