"""What a fork leaves in the child process: all of its parent's memory, and none of its threads.

So a lock that another thread held stays locked for ever, a queue has no worker, and a backend's thread pool is empty:
a run may wait for ever there, and so may freeing the model (OpenVINO's pool waits for its threads). One rule for all
backends: an Engine and a Batcher work in the process that made them, and say so in every other one.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Watched(Protocol):
    """What must know that it is in a child process."""

    def forked(self) -> None:
        """Called in the child, before `os.fork` returns there. It may not wait for a lock."""
        ...


_generation = [0]
_watched: weakref.WeakSet[Watched] = weakref.WeakSet()


def watch(thing: Watched) -> None:
    """Have `thing.forked()` called in every child process, as long as it lives."""
    _watched.add(thing)


def generation() -> int:
    """The number of forks between the first process and this one, as far as this module saw them."""
    return _generation[0]


def keep(thing: object) -> None:
    """Never free an object, in a child process where freeing it may wait for threads that are not there."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def made_before(name: str) -> str:
    """What an Engine or a Batcher says in a child process."""
    return f"this {name} was made before a fork, and works in its own process only; make a new one in each process"


def _tell_all() -> None:
    _generation[0] += 1
    for thing in list(_watched):
        thing.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_tell_all)
