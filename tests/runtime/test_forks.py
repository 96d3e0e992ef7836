"""A forked child does not wait for threads and locks of its parent."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest

from lfx.errors import LfxError
from lfx.runtime import Batcher, Engine
from lfx.runtime.forks import made_before
from lfx.runtime.metrics import Metrics
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.test_batcher import LONG, Recorded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Iterator[Engine]:
    with Engine(bundle(), threads=2) as opened:
        opened.run([5, 6])
        yield opened


def in_child(function: Callable[[], Any]) -> Any:
    """Call a function in a forked child with a time limit; returns its result, or the text of its LfxError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                result = function()
            except LfxError as error:
                result = str(error)
            os.write(writer, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            assert select.select([pipe], [], [], LONG)[0], "the child hangs"
            return pickle.loads(pipe.read())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextlib.contextmanager
def held(lock: Any) -> Iterator[None]:
    """Have another thread hold the lock."""
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            locked.set()
            done.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(LONG)
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.run([5, 6]),
        lambda engine: next(engine.stream([[5, 6]])),
        lambda engine: engine.warm_up(),
        lambda engine: engine.supports_shape(1, 1),
        Batcher,
    ],
    ids=["run", "stream", "warm_up", "supports_shape", "Batcher"],
)
def test_an_engine_of_the_parent_is_an_error_in_the_child(engine: Engine, ask: Callable[[Engine], Any]) -> None:
    with held(engine.metrics._lock):
        assert in_child(lambda: ask(engine)).startswith("this Engine was made before a fork")
    assert engine.run([5, 6])  # the parent's Engine still works


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_close_in_the_child_does_not_wait_for_the_backend_s_threads(bundle: MakeBundle, backend: str) -> None:
    with Engine(bundle(), backend, threads=2) as engine:
        before = engine.run([5, 6])["pooler_output"]
        assert in_child(engine.close) is None
        np.testing.assert_array_equal(engine.run([5, 6])["pooler_output"], before)


def test_a_new_engine_in_the_child_works_beside_the_parent_s(bundle: MakeBundle) -> None:
    backend = "onnxruntime"

    def ask() -> Any:
        new = Engine(bundle(), backend, threads=2)
        with Batcher(new) as batcher:
            return new.run([5, 6])["pooler_output"], batcher.submit([5, 6]).result(LONG)["pooler_output"]

    with Engine(bundle(), backend, threads=2) as engine:
        expected = engine.run([5, 6])["pooler_output"]
        for result in in_child(ask):
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_openvino_is_refused_in_a_child_of_a_process_that_used_it(bundle: MakeBundle) -> None:
    with Engine(bundle(), "openvino", threads=2):
        message = in_child(lambda: Engine(bundle(), "openvino"))
    assert message.startswith("OpenVINO was used before this process was forked")


ENDING = """
import os, signal, sys
from lfx.runtime import Engine

path, backend, before = sys.argv[1], sys.argv[2], sys.argv[3] == "before"
if before:
    engine = Engine(path, backend, threads=4)
    engine.run([3, 4, 5])
child = os.fork()
if child == 0:
    signal.alarm(60)
    if not before:
        engine = Engine(path, backend, threads=4)
        engine.run([3, 4, 5])
    sys.exit(7)
_, status = os.waitpid(child, 0)
code = os.waitstatus_to_exitcode(status)
sys.exit(0 if code == 7 else f"the child ended with {code}")
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_child_ends_when_it_exits(bundle: MakeBundle, backend: str, when: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", ENDING, str(bundle()), backend, when]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_an_engine_of_the_parent_can_be_pickled_and_opened_in_the_child(engine: Engine) -> None:
    result = in_child(lambda: pickle.loads(pickle.dumps(engine)).run([5, 6])["pooler_output"])
    np.testing.assert_allclose(result, engine.run([5, 6])["pooler_output"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("begun", [False, True], ids=["not-begun", "begun"])
def test_a_stream_of_the_parent_ends_in_the_child_with_an_error(begun: bool, led_bundle: MakeLed) -> None:
    with Engine(led_bundle()[1], threads=1) as writer:
        columns = writer.generate([5, 6, 7, 2], stream=True, max_new_tokens=4, eos_token_id=None)
        if begun:
            next(columns)
        assert in_child(lambda: next(columns)) == made_before("Engine")
        assert len(list(columns)) == 4 - begun


def test_a_batcher_of_the_parent_answers_in_the_parent_only(engine: Engine) -> None:
    recorded = Recorded(engine)
    recorded.gate.clear()
    called: list[Any] = []
    with Batcher(recorded, max_delay_ms=0) as batcher:  # type: ignore[arg-type]
        running = batcher.submit([5, 6])
        assert recorded.entered.wait(LONG)
        waiting = batcher.submit([5, 6])
        futures = [running, waiting]
        for future in futures:
            future.add_done_callback(called.append)

        def ask() -> list[str]:
            messages = [str(future.exception(LONG)) for future in futures]
            assert not wait(futures, LONG).not_done
            with contextlib.suppress(ZeroDivisionError), batcher:  # leaving the block closes it
                with pytest.raises(LfxError) as caught:
                    batcher.submit([5, 6])
                messages.append(str(caught.value))
                raise ZeroDivisionError
            batcher.close()
            return [*messages, str(len(called))]

        with held(batcher._changed), held(running._condition), held(waiting._condition), held(engine.metrics._lock):
            *messages, calls = in_child(ask)
        recorded.gate.set()
        assert running.result(LONG).keys() == waiting.result(LONG).keys()
    assert len(messages) == 3
    assert all(line.startswith("this Batcher was made before a fork") and "\n" not in line for line in messages)
    assert calls == "0"  # callbacks run in the parent only
    assert len(called) == 2


def test_a_callback_may_fork_and_its_child_has_the_answer(engine: Engine) -> None:
    result: list[Any] = []

    def fork(future: Any) -> None:
        result.append(in_child(lambda: (str(other.exception(LONG)), future.result(LONG)["pooler_output"])))

    with Batcher(engine, max_delay_ms=3_000_000) as batcher:
        asked, other = (batcher.submit([5, 6]) for _ in range(2))
        asked.add_done_callback(fork)
    others_error, own_result = result[0]
    assert others_error.startswith("this Batcher was made before a fork")
    np.testing.assert_array_equal(own_result, asked.result(LONG)["pooler_output"])


def test_a_cancelled_request_is_cancelled_in_the_child(engine: Engine) -> None:
    with Batcher(engine, max_delay_ms=3_000_000) as batcher:
        unwanted = batcher.submit([5, 6])
        assert unwanted.cancel()
        assert in_child(lambda: not wait([unwanted], LONG).not_done and unwanted.cancelled())


def test_metrics_can_be_read_in_the_child() -> None:
    metrics = Metrics()
    metrics.failed()
    with held(metrics._lock):
        assert in_child(lambda: metrics.snapshot().failed) == 1
