"""The build backend: scikit-build-core, and four things that it cannot know.

The sdist has files in the place of the links src/lfx/export and src/lfx/runtime, which Windows cannot unpack. A wheel
without a library is pure Python, and its tag says so. And a checkout without symbolic links, Windows' default, has
text files in the place of the links, from which no package can be built. On Windows nothing is compiled: the kernels
need vector types, which MSVC does not have, and GCC does not align those of AVX on the stack there (its bug 54412).
"""

from __future__ import annotations

import io
import posixpath
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scikit_build_core import build as backend
from scikit_build_core.build import (
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_LINKS = (Path("src/lfx/export"), Path("src/lfx/runtime"))
Settings = dict[str, Any] | None


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Build an sdist without links; see PEP 517."""
    name = backend.build_sdist(sdist_directory, config_settings)
    path = Path(sdist_directory) / name
    with tarfile.open(path) as archive:
        files = {member.name: (member, archive.extractfile(member)) for member in archive if member.isfile()}
        contents = {name: (member, file.read()) for name, (member, file) in files.items() if file is not None}
        links = {member.name: member.linkname for member in archive if member.issym()}
    for link, target in links.items():
        source = posixpath.normpath(posixpath.join(posixpath.dirname(link), target))
        for file, (member, content) in list(contents.items()):
            if file.startswith(f"{source}/"):
                contents[link + file[len(source) :]] = (member, content)
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for file, (member, content) in sorted(contents.items()):
            member.name, member.pax_headers = file, {}
            archive.addfile(member, io.BytesIO(content))
    return name


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel; see PEP 517."""
    return _build(backend.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel that points here; see PEP 660."""
    return _build(backend.build_editable, wheel_directory, config_settings, metadata_directory)


def _build(build: Callable[..., str], folder: str, settings: Settings, metadata_directory: str | None) -> str:
    for link in _LINKS:
        if not link.is_dir():
            raise SystemExit(
                f"{link} is no folder: this checkout has no symbolic links; clone again with: "
                "git clone -c core.symlinks=true URL (on Windows in developer mode)"
            )
    without_cmake = {**(settings or {}), "wheel.cmake": "false"}
    if sys.platform == "win32":
        return build(folder, without_cmake, None)
    name = build(folder, settings, metadata_directory)
    with zipfile.ZipFile(Path(folder) / name) as wheel:
        if any("/_lib/" in entry for entry in wheel.namelist()):
            return name
    (Path(folder) / name).unlink()
    # Without the metadata that was prepared, whose tag is that of a wheel with a library.
    return build(folder, without_cmake, None)
