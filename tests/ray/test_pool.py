"""The pool with actors that end at given documents, and its size. Ray is replaced by calls in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lfx.ray.pool
from lfx.errors import InputError, LfxError
from lfx.ray.actor import Piece
from lfx.ray.cluster import PoolSize
from lfx.ray.engine import EngineOptions
from lfx.ray.inputs import Document
from lfx.ray.parts import Columns, encode
from lfx.ray.pool import Pool, Task

COLUMNS = Columns((), (), has_windows=False)


class RayError(Exception):
    """Ray's error of an actor that has ended."""


class RayTaskError(RayError):
    """Ray's error of an exception in an actor."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("a traceback")
        self.cause = cause


class KilledError(Exception):
    """Raised in an actor, ends it."""


class Actor:
    """Rows that repeat the documents; the base of actors that end."""

    def open(self, options: EngineOptions, file_format: str) -> tuple[dict[str, Any], Columns]:
        return {"model": options.model}, COLUMNS

    def run(self, documents: list[Document]) -> Piece:
        rows = [{"file": file, "line": line, "document": document} for file, line, document in documents]
        return Piece(encode(rows, COLUMNS, "jsonl"), len(rows), 0, len(rows), len(rows), [])


class FakeRay:
    """The functions of Ray that the pool calls; an actor runs a call when its result is asked for."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def remote(self, actor: type[Actor]) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: self._make(actor())))

    def _make(self, actor: Any) -> Any:
        handle = SimpleNamespace(is_dead=False)
        for name in ("open", "run"):
            call = self._call(handle, getattr(actor, name))
            setattr(handle, name, SimpleNamespace(remote=call))
        return handle

    @staticmethod
    def _call(handle: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Callable[[], Any]:
            def result() -> Any:
                if handle.is_dead:
                    raise RayError("The worker process has died")
                try:
                    return method(*arguments)
                except KilledError:
                    handle.is_dead = True
                    raise RayError("The worker process has died") from None
                except RayError:
                    raise
                except Exception as error:
                    raise RayTaskError(error) from error

            return result

        return call

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: Callable[[], Any]) -> Any:
        return ref()

    def kill(self, handle: Any) -> None:
        handle.is_dead = True

    def is_initialized(self) -> bool:
        return True


def run_pool(actor: type[Actor], documents: list[int], size: int, parts_of: int = 4) -> tuple[list[Any], list[str]]:
    """The rows of a pool in the order of the documents, and its reports."""
    reports: list[str] = []
    tasks = [
        Task(start // parts_of, 0, [("a", i, document) for i, document in enumerate(documents)][start:][:parts_of])
        for start in range(0, len(documents), parts_of)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lfx.ray.pool, "DocumentActor", actor)
        with Pool(FakeRay(), EngineOptions("model"), "jsonl", size, {}, reports.append) as pool:
            assert pool.opened() == ({"model": "model"}, COLUMNS)
            pieces = [(task.part, task.first, piece) for task, piece in pool.results(tasks)]
    lines = [line for *_, piece in sorted(pieces, key=lambda item: item[:2]) for line in piece.content.splitlines()]
    assert sum(piece.documents for *_, piece in pieces) == len(documents)
    return [json.loads(line) for line in lines], reports


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.lists(st.booleans(), max_size=12))
def test_each_document_gets_one_row_whichever_actors_end(documents: list[int], size: int, ends: list[bool]) -> None:
    remaining = iter(ends)

    class Mortal(Actor):
        def run(self, documents: list[Document]) -> Piece:
            if next(remaining, False):
                raise KilledError
            return super().run(documents)

    rows, reports = run_pool(Mortal, documents, size)
    assert [row["line"] for row in rows] == list(range(len(documents)))
    assert len(reports) <= sum(ends)
    for row in rows:
        assert ("error" in row) != ("document" in row)


@given(st.lists(st.integers(0, 9), max_size=40).filter(lambda numbers: numbers.count(9) <= 8), st.integers(1, 4))
def test_a_document_that_ends_its_actors_is_refused_and_no_other(documents: list[int], size: int) -> None:
    class Poisoned(Actor):
        def run(self, documents: list[Document]) -> Piece:
            if any(document == 9 for _, _, document in documents):
                raise KilledError
            return super().run(documents)

    rows, _ = run_pool(Poisoned, documents, size)
    assert [row.get("document", 9) for row in rows] == documents
    reason = "2 actors ended while they ran this document: its process was killed"
    assert all(row.get("error", reason) == reason for row in rows)


def test_the_first_of_256_documents_may_end_its_actors() -> None:
    class Poisoned(Actor):
        def run(self, documents: list[Document]) -> Piece:
            if documents[0][1] == 0:
                raise KilledError
            return super().run(documents)

    rows, reports = run_pool(Poisoned, [1] * 256, 1, parts_of=256)
    assert [row["line"] for row in rows if "error" in row] == [0]
    assert len(reports) == 18


def test_actors_that_run_out_of_memory_are_replaced() -> None:
    class Large(Actor):
        def run(self, documents: list[Document]) -> Piece:
            if len(documents) > 1:
                raise MemoryError
            return super().run(documents)

    rows, reports = run_pool(Large, [1, 2, 3, 4], 2)
    assert [row["document"] for row in rows] == [1, 2, 3, 4]
    assert set(reports) == {"an actor ended: out of memory; its documents run again"}


def test_a_pool_whose_actors_all_end_stops() -> None:
    class Dying(Actor):
        def run(self, documents: list[Document]) -> Piece:
            raise KilledError

    with pytest.raises(LfxError, match="120 actors ended one after another, and none finished its documents: its"):
        run_pool(Dying, [1] * 4000, 3, parts_of=1000)


