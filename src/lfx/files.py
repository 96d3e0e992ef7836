"""Files that lfx writes: whole or not at all, through no link, and cleared up after a process that was killed.

Everything is first written in a private folder beside its target: a random name, mode 0700, and a file `lock` that its
process keeps locked. A folder whose lock is free was left by a process that was killed; the next write to the same
target removes it. A process id would not do: in two containers that share a volume, both processes may be number 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lfx.errors import LfxError

_LOCK = "lock"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextlib.contextmanager
def private_folder(parent: Path, purpose: str, salvage: Callable[[Path], None] = lambda folder: None) -> Iterator[Path]:
    """A new folder that no other process uses; it is removed at the end, with all that is still in it.

    Args:
        parent: an existing folder, on the file system of what is written.
        purpose: folders of the same purpose that were left by killed processes are removed first; a target's name.
        salvage: called with each of these before it is removed.
    Raises:
        OSError: the folder cannot be made.
    """
    # A digest, since a name may be as long as the file system allows.
    prefix = f".lfx-{hashlib.sha256(os.fsencode(purpose)).hexdigest()[:12]}-"
    _sweep(parent, prefix, salvage)
    folder, lock = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path at which to write a file that takes the name `target` when the block ends without an error.

    A link of the name `target` is replaced; what it points to stays as it is.
    """
    target = target.absolute()
    with private_folder(target.parent, target.name) as folder:
        path = folder / target.name
        yield path
        path.replace(target)


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """`private_folder` where the system keeps temporary files.

    Raises:
        LfxError: there is no such folder, or no room in it; says how to name another.
    """
    try:
        with private_folder(Path(tempfile.gettempdir()), purpose) as folder:
            yield folder
    except OSError as error:
        if not is_disk_full(error) and tempfile.tempdir is not None:
            raise
        place = tempfile.tempdir or "the folders for temporary files"
        raise LfxError(f"{place}: {error.strerror}; set TMPDIR to a folder with room") from error


def open_journal(path: Path) -> IO[bytes]:
    """Open a file of ours that has a fixed name, to read and to append; make it where there is none.

    Raises:
        OSError: it cannot be opened, or somebody put a link, a hard link or something else than a file in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise OSError(errno.EEXIST, "it is a link, or no plain file; remove it", str(path))
    return os.fdopen(descriptor, "r+b")


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process and its children; False where another one holds it.

    True without a lock where the system has none (Windows) or the file system takes none.
    """
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ModuleNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except OSError:
        return False


def exchange(first: Path, second: Path) -> bool:
    """Give each of two files or folders the other's name, in one step; False where the system cannot.

    Raises:
        OSError: one of them is not there, or may not be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, by a hard link; copy it where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes to a new file; its mode follows the umask."""
    shutil.copyfile(source, target)


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for want of room, or of quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
        except FileNotFoundError:
            continue  # swept by another process before it could be locked
        if try_lock(lock) and is_at(lock, folder / _LOCK):
            return folder, lock
        os.close(lock)


def _sweep(parent: Path, prefix: str, salvage: Callable[[Path], None]) -> None:
    """Remove what killed processes of this user left. Where the system has no locks, nothing is known to be left."""
    if os.name != "posix":
        return
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another process sweeps too, or it is another user's
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | _NO_FOLLOW)
            try:
                if _was_left(lock):
                    salvage(folder)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _was_left(lock: int) -> bool:
    """Whether no process holds a lock; False where the file system takes no locks."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
