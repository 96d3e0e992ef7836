"""The folder of an output: its parts, and the journal of the complete ones, from which a stopped run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from lfx.checks import parse_json
from lfx.errors import InputError, one_line
from lfx.files import is_at, open_journal, replacing, try_lock
from lfx.manifest import sha256
from lfx.runtime.documents.journal import differing_keys

JOURNAL = "_lfx_map.jsonl"  # readers of folders of Parquet skip names that begin with an underscore
_COUNTS = ("documents", "refused", "bytes")


class Parts:
    """The open and locked output of a run. A context manager.

    The journal has a header line, then a line for each part: its number, its counts, its size and its sha256. A part
    is written to a temporary name, renamed, and then added to the journal. It is complete if its file is what the
    journal says.

    Args:
        output: path of the folder; it is made if it does not exist.
        header: all that decides the rows, as JSON types; its first key is "map". An output with another header is
            refused.
        suffix: suffix of the parts.
    Attributes:
        complete: number of a complete part -> its counts: documents, refused, bytes.
    Raises:
        InputError: the folder has other files, or results of another run, or another process writes to it.
        OSError: the folder cannot be made or read.
    """

    def __init__(self, output: Path, header: dict[str, Any], suffix: str) -> None:
        self._output, self._suffix = output, suffix
        self.complete: dict[int, dict[str, int]] = {}
        path = output / JOURNAL
        output.mkdir(exist_ok=True)
        if not path.exists() and any(not other.name.startswith(".lfx-") for other in output.iterdir()):
            raise InputError(f"{output} has files that are not of lfx map; give a new folder, or an empty one")
        try:
            self._file = open_journal(path)
        except OSError as error:
            raise InputError(f"{path}, the journal of this run, cannot be opened: {one_line(error)}") from error
        try:
            if not try_lock(self._file.fileno()) or not is_at(self._file.fileno(), path):
                raise InputError(f"another run is writing {output}; wait for it, or give another output")
            self._resume(header)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, header: dict[str, Any]) -> None:
        """Check the header, read the lines of complete parts, and truncate the journal after the last whole line."""
        ours, theirs = _line(header), self._file.readline()
        if not theirs.endswith(b"\n"):  # a new journal, or one whose first write was cut
            if not ours.startswith(theirs):
                raise InputError(f"{self._file.name} is no journal of lfx; move it away, or give another output")
            self._file.truncate(0)
            self._append(ours)
            return
        if theirs != ours:
            differing = ", ".join(differing_keys(ours, theirs)) or "version of lfx"
            raise InputError(
                f"{self._output} has results of a run with another {differing}; run it with the same options to resume "
                "it, or give another output"
            )
        end = len(ours)
        for line in self._file:
            entry = _entry(line)
            if entry is None:
                break
            end += len(line)
            number, counts, digest = entry
            self.complete.pop(number, None)
            if _is_whole(self.path(number), counts["bytes"], digest):
                self.complete[number] = counts
        self._file.truncate(end)

    def path(self, number: int) -> Path:
        """The path of a part."""
        return self._output / f"part-{number:08}.{self._suffix}"

    def write(self, number: int, content: bytes, documents: int, refused: int) -> None:
        """Write a part.

        Raises:
            OSError: it cannot be written.
        """
        with replacing(self.path(number)) as path, path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        counts = {"documents": documents, "refused": refused, "bytes": len(content)}
        self._append(_line({"part": number, **counts, "sha256": hashlib.sha256(content).hexdigest()}))
        self.complete[number] = counts

    def _append(self, line: bytes) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _entry(line: bytes) -> tuple[int, dict[str, int], str] | None:
    """Number, counts and digest of a part, from its line; None if it is no such line."""
    try:
        entry = parse_json(line)
        number, digest, counts = entry["part"], entry["sha256"], {name: entry[name] for name in _COUNTS}
    except (ValueError, KeyError, TypeError):
        return None
    numbers = (number, *counts.values())
    if not line.endswith(b"\n") or not isinstance(digest, str) or not all(type(n) is int and n >= 0 for n in numbers):
        return None
    return number, counts, digest


def _is_whole(path: Path, size: int, digest: str) -> bool:
    """Whether a file has this size and this sha256."""
    try:
        if not path.is_file() or path.stat().st_size != size:  # opening a pipe would wait for a writer
            return False
        return sha256(path, size) == digest
    except OSError:
        return False


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()
