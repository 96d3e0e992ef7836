"""The documents of one file, or of all files in a folder, on a disk or in a file system of pyarrow's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any

from lfx.errors import InputError, LfxError, one_line, require
from lfx.files import is_same
from lfx.runtime.documents.formats import (
    FIELDS,
    SUFFIXES,
    Source,
    check_source,
    count_documents,
    is_documents,
    is_parquet,
    read_documents,
)
from lfx.runtime.documents.remote import RemoteFile

Document = tuple[str, int, Any]  # name of its file, its number there from 1, the document or an InputError


@dataclass(frozen=True)
class _File:
    """A file of documents.

    Attributes:
        name: path below the input, or the file's own name; in the rows.
        stamp: size and time of its last change.
    """

    name: str
    source: Source
    stamp: tuple[int, int]
    documents: int


class Inputs:
    """The files of an input in the order of their names, and the number of documents in each.

    Args:
        source: a file or a folder, whose files of documents are read at any depth; a path, or a URI such as
            s3://bucket/folder. Names that begin with a dot or an underscore are skipped.
    Attributes:
        documents: number of documents, broken ones included.
        digest: sha256 of names, sizes, times of the last change and numbers of documents.
    Raises:
        InputError: there are no files of documents, or one cannot be read.
        DependencyError: pyarrow is not installed, and a file needs it.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        with _reading(source):
            files = [_file(name, listed) for name, listed in sorted(_list_files(source))]
        self._files = files
        self._starts = [0, *accumulate(file.documents for file in files)]
        self.documents = self._starts[-1]
        described = [[file.name, *file.stamp, file.documents] for file in files]
        self.digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Document]:
        """Read the documents from index `start` to `stop`; fields that no run reads are None.

        Raises:
            InputError: a file cannot be read, or was changed since the documents were counted.
        """
        for file, first in zip(self._files, self._starts, strict=False):
            begin, end = max(start - first, 0), min(stop - first, file.documents)
            if begin >= end:
                continue
            number = begin
            with _reading(file.name):
                for number, document in islice(read_documents(file.source, begin), end - begin):
                    yield file.name, number, _without_values(document)
                unchanged = number == end and _stamp(file.source) == file.stamp
            if not unchanged:
                raise InputError(
                    f"{file.name} in {self._source} was changed during the run, so the results mix two versions of it; "
                    "remove the output, and run again"
                )


def _without_values(document: Any) -> Any:
    """Drop the values of fields that are not read, which may be large; their names are in messages."""
    if not isinstance(document, dict):
        return document
    return {name: value if name in FIELDS else None for name, value in document.items()}


def local_source(source: str) -> str:
    """The path of a URI file://; any other source as it is.

    Raises:
        InputError: it is no URI.
    """
    if not source.startswith("file://"):
        return source
    with _reading(source):
        return str(require("pyarrow.fs", "ray").FileSystem.from_uri(source)[1])


def check_apart(source: str, output: Path) -> None:
    """Check that the output is not inside the input, nor the input inside the output.

    Raises:
        InputError: it is.
    """
    if "://" in source:
        return
    first, second = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    within = [(first, path) for path in (second, *second.parents)] + [(second, path) for path in first.parents]
    if any(is_same(one, other) for one, other in within):
        raise InputError(f"of {output} and the input {source}, one contains the other; give another output")


def _list_files(source: str) -> Iterator[tuple[str, Source]]:
    """Yield the name and the place of each file of documents."""
    if "://" in source:
        yield from _list_remote_files(source)
        return
    root = Path(source)
    if root.is_dir():
        yield from _some([(path.relative_to(root).as_posix(), path) for path in _walk(root)], source)
    else:
        _check_suffix(root, source)
        yield root.name, root


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files of documents in a folder and in those below it, links included, in no order.

    Raises:
        InputError: a folder cannot be read, a link leads nowhere or to a folder that it lies in, or a file of documents
            is a pipe or a device: documents would be left out.
    """
    pending: list[tuple[Path, tuple[str, ...]]] = [(root, ())]  # folders, each with the real paths of those around it
    while pending:
        folder, parents = pending.pop()
        parents = (*parents, os.path.realpath(folder))
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error.strerror}; make it readable, or remove it") from error
        for path in entries:
            if _is_hidden(path.name):
                continue
            is_link = path.is_symlink()
            if is_link and not path.exists():
                raise InputError(
                    f"{path} is a link to a file or folder that does not exist; fetch it, or remove the link"
                )
            if path.is_dir():
                if is_link and os.path.realpath(path) in parents:
                    raise InputError(f"{path} is a link to a folder that it lies in; remove it")
                pending.append((path, parents))
            elif is_documents(path):
                if not path.is_file():
                    raise InputError(f"{path} is no file; remove it")
                yield path


def _list_remote_files(source: str) -> Iterator[tuple[str, Source]]:
    fs = require("pyarrow.fs", "ray")
    filesystem, path = fs.FileSystem.from_uri(source)
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        _check_suffix(Path(path), source)
        yield PurePosixPath(path).name, RemoteFile(filesystem, path)
        return
    entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    named = ((info.path.removeprefix(path).lstrip("/"), info) for info in entries if info.is_file)
    files = [(name, RemoteFile(filesystem, info.path)) for name, info in named]
    yield from _some([(n, file) for n, file in files if is_documents(Path(n)) and not _is_hidden(n)], source)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _some(files: list[tuple[str, Any]], source: str) -> list[tuple[str, Any]]:
    if not files:
        raise InputError(f"{source} has no files of documents, whose names end with one of {', '.join(SUFFIXES)}")
    return files


def _check_suffix(path: Path, source: str) -> None:
    if not is_documents(path):
        raise InputError(f"{source} is no folder, and its name ends with none of {', '.join(SUFFIXES)}")


def _file(name: str, source: Source) -> _File:
    if is_parquet(source):
        require("pyarrow.parquet", "ray")
    check_source(source)
    stamp = _stamp(source)
    return _File(name.encode(errors="backslashreplace").decode(), source, stamp, count_documents(source))


def _stamp(source: Source) -> tuple[int, int]:
    if isinstance(source, Path):
        status = source.stat()
        return status.st_size, status.st_mtime_ns
    info = source.filesystem.get_file_info(source.path)
    return info.size or 0, info.mtime_ns or 0


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of the file system and of pyarrow into an InputError with the name of what is read."""
    try:
        yield
    except (LfxError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name} cannot be read: {one_line(error)}") from error
