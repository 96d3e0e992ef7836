"""Write a bundle so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lfx.config import MANIFEST
from lfx.errors import ExportError


def check_target(output: Path) -> None:
    """Raises: ExportError: `output` is there and is no bundle, or holds more than one, or its parent is no folder."""
    place = output.resolve()
    if place.exists():
        if not (place.is_dir() and (not any(place.iterdir()) or (place / MANIFEST).is_file())):
            raise ExportError(f"{output} exists and is no bundle; choose another place with --output")
        if strangers := _strangers(place):
            raise ExportError(
                f"{output} is a bundle that holds other files too ({', '.join(strangers[:3])}), which a new bundle "
                "would remove; move them, or choose another place with --output"
            )
        if place == Path.cwd() or place in Path.cwd().parents:
            raise ExportError(f"{output} is the current folder or above it; name a folder inside it with --output")
    if not place.parent.is_dir():
        raise ExportError(f"the folder {place.parent} does not exist; make it, or choose another --output")


def _strangers(bundle: Path) -> list[str]:
    """Files of a folder that its manifest does not list."""
    try:
        listed = set(json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    found = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if not path.is_dir()}
    return sorted(found - listed - {MANIFEST})


def check_space(output: Path, needed_bytes: int) -> None:
    """Raises: ExportError: the disk of `output` has less room than the bundle will take."""
    free = shutil.disk_usage(output.resolve().parent).free
    if free < needed_bytes:
        raise ExportError(
            f"no disk space: the bundle takes about {needed_bytes / 1e6:.0f} MB and {output.absolute().parent} "
            f"has {free / 1e6:.0f} MB free; make room, or choose another --output"
        )


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name on success and is removed on any failure.

    Raises:
        ExportError: the disk is full or the place cannot be written.
    """
    check_target(output)
    output = output.resolve()  # a link stays, and its target is replaced
    _mend(output)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        if output.exists():
            old = output.parent / f".{output.name}.old-{os.getpid()}"
            output.rename(old)
            try:
                partial.rename(output)
            except BaseException:
                old.rename(output)
                raise
            shutil.rmtree(old)
        else:
            partial.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"no disk space left in {output.parent}; make room, or choose another --output"
            ) from error
        raise ExportError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mend(output: Path) -> None:
    """Clear up after processes that were killed: an older bundle gets its name back, partial folders go."""
    for kind in ("old", "partial"):
        for path in output.parent.glob(f".{glob.escape(output.name)}.{kind}-*"):
            pid = path.name.rpartition("-")[2]
            if not pid.isdigit() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue  # another export is at work
            if kind == "old" and not output.exists():
                path.rename(output)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
