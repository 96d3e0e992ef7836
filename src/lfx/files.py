"""Atomic writes: a target is replaced completely or not at all, links are not followed, leftovers are removed.

Every file is first written in a private folder beside its target. The folder has a random name, mode 0700 and a file
`lock`, which its process keeps locked. If the lock of such a folder is free, its process was killed, and the next write
to the same target removes the folder. A process id would not identify the process: in two containers that share a
volume, both processes may have id 1. A writer that renames several files together holds a lock on the target meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import os
import secrets
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
_CAN_REMOVE_OPEN_FILES = os.name == "posix"  # Windows refuses it
_LOCK_TRIES, _LOCK_PAUSE_S = 600, 0.1  # a minute; locks are held for a few renames only
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
MOUNTED = "it is a mount point, which cannot be replaced; mount its folder instead"  # why a file cannot be written
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def private_folder(parent: Path, purpose: str, salvage: Callable[[Path], Any] = lambda folder: None) -> Iterator[Path]:
    """Make a new folder that no other process uses, and remove it with its content when the block ends.

    Args:
        parent: an existing folder, on the file system of the target.
        purpose: the target's name, or another label. Folders of the same purpose that killed processes left are removed
            first.
        salvage: called with each of these folders before it is removed.
    Raises:
        OSError: the folder cannot be made.
    """
    prefix = f"{_hidden_name(purpose)}-"
    _sweep(parent, prefix, salvage)
    while True:
        folder, lock = parent.absolute() / f"{prefix}{secrets.token_hex(8)}", None
        try:  # an interrupt between the next lines leaves no folder
            folder.mkdir(mode=0o700)
            lock = _lock_in(folder)
            if lock is not None:
                yield folder
                return
        finally:
            _remove_content(folder)
            if lock is not None:  # NFS and FUSE only rename an open file that is removed, and Windows refuses it
                os.close(lock)
            _remove_emptied(folder)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to; the file is renamed to `target` if the block ends without an error.

    If `target` is a link, the link is replaced and the file that it points to is left alone.
    """
    target = target.absolute()
    with private_folder(target.parent, target.name) as folder:
        path = folder / target.name
        yield path
        path.replace(target)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock on a target against other processes and threads of lfx; waits up to a minute for its holder.

    The lock is a file beside the target; its last holder removes it. Hold it for a few renames only. On Windows, which
    has no such locks, nothing is held.

    Raises:
        OSError: the lock file cannot be made, or another process holds the lock for more than a minute.
    """
    path = target.absolute().parent / f"{_hidden_name(target.name)}.lock"
    if not _CAN_REMOVE_OPEN_FILES:
        yield
        return
    while True:
        with _opened_lock(path) as lock:
            _wait_for_lock(lock.fileno())
            if not is_at(lock.fileno(), path):
                continue  # the previous holder removed the file
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """`private_folder` in the system's folder for temporary files.

    Raises:
        LfxError: there is no such folder, or no disk space in it.
    """
    entered = False
    try:
        with private_folder(Path(tempfile.gettempdir()), purpose) as folder:
            entered = True
            yield folder
    except OSError as error:
        if entered and not is_disk_full(error):
            raise
        parent = Path(tempfile.tempdir or "a folder for temporary files")
        raise LfxError(why_unwritten(parent, error, "set TMPDIR to a folder with room")) from error


def open_journal(path: Path) -> IO[bytes]:
    """Open a file of lfx's with a fixed name for reading and appending; create it if it does not exist.

    Raises:
        OSError: it cannot be opened, or is a symbolic link, has a second hard link, or is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # 0 if another process just removed it
        os.close(descriptor)
        raise OSError(errno.EEXIST, "it is a link, or no plain file; remove it", str(path))
    return os.fdopen(descriptor, "r+b")


def remove_open(path: Path, file: IO[bytes]) -> None:
    """Remove an open file, to which nothing may be written afterwards."""
    if not _CAN_REMOVE_OPEN_FILES:
        file.close()
    path.unlink(missing_ok=True)


def try_lock(descriptor: int) -> bool:
    """Try to lock an open file for this process and its children; False if another process holds the lock.

    Returns True without a lock if the system (Windows) or the file system has no locks.
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
    """Swap the names of two files or folders atomically; False if the system cannot.

    Raises:
        OSError: one of them does not exist, or may not be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(first))


