"""Writing a bundle atomically. An older bundle is replaced; a folder with files of the user's is not."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lfx.checks import file_path
from lfx.errors import ArtifactError, ExportError, LfxError
from lfx.files import (
    exchange,
    follow_umask,
    is_disk_full,
    is_mount_point,
    kept_folder,
    locked,
    move_folder,
    private_folder,
    why_unwritten,
)
from lfx.manifest import MANIFEST, Manifest

# Names in the private folder. While the file _EXCHANGING exists, _NEW may hold the older bundle. While the file _COPIED
# exists, _OLD is a copy of the older bundle, which is being removed.
_NEW, _OLD, _EXCHANGING, _COPIED, _REMOVED = "new", "old", "exchanging", "copied", "removed"
_SIGNATURE = f"{MANIFEST}.minisig"
_CURE = "choose another --output"
_EFFECTIVE = os.access in os.supports_effective_ids
# A file that another process has open gets such a name when it is removed, on NFS and on FUSE, until it is closed.
_STILL_OPEN = (".nfs", ".fuse_hidden")


def check_target(output: Path) -> None:
    """Check that a bundle may be written to `output`.

    Raises:
        ExportError: `output` exists and may not be replaced, or its parent folder does not exist.
    """
    file_path(output, "output", ExportError)
    try:
        target, current = output.resolve(), Path.cwd()
        if not target.parent.is_dir():
            raise ExportError(f"the folder {target.parent} does not exist; make it, or {_CURE}")
        with _private_folder(target), locked(target):  # another export may be replacing it, or was killed meanwhile
            refusal = _replacement_refusal(target, output)
        if refusal is not None:
            raise ExportError(refusal)
        if target.exists() and (target == current or target in current.parents):
            raise ExportError(f"{output} is the current folder or above it; name a folder inside it with --output")
        if is_mount_point(target):
            raise ExportError(f"{output} is a mount point, which cannot be replaced; name a folder inside it")
        if target.is_dir() and not os.access(target, os.W_OK | os.X_OK, effective_ids=_EFFECTIVE):
            raise ExportError(why_unwritten(output, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), _CURE))
    except (OSError, RuntimeError) as error:  # RuntimeError: a symbolic link that points to itself
        raise ExportError(why_unwritten(output, error, _CURE)) from error


def check_space(output: Path, needed_bytes: int, content: str = "bundle") -> None:
    """Check that the disk of `output` has `needed_bytes` free, if its file system says so; some of FUSE say 0 of 0.

    Args:
        content: what is written, for the message.
    Raises:
        ExportError: it has less.
    """
    usage = shutil.disk_usage(output.resolve().parent)
    free = usage.free
    if free < needed_bytes and (free > 0 or usage.total > 0):
        raise ExportError(
            f"no disk space: the {content} takes about {needed_bytes / 1e6:.0f} MB and {output.absolute().parent} "
            f"has {free / 1e6:.0f} MB free; make room, or {_CURE}"
        )


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Make a new folder that is renamed to `output` on success and removed on any failure.

    If `output` is a symbolic link, the folder that it points to is replaced. An older bundle is exchanged with the new
    one in one system call if the system has one. Otherwise the exchange is two renames: a process that is killed
    between them leaves no folder named `output`, and the next call restores the older bundle.

    Raises:
        ExportError: the disk is full, `output` cannot be written, or it holds files that its manifest does not list.
    """
    check_target(output)
    target = output.resolve()
    try:
        with _private_folder(target) as private:
            new = private / _NEW
            new.mkdir()
            try:
                yield new
                _follow_umask(new)
                _publish(new, target)
            finally:
                kept = _clear(private, target)
        if kept is not None:
            raise ExportError(
                f"{output} is the new bundle; the older one could not be removed whole, and the rest of it is in {kept}"
            )
    except OSError as error:
        raise ExportError(why_unwritten(output, error, _CURE)) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        cure = f"{_CURE}, or set TMPDIR to a folder with room"
        raise ExportError(why_unwritten(output, error, cure)) from error


def _private_folder(target: Path) -> contextlib.AbstractContextManager[Path]:
    """A private folder beside a bundle; first clears up what killed exports left, and restores the older bundle."""
    return private_folder(target.parent, f"bundle {target.name}", lambda left: _clear(left, target))


