"""The models of one process, and the requests in progress."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lfx.checks import shown
from lfx.errors import InputError, LfxError, one_line
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.serve.limits import BODY_BYTES, REPLY_BYTES, SMALL_REPLY, UNREAD_BYTES, Memory, above
from lfx.runtime.serve.model import Input, Prepared, ServedModel
from lfx.runtime.serve.replies import RefusalError, busy, late, too_many_inputs, unavailable
from lfx.runtime.serve.settings import BYTES_PER_TOKEN, NO_LIMIT_TOKENS, OTHER_BYTES, Settings
from lfx.runtime.serve.writing import Written, WrittenToken

Result = TypeVar("Result")
Reply = TypeVar("Reply")
# Fields of the log line of the request in progress: its model, number of texts and number of tokens.
log_fields: ContextVar[dict[str, Any]] = ContextVar("log_fields")

NO_THREAD = "the limit of processes (ulimit -u, or the container's) is reached; raise it"


class Service:
    """Opens the models in a thread, and runs requests on them.

    Attributes:
        settings: the argument.
        models: name -> model, once `load` is done.
        state: "warming up", "ready" or "stopping".
        in_progress: number of texts that are being tokenized, are waiting, are being computed, or have no reply yet.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, ServedModel] = {}
        self.state = "warming up"
        self.in_progress = 0
        # One text is tokenized at a time, since an encoding takes many times the memory of its text. Answers have
        # another thread, so that they do not wait for tokenization.
        self._tokenizing = ThreadPoolExecutor(1, "lfx-tokenize")
        self._answering = ThreadPoolExecutor(1, "lfx-answer")
        # One text is written at a time: each uses all threads of the backend.
        self._generating = ThreadPoolExecutor(1, "lfx-generate")
        self._executors = (self._tokenizing, self._answering, self._generating)
        self._rendering = asyncio.Lock()
        self.body_memory = Memory(BODY_BYTES, "the bodies of the requests in progress")
        self.reply_memory = Memory(REPLY_BYTES, "the outputs of the replies in progress")
        self.unread_bytes: Callable[[], int] = lambda: 0

    def load(self) -> None:
        """Open and warm up all models.

        Raises:
            LfxError: a model cannot be opened, or the system gives no thread.
        """
        try:
            for executor in self._executors:  # starts its thread, so that no request fails where the system gives none
                executor.submit(int).result()
        except RuntimeError as error:
            raise LfxError(f"{one_line(error)}: {NO_THREAD}") from error
        models = {}
        for name, path in self.settings.models.items():
            try:
                models[name] = ServedModel(name, path, self.settings)
            except LfxError as error:
                raise type(error)(f"{name}: {error}" if len(self.settings.models) > 1 else str(error)) from error
        self.models = models
        if self.state == "warming up":
            self.state = "ready"

    @property
    def condition(self) -> str:
        """`state`, or "failed" if a model no longer takes requests."""
        failed = self.state == "ready" and not all(model.batcher.is_open for model in self.models.values())
        return "failed" if failed else self.state

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a request."""
        if self.settings.max_body_bytes is not None:
            return self.settings.max_body_bytes
        one = [model.largest_body for model in self.models.values()]
        return max(one, default=NO_LIMIT_TOKENS * BYTES_PER_TOKEN + OTHER_BYTES) * self.settings.max_inputs

    def check_opened(self) -> None:
        """Raise RefusalError while the models are being opened."""
        if not self.models:
            raise unavailable("the models are being opened; try again later")

    def check_ready(self) -> None:
        """Raise RefusalError while the models are being opened, and if the texts or the replies are at their limit."""
        self.check_opened()
        if self.in_progress >= self.settings.max_pending:
            raise busy(f"{self.in_progress} texts are in progress; try again later")
        self._check_unread()

    def model(self, name: str | None) -> ServedModel:
        """Return the model named `name`; None = the first.

        Raises:
            RefusalError: no model has that name.
        """
        self.check_ready()
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise self.no_such_model(name)
        return self.models[name]

    def chosen(self, path: str | None, body: str | None) -> ServedModel:
        """Return the model that a request names in its path or its body; the first if it names none.

        Raises:
            RefusalError: it names two, or no model has that name.
        """
        if path is not None and body not in (None, path):
            raise RefusalError(422, f"the path is of the model {path}, and model is {shown(body)}; give one of them")
        return self.model(body if path is None else path)

    def no_such_model(self, name: str) -> RefusalError:
        """The refusal of a request for a model that is not served."""
        names = ", ".join(self.settings.models)
        message = f"the model {shown(name)} does not exist; the models are: {names}"
        return RefusalError(404, message, code="model_not_found")

    async def parse(self, work: Callable[[], Result]) -> Result:
        """Run a function in the thread that tokenizes."""
        return await self._in_thread(self._tokenizing, work)

    async def _render(self, make: Callable[[], Reply], size: int) -> Reply:
        """Make a reply in the thread that makes answers.

        Args:
            size: number of numbers and texts in it.
        Raises:
            RefusalError: the replies that clients have not read yet are UNREAD_BYTES or more.
        """
        # Large replies are made one at a time, since each is counted as unread when the next one is made. Others do not
        # wait for them.
        async with self._rendering if size > SMALL_REPLY else contextlib.nullcontext():
            self._check_unread()
            return await self._in_thread(self._answering, make)

    async def _in_thread(self, executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        """Run a function in a thread; if the call is cancelled before, what the function holds is freed."""
        waiting = [work]  # the executor keeps a cancelled call until its turn comes
        del work

        def run() -> Result:
            return waiting.pop()()

        try:
            return await asyncio.get_running_loop().run_in_executor(executor, run)
        finally:
            waiting.clear()

    def _check_unread(self) -> None:
        if self.unread_bytes() >= UNREAD_BYTES:
            raise above("the replies that clients have not read yet", UNREAD_BYTES)

    async def answer(
        self,
        model: ServedModel,
        inputs: Sequence[Input],
        read: Callable[[Prepared, Outputs], Result],
        reply: Callable[[list[Result], int], Reply],
    ) -> Reply:
        """Tokenize and compute the inputs of one request; if the call is cancelled, those pending are not computed.

        Args:
            read: takes from the outputs of an input what the reply needs, in the thread that makes answers: JSON types
                and arrays. The outputs are freed then: the logits of one text for fill-mask can have 800 MB.
            reply: makes the reply from what `read` returned for each input, and the number of tokens; in that thread.
        Raises:
            RefusalError: there are too many inputs, too many texts in progress, or too many unread replies.
            LfxError: the model cannot take an input, or failed.
        """
        if len(inputs) > self.settings.max_inputs:
            raise too_many_inputs(len(inputs), self.settings.max_inputs)
        with self._counted(len(inputs)), _Submissions() as submissions:
            for item in inputs:
                if submissions.failed:
                    break
                async with model.waiting_outputs.room():
                    prepared, future = await self.parse(functools.partial(submissions.submit, model, item))
                    reading = self._read(prepared, future, read)
                    del future  # it will hold the outputs
                    model.waiting_outputs.count(prepared.output_bytes, submissions.start(reading))
            parts = await asyncio.gather(*submissions.tasks)
            tokens = sum(part.tokens for part in parts)
            log_fields.get({}).update(model=model.name, texts=len(parts), tokens=tokens)
            size = sum(part.size for part in parts)
            return await self._render(lambda: reply([part.result for part in parts], tokens), size)

    async def _read(
        self, prepared: Prepared, future: Future[Outputs], read: Callable[[Prepared, Outputs], Any]
    ) -> _Part:
        def part(outputs: Outputs) -> _Part:
            result = read(prepared, outputs)
            return _Part(result, prepared.tokens, _size_of(result))

        reading = self._in_thread(self._answering, functools.partial(part, await asyncio.wrap_future(future)))
        del future  # it holds the outputs
        try:
            return await reading
        except (LfxError, RefusalError) as error:
            _free_frames(error)
            raise

    async def generate(
        self,
        model: ServedModel,
        text: str,
        options: dict[str, Any],
        reply: Callable[[Written], Reply],
        *,
        truncate: bool,
    ) -> Reply:
        """Write a text with a model; if the call is cancelled, a text that is waiting is not written.

        Args:
            reply: makes the reply, in the thread that makes answers.
        Raises:
            RefusalError: there are too many texts in progress, or too many unread replies.
            LfxError: the model cannot take the text or an option, or failed.
        """
        ended = threading.Event()
        with self._counted(1):
            try:
                written = await self._in_thread(
                    self._generating, lambda: model.generate(text, options, ended.is_set, truncate=truncate)
                )
            finally:
                ended.set()
            _log_written(model, written)
            return await self._render(lambda: reply(written), len(written.ids))

    async def stream(
        self, model: ServedModel, text: str, options: dict[str, Any], *, truncate: bool
    ) -> AsyncGenerator[tuple[WrittenToken, Written | None], None]:
        """Like `generate`, token by token; if the generator is closed, no further token is computed.

        Yields:
            Each token; with the last one, the text.
        Raises:
            RefusalError: the last token takes longer than answer_seconds.
        """
        ended, loop = threading.Event(), asyncio.get_running_loop()
        tokens: asyncio.Queue[WrittenToken] = asyncio.Queue()

        def put(token: WrittenToken) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: the server stopped meanwhile
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        deadline = loop.time() + self.settings.answer_seconds
        with self._counted(1):
            writing = loop.run_in_executor(
                self._generating, lambda: model.generate(text, options, ended.is_set, truncate=truncate, on_token=put)
            )
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        token = await _next_token(tokens, writing)
                        written = await writing if token.last else None
                    if written is not None:
                        _log_written(model, written)
                    yield token, written
                    if written is not None:
                        return
            except TimeoutError as error:
                raise late(self.settings.answer_seconds) from error
            finally:
                ended.set()
                writing.cancel()

    @contextlib.contextmanager
    def _counted(self, count: int) -> Iterator[None]:
        """Count texts as in progress.

        Raises:
            RefusalError: there are too many.
        """
        # A request is taken whole while fewer than max_pending texts are in progress, even if it then exceeds them.
        self.check_ready()
        self.in_progress += count
        try:
            yield
        finally:
            self.in_progress -= count

    def close(self) -> None:
        """Complete the pending requests, wait for the threads, and free the models.

        Cancel first what must not be computed. The end of the process would wait for the threads too.
        """
        self.state = "stopping"
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)
        for model in self.models.values():
            model.close()

    def describe(self) -> list[dict[str, Any]]:
        """Inputs, outputs and limits of each model."""
        return [model.describe() for model in self.models.values()]


def _free_frames(error: BaseException | None) -> None:
    """Free what the frames hold in which an error and its causes were raised."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _log_written(model: ServedModel, written: Written) -> None:
    log_fields.get({}).update(model=model.name, texts=1, tokens=written.tokens + len(written.ids))


