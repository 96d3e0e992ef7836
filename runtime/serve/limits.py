"""Limits of the memory that the requests of a process hold together, and of one reply."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

from numpy.typing import NDArray

from lfx.runtime.outputs import OUTPUT_BYTES
from lfx.runtime.serve.replies import RefusalError, busy

BODY_BYTES = 256 << 20  # of the bodies that are being received, or whose requests are in progress
REPLY_BYTES = 1 << 30  # of the outputs that the requests in progress keep for their replies
UNREAD_BYTES = 256 << 20  # of the replies that their clients have not read yet
# json.dumps holds the GIL, for this many numbers half a second; base64 is much faster.
MAX_JSON_NUMBERS = 500_000
SMALL_REPLY = 32_768  # numbers and texts of a reply that waits for no other: 32 embeddings of 1,024
MAX_REPLY_BYTES = 64 << 20  # of the outputs of one reply


def above(content: str, limit: int) -> RefusalError:
    """The refusal of a request for which there is no memory."""
    return busy(f"{content} are above {limit:,} bytes, the limit of this server; try again later")


class Memory:
    """Memory that the requests of a process hold together. Thread-safe.

    Args:
        limit: in bytes; a request that would exceed it is refused.
        content: what it holds, for the message of the refusal.
    Attributes:
        held: number of bytes that are held.
    """

    def __init__(self, limit: int, content: str) -> None:
        self.held = 0
        self._limit, self._content, self._lock = limit, content, threading.Lock()

    def take(self, share: Share, size: int) -> None:
        """Add bytes to the share of a request; nothing is added if the request has ended.

        Raises:
            RefusalError: there is no room for them.
        """
        with self._lock:
            if self.held + size > self._limit:
                raise above(self._content, self._limit)
            if not share.ended:
                share.size += size
                self.held += size

    def end(self, share: Share) -> None:
        """Free the share of a request."""
        with self._lock:
            share.ended = True
            self.held -= share.size


class Share:
    """What one request holds of a `Memory`, until the end of its `with` block.

    Attributes:
        size: in bytes.
        ended: whether the block has ended; a thread may go on with the request.
    """

    def __init__(self, memory: Memory) -> None:
        self.size, self.ended, self._memory = 0, False, memory

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.end(self)

    def take(self, size: int) -> None:
        """Hold more bytes; see `Memory.take`."""
        self._memory.take(self, size)


class ReplySize:
    """The size of the outputs that a reply has.

    Args:
        share: the request's, of the memory for the outputs of replies.
        encoding: "float" or "base64".
        field: the field of the request that asks for base64; None if the route has none.
    """

    def __init__(self, share: Share, encoding: str, field: str | None = "encoding") -> None:
        self._share, self._encoding, self._field, self._numbers = share, encoding, field, 0

    def add(self, *arrays: NDArray[Any]) -> None:
        """Count outputs; raises RefusalError if those of the reply so far, or of all replies, are too large."""
        added = sum(array.nbytes for array in arrays)
        self._numbers += sum(array.size for array in arrays)
        if self._encoding == "float" and self._numbers > MAX_JSON_NUMBERS:
            cure = "" if self._field is None else f'give {self._field}: "base64", or '
            raise RefusalError(
                413,
                f"the outputs have {self._numbers:,} numbers or more, above the {MAX_JSON_NUMBERS:,} of a JSON reply; "
                f"{cure}ask for fewer outputs or texts",
            )
        if self._share.size + added > MAX_REPLY_BYTES:
            raise RefusalError(
                413,
                f"the outputs have {self._share.size + added:,} bytes or more, above the {MAX_REPLY_BYTES:,} of a "
                "reply; ask for fewer outputs or texts",
            )
        self._share.take(added)


class WaitingOutputs:
    """The outputs of a model that are being computed, or wait for their answers. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._bytes, self._turn, self._freed = 0, asyncio.Lock(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        """Wait for room, and let nobody else wait until the outputs of one more input are counted."""
        async with self._turn:
            while self._bytes >= OUTPUT_BYTES:
                self._freed.clear()
                await self._freed.wait()
            yield

    def count(self, size: int, reading: asyncio.Future[Any]) -> None:
        """Count the bytes of an input's outputs, until `reading` is done."""

        def free(_: object) -> None:
            self._bytes -= size
            self._freed.set()

        self._bytes += size
        reading.add_done_callback(free)
