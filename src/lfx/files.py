"""Files that lfx writes: whole or not at all, through no link, and cleared up after a process that was killed.

Everything is first written in a private folder beside its target: a random name, mode 0700, and a file `lock` that its
process keeps locked. A folder whose lock is free was left by a process that was killed; the next write to the same
target removes it. A process id would not do: in two containers that share a volume, both processes may be number 1.
Who must change several names together holds a lock on the target while it does.
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lfx.errors import LfxError, one_line

_LOCK = "lock"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_LOCK_TRIES, _LOCK_PAUSE_S = 600, 0.1  # what is locked is a rename or two
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def private_folder(parent: Path, purpose: str, salvage: Callable[[Path], Any] = lambda folder: None) -> Iterator[Path]:
    """A new folder that no other process uses; it is removed at the end, with all that is still in it.

    Args:
        parent: an existing folder, on the file system of what is written.
        purpose: folders of the same purpose that were left by killed processes are removed first; a target's name.
        salvage: called with each of these before it is removed.
    Raises:
        OSError: the folder cannot be made.
    """
    prefix = f"{_hidden_name(purpose)}-"
    _sweep(parent, prefix, salvage)
    folder, lock = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        _remove(folder)
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
def locked(target: Path) -> Iterator[None]:
    """Keep other processes and threads of lfx from changing what has the name `target`; waits for the one that does.

    The lock is a file beside the target, which the last holder removes. Hold it for a few renames only.

    Raises:
        OSError: the lock cannot be made.
    """
    path = target.absolute().parent / f"{_hidden_name(target.name)}.lock"
    while True:
        with open_journal(path) as lock:
            _wait_for_lock(lock.fileno())
            if not is_at(lock.fileno(), path):
                continue  # the holder before took it away
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """`private_folder` where the system keeps temporary files.

    Raises:
        LfxError: there is no such folder, or no room in it; says how to name another.
    """
    made = False
    try:
        with private_folder(Path(tempfile.gettempdir()), purpose) as folder:
            made = True
            yield folder
    except OSError as error:
        if made and not is_disk_full(error):
            raise
        place = Path(tempfile.tempdir or "a folder for temporary files")
        raise LfxError(why_unwritten(place, error, "set TMPDIR to a folder with room")) from error


def open_journal(path: Path) -> IO[bytes]:
    """Open a file of ours that has a fixed name, to read and to append; make it where there is none.

    Raises:
        OSError: it cannot be opened, or somebody put a link, a hard link or something else than a file in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # 0 where another process just removed it
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


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room or of quota; a library may wrap the system's error, or quote it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return True
        if any(os.strerror(number) in str(cause) for number in _NO_ROOM):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def why_unwritten(target: Path, error: BaseException, cure: str) -> str:
    """The message for a file or folder that could not be written.

    Args:
        cure: what to do instead, such as "choose another --output".
    """
    if is_disk_full(error):
        return f"{target} cannot be written: no disk space left; make room, or {cure}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return f"{target} cannot be written: {reason}; {cure}"


def _hidden_name(purpose: str) -> str:
    """The start of the names of what belongs to `purpose`: a digest, since that name may be of any length."""
    return f".lfx-{hashlib.sha256(os.fsencode(purpose)).hexdigest()[:12]}"


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


def _remove(folder: Path) -> None:
    """Remove a private folder, its lock last: without one nobody would know that a process was killed in here."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, prefix: str, salvage: Callable[[Path], Any]) -> None:
    """Remove what killed processes of this user left. Where the system has no locks, nothing is known to be left."""
    if os.name != "posix":
        return
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another process sweeps too, or it is another user's
            # One look, at the name itself: nobody else can exchange a folder of this user's in a sticky folder.
            status = folder.stat(follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | _NO_FOLLOW)
            except FileNotFoundError:
                folder.rmdir()  # its process was killed before it could lock it, or is about to and takes another
                continue
            try:
                if _was_left(lock):
                    salvage(folder)
                    _remove(folder)
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


def _wait_for_lock(descriptor: int) -> None:
    """Lock an open file once no other holds it; without a lock where the system or the file system has none."""
    for _ in range(_LOCK_TRIES):
        if try_lock(descriptor):
            return
        time.sleep(_LOCK_PAUSE_S)
    raise OSError(errno.EBUSY, "another process holds its lock, and does not give it back")