def _publish(new: Path, target: Path) -> None:
    """Rename `new` to `target`; an older bundle of that name is moved into the private folder."""
    old, marker, copied = new.with_name(_OLD), new.with_name(_EXCHANGING), new.with_name(_COPIED)
    with locked(target):
        if not os.path.lexists(target):
            new.rename(target)
            return
        marker.touch()
        exchanged = exchange(new, target)
        try:
            if not exchanged:
                marker.unlink()
                text = _identity(target)
                move_folder(target, old, lambda: copied.write_text(text))
            refusal = _replacement_refusal(new if exchanged else old, target)
            if refusal is not None:
                raise ExportError(refusal)
            if not exchanged:
                new.rename(target)
                copied.unlink(missing_ok=True)
        except BaseException:
            if exchanged:
                exchange(new, target)
                marker.unlink()
            raise  # if the older bundle was renamed, `_clear` restores it


def _clear(private: Path, target: Path) -> Path | None:
    """Move or remove the older bundles of a private folder before the folder itself is removed.

    Also called for the private folder of a process that was killed.

    Returns:
        The folder with the files that may not be removed; None if there are none.
    """
    old = private / _OLD
    if os.path.lexists(old):
        copied = private / _COPIED
        with locked(target):
            if copied.exists() and os.path.lexists(target) and copied.read_text() == _identity(target):
                shutil.rmtree(target)  # what is left of it, since its process was killed or could not remove it
            if not os.path.lexists(target):
                old.rename(target)
    replaced = private / _NEW if (private / _EXCHANGING).exists() else old
    return _discard(replaced) if os.path.lexists(replaced) else None


def _identity(folder: Path) -> str:
    status = folder.stat()
    return f"{status.st_dev} {status.st_ino}"


def _discard(bundle: Path) -> Path | None:
    """Remove the files that a bundle's manifest lists; return the folder that other files are moved to, or None."""
    with contextlib.suppress(OSError, LfxError):
        folders, files = _content(bundle)
        listed = _listed(bundle) if MANIFEST in files else set()
        for path in files:
            if path in listed and path not in (MANIFEST, _SIGNATURE):  # last: the manifest lists the other files
                (bundle / path).unlink()
        for path in reversed(folders):
            with contextlib.suppress(OSError):
                (bundle / path).rmdir()
        others = set(_content(bundle)[1]) - {MANIFEST, _SIGNATURE}
        if all(path.rpartition("/")[2].startswith(_STILL_OPEN) for path in others):
            bundle.rename(bundle.with_name(_REMOVED))  # so that `_clear` never restores it
            return None
    kept = kept_folder(bundle.parent.parent)
    bundle.rename(kept)
    return kept


def _replacement_refusal(target: Path, shown: Path) -> str | None:
    """Give the reason why `target` may not be replaced.

    Args:
        shown: the path that the message names.
    Returns:
        None if `target` does not exist, is an empty folder, or is a bundle without other files.
    """
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        return f"{shown} exists and is no bundle; {_CURE}"
    folders, files = _content(target)
    if not folders and not files:
        return None
    if MANIFEST not in files:
        return f"{shown} exists and is no bundle; {_CURE}"
    if (target / MANIFEST).is_symlink() and not (target / MANIFEST).readlink().is_absolute():
        return (
            f"{shown} holds an {MANIFEST} that is a relative link, as of git-annex, which leads nowhere when the "
            f"folder is moved aside; unlock or remove the folder, or {_CURE}"
        )
    try:
        listed = _listed(target)
    except ArtifactError:
        return (
            f"{shown} holds an {MANIFEST} that was changed or is of another version, so lfx cannot tell which files "
            f"belong to the bundle; remove the folder, or {_CURE}"
        )
    if unlisted := [path for path in files if path not in listed]:
        return (
            f"{shown} is a bundle that holds other files too ({', '.join(unlisted[:3])}), which a new bundle "
            f"would remove; move them, or {_CURE}"
        )
    return None


def _listed(bundle: Path) -> set[str]:
    """Return the paths that a bundle's manifest lists, and those of the manifest and of its signature.

    Raises:
        ArtifactError: the manifest is broken, or its seal does not match.
    """
    return {*Manifest.read(bundle).files, MANIFEST, _SIGNATURE}


def _content(folder: Path) -> tuple[list[str], list[str]]:
    """List the folders below a folder, outer ones first, and all other entries. Symbolic links are not followed.

    Raises:
        OSError: a folder cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    unread = [""]
    while unread:
        inner = unread.pop()
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                path = f"{inner}/{entry.name}" if inner else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    unread.append(path)
                else:
                    files.append(path)
    return folders, sorted(files)


def _follow_umask(folder: Path) -> None:
    """Give all files the access that the umask leaves, which is the folder's; the onnx package makes some private."""
    mode = folder.stat().st_mode & 0o666
    for path in _content(folder)[1]:
        follow_umask(folder / path, mode)
