"""Makes objects fail with an error, instead of hanging, in a forked child process.

A forked child has its parent's memory and none of its other threads. A lock that another thread held stays locked, a
queue has no worker, and a backend's thread pool has no threads. So a run may never end there, nor may freeing the model
(OpenVINO's thread pool waits for its threads). The rule for all backends: an Engine and a Batcher work only in the
process that made them, and raise LfxError in any other.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

from lfx.errors import LfxError


class Watched(Protocol):
    """An object that is told when it is in a forked child process."""

    def forked(self) -> None:
        """Called in the child before `os.fork` returns there. It must not wait for a lock."""
        ...


_generation = [0]
_watched: weakref.WeakSet[Watched] = weakref.WeakSet()


def watch(watched: Watched) -> None:
    """Call `watched.forked()` in each child process that is forked while the object exists."""
    _watched.add(watched)


def generation() -> int:
    """Number of forks between this process and the one that imported this module."""
    return _generation[0]


def keep(value: object) -> None:
    """Leak an object on purpose: in a child process, freeing it may wait for threads that only the parent has."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def made_before(name: str) -> str:
    """The error message of an Engine or a Batcher in a child process."""
    return f"this {name} was made before a fork, and works in its own process only; make a new one in each process"


def check_process(made_at: int, name: str) -> None:
    """Raise LfxError in a child process that was forked after the object was made.

    Args:
        made_at: `generation()` when the object was made.
    """
    if made_at != generation():
        raise LfxError(made_before(name))


def _notify_all() -> None:
    _generation[0] += 1
    for watched in list(_watched):
        watched.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_notify_all)
