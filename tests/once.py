"""Folders that several processes of tests need, and that one of them makes."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def fill_once(folder: Path, make: Callable[[Path], object], stem: Path) -> None:
    """Let make(new folder) fill a folder, unless it is there; other processes wait until it is whole.

    Args:
        stem: path of the lock and of the unfinished folder, without their endings.
    """
    unfinished = stem.with_name(f"{stem.name}.unfinished")
    with stem.with_name(f"{stem.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
