"""The memory of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Memory of a process, in bytes.

    Attributes:
        resident: resident set size.
        shared: the part of `resident` that is pages of files, such as mapped weights; processes that map the same file
            share them. None where the system does not report it.
    """

    resident: int
    shared: int | None

    def __str__(self) -> str:
        shared = "" if self.shared is None else f", of which {_megabytes(self.shared)} shared pages of files"
        return f"{_megabytes(self.resident)} resident{shared}"


def memory() -> Memory | None:
    """Return the memory of this process; None where the system does not report it."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        page = os.sysconf("SC_PAGE_SIZE")
        return Memory(int(fields[1]) * page, int(fields[2]) * page)
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import resource
        import sys

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except ImportError:
        return None
    return Memory(largest if sys.platform == "darwin" else largest * 1024, None)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
