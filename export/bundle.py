"""Write a bundle so that it is there whole or not at all, and so that an older one goes without a foreign file."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from lfx.checks import file_path
from lfx.errors import ArtifactError, ExportError, LfxError
from lfx.files import exchange, is_disk_full, locked, private_folder, why_unwritten
from lfx.manifest import MANIFEST, Manifest

# Names in the private folder. Once the file _EXCHANGING is there, _NEW may be the older bundle.
_NEW, _OLD, _EXCHANGING = "new", "old", "exchanging"
_SIGNATURE = f"{MANIFEST}.minisig"
_CURE = "choose another --output"


def check_target(output: Path) -> None:
    """Raises: ExportError: `output` is there and may not be replaced, or its parent is no folder."""
    file_path(output, "output", ExportError)
    try:
        place, here = output.resolve(), Path.cwd()
        if not place.parent.is_dir():
            raise ExportError(f"the folder {place.parent} does not exist; make it, or {_CURE}")
        with locked(place):  # another export may be replacing it
            refused = _why_not_replaced(place, output)
        if refused is not None:
            raise ExportError(refused)
        if place.exists() and (place == here or place in here.parents):
            raise ExportError(f"{output} is the current folder or above it; name a folder inside it with --output")
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise ExportError(why_unwritten(output, error, _CURE)) from error


def check_space(output: Path, needed_bytes: int) -> None:
    """Raises: ExportError: the disk of `output` has less room than the bundle will take."""
    free = shutil.disk_usage(output.resolve().parent).free
    if free < needed_bytes:
        raise ExportError(
            f"no disk space: the bundle takes about {needed_bytes / 1e6:.0f} MB and {output.absolute().parent} "
            f"has {free / 1e6:.0f} MB free; make room, or {_CURE}"
        )


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A new folder that takes the name `output` on success and is removed on any failure.

    A link stays, and the folder that it points to is replaced. An older bundle goes in the same step, where the system
    has one for it; where it has not, a process that is killed between two renames leaves none under this name, and the
    next call puts the older one back.

    Raises:
        ExportError: the disk is full, the place cannot be written, or it holds files that are not a bundle's.
    """
    check_target(output)
    place = output.resolve()
    try:
        with private_folder(place.parent, f"bundle {place.name}", lambda left: _clear(left, place)) as private:
            new = private / _NEW
            new.mkdir()
            try:
                yield new
                _follow_umask(new)
                _publish(new, place)
            finally:
                kept = _clear(private, place)
        if kept is not None:
            raise ExportError(
                f"{output} is the new bundle; the older one could not be removed whole, and the rest of it is in {kept}"
            )
    except OSError as error:
        raise ExportError(why_unwritten(output, error, _CURE)) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        cure = f"{_CURE}, or a temporary folder with room by TMPDIR"
        raise ExportError(why_unwritten(output, error, cure)) from error


def _publish(new: Path, place: Path) -> None:
    """Give `new` the name `place`; what had it before is in the private folder then."""
    old, mark = new.with_name(_OLD), new.with_name(_EXCHANGING)
    with locked(place):
        if not os.path.lexists(place):
            new.rename(place)
            return
        mark.touch()
        exchanged = exchange(new, place)
        try:
            if not exchanged:
                mark.unlink()
                place.rename(old)
            refused = _why_not_replaced(new if exchanged else old, place)
            if refused is not None:
                raise ExportError(refused)
            if not exchanged:
                new.rename(place)
        except BaseException:
            if exchanged:
                exchange(new, place)
                mark.unlink()
            raise  # where it was renamed, `_clear` puts it back


def _clear(private: Path, place: Path) -> Path | None:
    """Take older bundles out of a private folder before it is removed, here or after its process was killed.

    Returns:
        The folder where files are that may not be removed; None where there are none.
    """
    old = private / _OLD
    if os.path.lexists(old):
        with locked(place):
            if not os.path.lexists(place):
                old.rename(place)
    replaced = private / _NEW if (private / _EXCHANGING).exists() else old
    return _discard(replaced) if os.path.lexists(replaced) else None


def _discard(bundle: Path) -> Path | None:
    """Remove what a bundle lists; returns where the rest is put, if there is one."""
    with contextlib.suppress(OSError, LfxError):
        folders, files = _content(bundle)
        listed = _listed(bundle) if MANIFEST in files else set()
        for path in files:
            if path in listed and path not in (MANIFEST, _SIGNATURE):  # these last: what they list can be told from it
                (bundle / path).unlink()
        for path in reversed(folders):
            (bundle / path).rmdir()
        if {path.name for path in bundle.iterdir()} <= {MANIFEST, _SIGNATURE}:
            return None
    kept = bundle.parent.with_name(f"lfx-kept-{secrets.token_hex(4)}")
    bundle.rename(kept)
    return kept


def _why_not_replaced(place: Path, shown: Path) -> str | None:
    """Why what is at `place` may not be replaced; None where there is nothing, an empty folder or a bundle alone."""
    if not os.path.lexists(place):
        return None
    if place.is_symlink() or not place.is_dir():
        return f"{shown} exists and is no bundle; choose another place with --output"
    folders, files = _content(place)
    if not folders and not files:
        return None
    if MANIFEST not in files:
        return f"{shown} exists and is no bundle; choose another place with --output"
    try:
        listed = _listed(place)
    except ArtifactError:
        return (
            f"{shown} holds an {MANIFEST} that was changed or is of another version, so nothing says which files are "
            f"the bundle's; remove the folder, or {_CURE}"
        )
    if strangers := [path for path in files if path not in listed]:
        return (
            f"{shown} is a bundle that holds other files too ({', '.join(strangers[:3])}), which a new bundle "
            f"would remove; move them, or {_CURE}"
        )
    return None


def _listed(bundle: Path) -> set[str]:
    """The files that are a bundle's by its manifest, whose seal must be right, with the manifest and its signature."""
    return {*Manifest.read(bundle).files, MANIFEST, _SIGNATURE}


def _content(folder: Path) -> tuple[list[str], list[str]]:
    """Every folder in a folder, outer ones first, and everything else; a link is no folder, and is not followed.

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
    """Give every file the mode that the umask gave the folder; the onnx package writes some for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in _content(folder)[1]:
        (folder / path).chmod(mode)