async def _next_token(tokens: asyncio.Queue[WrittenToken], writing: asyncio.Future[Written]) -> WrittenToken:
    """Wait for the next token; raises the error of `writing` if it ends before."""
    token = asyncio.ensure_future(tokens.get())
    try:
        both: set[asyncio.Future[Any]] = {token, writing}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if tokens.empty() and not token.done():
            writing.result()
        return await token
    finally:
        token.cancel()


@dataclass(frozen=True)
class _Part:
    """What the reply has of one input.

    Attributes:
        result: JSON types and arrays.
        tokens: of the input.
        size: number of numbers and texts in `result`.
    """

    result: Any
    tokens: int
    size: int


def _size_of(value: Any) -> int:
    """Number of numbers and texts in a value of JSON types and arrays."""
    if isinstance(value, np.ndarray):
        return int(value.size)
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    return sum(map(_size_of, value)) if isinstance(value, list) else 1


class _Submissions:
    """The submitted inputs of one request; on exit those that are not done are cancelled.

    Attributes:
        tasks: those that read the outputs. On exit they are forgotten: in a cycle with an error and its traceback they
            would keep the outputs until Python collects it, which may be hundreds of requests later.
        failed: whether one of them has failed.
    """

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any]] = []
        self.failed = False
        self._futures: list[weakref.ref[Future[Outputs]]] = []
        self._ended = threading.Event()

    def submit(self, model: ServedModel, item: Input) -> tuple[Prepared, Future[Outputs]]:
        """Submit one input; called in the thread that tokenizes, which may still run when the request has ended."""
        if self._ended.is_set():
            raise InputError("the request has ended")
        prepared, future = model.submit(item)
        self._futures.append(weakref.ref(future))
        if self._ended.is_set():
            future.cancel()
        return prepared, future

    def start(self, reading: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start reading the outputs of an input."""
        self.tasks.append(asyncio.create_task(reading))
        self.tasks[-1].add_done_callback(self._note)
        return self.tasks[-1]

    def _note(self, task: asyncio.Task[Any]) -> None:
        self.failed |= not task.cancelled() and task.exception() is not None

    def __enter__(self) -> _Submissions:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for task in self.tasks:
            task.cancel()
        self.tasks.clear()
        for reference in self._futures:
            if (future := reference()) is not None:
                future.cancel()