def test_actors_that_end_while_they_open_the_model_stop_the_pool() -> None:
    class Heavy(Actor):
        def open(self, options: EngineOptions, file_format: str) -> tuple[dict[str, Any], Columns]:
            raise KilledError

    with pytest.raises(LfxError, match="3 actors ended while they opened the model: its process was killed; give few"):
        run_pool(Heavy, [1], 1)


@pytest.mark.parametrize("lost", [7, 400])
def test_machines_that_go_while_actors_open_the_model_make_the_pool_no_smaller(lost: int) -> None:
    class Opening(Actor):
        def open(self, options: EngineOptions, file_format: str) -> tuple[dict[str, Any], Columns]:
            if next(deaths, None) is not None:
                raise RayError("The actor died because its node has died.")
            return super().open(options, file_format)

    deaths = iter(range(lost))
    reports: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lfx.ray.pool, "DocumentActor", Opening)
        with Pool(FakeRay(), EngineOptions("model"), "jsonl", 4, {}, reports.append) as pool:
            if lost == 400:
                with pytest.raises(LfxError, match=r"160 actors ended one after another.*: its machine is gone; compl"):
                    pool.opened()
                return
            pool.opened()
            tasks = [Task(part, 0, [("a", part, part)]) for part in range(9)]
            assert len(list(pool.results(tasks))) == 9
            assert pool.actors == 4
    assert reports == ["an actor ended while it opened the model: its machine is gone"] * lost


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LfxError("the engine fails on every input: no kernel"), "the engine fails on every input: no kernel"),
        (ValueError("a fault"), "an actor failed: ValueError: a fault"),
    ],
)
def test_an_error_of_an_actor_stops_the_pool(error: Exception, message: str) -> None:
    class Failing(Actor):
        def run(self, documents: list[Document]) -> Piece:
            raise error

    with pytest.raises(LfxError, match=f"^{message}$"):
        run_pool(Failing, [1, 2], 1)


def test_a_pool_without_a_machine_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfx.ray.pool, "_REPORT_AFTER_S", 0.0)
    waits = iter([None, None])  # until Ray knows that the machine is gone

    class GoneRay(FakeRay):
        def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            return [], refs

        def nodes(self) -> list[dict[str, Any]]:
            return [{"Alive": next(waits, 1) is None, "Resources": {"CPU": 2.0}}]

        def available_resources(self) -> dict[str, float]:
            return {}

    reports: list[str] = []
    with (
        pytest.raises(LfxError, match=r"Ray has no machine left: .* the same command resumes"),
        Pool(GoneRay(), EngineOptions("model"), "jsonl", 1, {}, reports.append) as pool,
    ):
        pool.opened()
    assert reports == ["no actor has started yet; the cluster has 0 CPUs and 0 GPUs free; waiting"]


class GrpcError(Exception):
    """An error of grpc, whose text has several lines."""

    __module__ = "grpc._channel"

    def details(self) -> str:
        return "the server has gone"


@pytest.mark.parametrize("error", [ConnectionError("the server has gone"), GrpcError("<GrpcError:\n\tstatus …>")])
def test_a_connection_that_is_lost_stops_the_pool_and_starts_no_ray(error: Exception) -> None:
    """Ray's client raises ConnectionError, which is an OSError, or grpc's errors; its next call would start Ray."""

    class LostRay(FakeRay):
        def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            raise error

        def is_initialized(self) -> bool:
            return False

        def kill(self, handle: Any) -> None:
            pytest.fail("Ray was started again")

    message = "the connection to Ray was lost: the server has gone; completed documents are kept, and the same command"
    with (
        pytest.raises(LfxError, match=message),
        Pool(LostRay(), EngineOptions("model"), "jsonl", 1, {}, lambda line: None) as pool,
    ):
        pool.opened()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"actors": 0}, "actors 0"), ({"cpus": 0}, "cpus 0"), ({"cpus": "2"}, "cpus is '2'"), ({"gpus": -1}, "gpus -1")],
)
def test_a_size_that_no_pool_has_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PoolSize(**options)


NODES = [{"CPU": 2.0}, {"CPU": 2.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("size", "nodes", "expected"),
    [
        (PoolSize(), [{"CPU": 1.0}], 1),
        (PoolSize(), [{"CPU": 2.0}], 1),
        (PoolSize(), NODES, 3),
        (PoolSize(cpus=2), NODES, 1),
        (PoolSize(cpus=2), [{"CPU": 5.0}], 2),
        (PoolSize(gpus=1), NODES, 2),
        (PoolSize(gpus=0.5, cpus=1), NODES, 2),
        (PoolSize(gpus=0.1), [{"CPU": 64.0, "GPU": 1.0}], 10),
        (PoolSize(actors=4), NODES, 4),
    ],
)
def test_the_default_pool_leaves_a_cpu_and_takes_all_gpus(
    size: PoolSize, nodes: list[dict[str, float]], expected: int
) -> None:
    assert size.fit(nodes, may_grow=False) == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (PoolSize(actors=5), "5 actors of 1 CPU do not fit: .*; 4 fit, so give fewer --actors"),
        (PoolSize(cpus=3), "1 actors of 3 CPUs do not fit: the machines have 2 CPUs, 0 GPUs; 2 CPUs, 2 GPUs; 0 fit"),
        (PoolSize(gpus=4), "1 CPU and 4 GPUs do not fit"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_unless_machines_may_join(size: PoolSize, message: str) -> None:
    with pytest.raises(InputError, match=message):
        size.fit(NODES, may_grow=False)
    assert size.fit(NODES, may_grow=True) == (size.actors or 1)