def is_same(first: Path, second: Path) -> bool:
    """Whether two paths lead to the same file or folder, also through two mounts of it; neither has to exist."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return first.samefile(second)
    except OSError:
        return False


def is_mount_point(path: Path) -> bool:
    """Whether a folder or a file is mounted at this path, which can not be renamed then; a bind mount counts too."""
    if os.path.ismount(path):
        return True
    if not os.path.lexists(path):  # a mount that another one hides is in the list too
        return False
    absolute = path.absolute()
    name = os.fsencode(Path(os.path.realpath(absolute.parent)) / absolute.name)
    for letter in b"\\ \t\n":  # the backslash first
        name = name.replace(bytes([letter]), b"\\%03o" % letter)
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # another system
        return False
    return any(line.split(b" ")[4] == name for line in lines)


def move_folder(source: Path, target: Path, copied: Callable[[], Any] = lambda: None) -> None:
    """Rename a folder. One that overlayfs cannot rename, since it is of a container's image, is copied and removed.

    Args:
        target: a new path in a private folder.
        copied: called when the whole copy is at `target`, before the folder is removed.
    Raises:
        OSError: the folder cannot be renamed, copied or removed. If only a part was removed, the copy is kept beside
            the private folder.
    """
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(f"{target.name}-copy")
        shutil.copytree(source, copy, symlinks=True)
        copy.rename(target)
        copied()
        try:
            shutil.rmtree(source)
        except OSError as failure:
            kept = kept_folder(target.parent.parent)
            target.rename(kept)
            why = f"{failure.strerror}, so a part of it was removed; the whole of it is in {kept}"
            raise OSError(failure.errno, why) from failure


def kept_folder(parent: Path) -> Path:
    """A new name for a folder of the user's that lfx can neither remove nor put back."""
    return parent / f"lfx-kept-{secrets.token_hex(4)}"


def follow_umask(file: Path, mode: int) -> None:
    """Give a file of this process the access `mode`, where the file system has modes."""
    if stat.S_IMODE(file.stat().st_mode) == mode:
        return
    try:
        file.chmod(mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise


_COPIED_BYTES = 16 << 20  # which take some milliseconds


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file, or copy its bytes if it is small or the file system cannot link.

    The onnx package refuses a file while it has a second hard link. A copy's mode follows the umask.
    """
    if source.stat().st_size <= _COPIED_BYTES:
        copy(source, target)
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes to a new file; its mode follows the umask."""
    shutil.copyfile(source, target)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because disk or quota is full; a library may wrap the system's error or quote it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return True
        if any(os.strerror(number) in str(cause) for number in _NO_ROOM):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def why_unwritten(target: Path, error: BaseException, cure: str) -> str:
    """The error message for a file or folder that could not be written.

    Args:
        cure: what to do instead, such as "choose another --output".
    """
    if is_disk_full(error):
        return f"{target} cannot be written: no disk space left; make room, or {cure}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return f"{target} cannot be written: {reason}; {cure}"


def _hidden_name(purpose: str) -> str:
    """The prefix of the hidden names that belong to `purpose`; a digest, since `purpose` may be too long for a name."""
    return f".lfx-{hashlib.sha256(os.fsencode(purpose)).hexdigest()[:12]}"


def _lock_in(folder: Path) -> int | None:
    """Make the `lock` file of a new private folder, and lock it; None if another process has removed the folder."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
    except FileNotFoundError:
        return None
    if try_lock(lock) and is_at(lock, folder / _LOCK):
        return lock
    os.close(lock)
    return None


def _remove_content(folder: Path) -> None:
    """Remove what a private folder holds, except its lock: if this process is killed, it still marks a leftover."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()


def _remove_emptied(folder: Path) -> None:
    """Remove a private folder and its lock. One that keeps a file which another process has open stays a leftover."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {_LOCK}:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, prefix: str, salvage: Callable[[Path], Any]) -> None:
    """Remove the folders that killed processes of this user left; without locks (Windows) none can be recognized."""
    if os.name != "posix":
        return
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another process removes it too, or it is another user's
            # Checked once: in a folder with the sticky bit nobody else can swap a folder that this user owns.
            status = folder.stat(follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | _NO_FOLLOW)
            except FileNotFoundError:
                folder.rmdir()  # its process was killed before it made the lock; one that is alive makes a new folder
                continue
            if not _is_leftover(lock):
                os.close(lock)
                continue
            try:
                salvage(folder)
            except BaseException:
                os.close(lock)
                raise
            _remove_content(folder)
            _remove_emptied(folder)  # the lock is held, since its process may be alive and about to lock it
            os.close(lock)
            folder.rmdir()  # where the open lock was only renamed


def _is_leftover(lock: int) -> bool:
    """Whether no process holds this lock; False if the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _opened_lock(path: Path) -> IO[bytes]:
    """Open a lock file. SSHFS remembers for a moment the one that its holder has removed, and then does not make it."""
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(FileNotFoundError):
            return open_journal(path)
        if not path.parent.is_dir():
            break
        time.sleep(_LOCK_PAUSE_S)
    return open_journal(path)


def _wait_for_lock(descriptor: int) -> None:
    """Lock an open file, waiting for its holder; returns without a lock if the system or the file system has none."""
    for _ in range(_LOCK_TRIES):
        if try_lock(descriptor):
            return
        time.sleep(_LOCK_PAUSE_S)
    raise OSError(errno.EBUSY, "another process holds its lock and does not release it")
