"""The journal of a run over documents: a checkpoint of its rows, from which a stopped run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lfx.checks import parse_json
from lfx.errors import InputError, LfxError, one_line
from lfx.files import is_at, open_journal, remove_open, try_lock

_HEADER = b'{"journal":'  # the start of a header
_MARKER = b'{"chunk":'  # the start of a marker; a row starts with {"line":


def journal_path(output: Path) -> Path:
    """The path of an output's journal: a hidden file beside the output."""
    return output.with_name(f".{output.name}.partial")


def read_header(output: Path) -> dict[str, Any]:
    """The header of the journal that a stopped run left; empty if there is none."""
    path = journal_path(output)
    try:
        if path.is_symlink() or not path.is_file():
            return {}
        with path.open("rb") as file:
            header = parse_json(file.readline())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


class Journal:
    """The open and locked journal of one output. A context manager.

    The file has a header line, then for each chunk of documents its rows and a marker. A marker has the number of
    documents of the chunk, the number of refused ones, and the sha256 of all bytes before the marker. A chunk is
    complete if its marker is correct.

    Args:
        output: path of the output file.
        header: all that decides the rows, as JSON types; its first key is "journal". A journal with the same header is
            resumed after its last complete chunk; one with another header and complete chunks is refused; any other
            content is dropped.
        chunk: largest number of documents of a chunk.
    Attributes:
        path: path of the journal.
        documents: number of documents in complete chunks.
        refused: number of these that were refused.
    Raises:
        InputError: another run is writing to this output, the journal has the rows of a run with another header, or
            its path is no file of lfx's.
    """

    def __init__(self, output: Path, header: dict[str, Any], chunk: int) -> None:
        self.path = journal_path(output)
        self.documents = self.refused = 0
        self._header = _line(header)
        self._chunk = chunk
        try:
            self._file = open_journal(self.path)
        except OSError as error:
            raise InputError(
                f"{self.path}, the journal of this run, cannot be opened: {one_line(error)}; remove it if it is there, "
                "or give another --output"
            ) from error
        try:
            self._start(output)
        except BaseException:
            self._file.close()
            raise

    def _start(self, output: Path) -> None:
        # `is_at` is False if another run ended, and removed the file, after this one opened it.
        if not try_lock(self._file.fileno()) or not is_at(self._file.fileno(), self.path):
            raise InputError(f"another run is writing {output}; wait for it, or give another --output")
        header = self._file.readline()
        if header == self._header:
            self._keep_complete_chunks()
            return
        if header[: len(_HEADER)] != _HEADER[: len(header)]:  # a header may be cut anywhere
            raise InputError(f"{self.path} is no journal of lfx; move it away, or give another --output")
        differing = differing_keys(self._header, header)
        if differing and any(line.startswith(_MARKER) for line in self._file):
            raise InputError(
                f"{self.path} has finished documents of a run with another {', '.join(differing)}; run it with the "
                "same options to resume it, or remove that file to begin again"
            )
        self.restart()

    def restart(self) -> None:
        """Remove all rows."""
        self.documents = self.refused = 0
        self._file.seek(0)
        self._file.truncate(0)
        self._digest, self._size = hashlib.sha256(), 0
        self._write(self._header)

    def _keep_complete_chunks(self) -> None:
        """Count the complete chunks at the start of the journal, and truncate the file after them."""
        self._digest = hashlib.sha256(self._header)
        digest, position = self._digest.copy(), len(self._header)
        # `end` is the end of the last complete chunk, `numbers` are those of the documents after it.
        end, numbers = position, set[int]()
        for line in self._file:
            position += len(line)
            if line.startswith(_MARKER):
                counts = self._counts(line, digest.hexdigest())
                if counts is None or numbers != set(range(self.documents + 1, self.documents + counts[0] + 1)):
                    break
                numbers = set()
                self.documents, self.refused = self.documents + counts[0], self.refused + counts[1]
            elif (number := _number(line)) is not None:
                numbers.add(number)
            else:
                break
            digest.update(line)
            if line.startswith(_MARKER):
                self._digest, end = digest.copy(), position
        self._file.seek(end)
        self._file.truncate(end)
        self._size = end

    def _counts(self, line: bytes, digest: str) -> tuple[int, int] | None:
        """The numbers of documents and of refused ones in a marker; None if `end_chunk` did not write it."""
        try:
            marker = parse_json(line)["chunk"]
            done, refused = marker["done"], marker["refused"]
        except (ValueError, KeyError, TypeError):
            return None
        if type(done) is not int or type(refused) is not int or line != _marker(done, refused, digest):
            return None
        return (done, refused) if 1 <= done <= self._chunk and 0 <= refused <= done else None

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of the current chunk."""
        self._write(_line(row))

    def end_chunk(self, done: int, refused: int) -> None:
        """Write the marker of the current chunk, and fsync the file.

        Args:
            done: number of documents of the chunk, 1 to `chunk`.
            refused: number of these that were refused.
        Raises:
            LfxError: another process wrote to the file, which is possible on a file system without locks.
        """
        self._write(_marker(done, refused, self._digest.hexdigest()))
        self._file.flush()
        os.fsync(self._file.fileno())
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise self._disturbed()
        self.documents, self.refused = self.documents + done, self.refused + refused

    def rows(self) -> Iterator[bytes]:
        """Iterate over the lines of all rows, from the first.

        Raises:
            LfxError: another process wrote to the file; raised after the last row.
        """
        digest = hashlib.sha256(self._header)
        self._file.seek(len(self._header))
        for line in self._file:
            digest.update(line)
            if not line.startswith(_MARKER):
                yield line
        if digest.digest() != self._digest.digest():
            raise self._disturbed()

    def _disturbed(self) -> LfxError:
        return LfxError(
            f"another process wrote to {self.path}, the journal of this run; wait for it, and give the same command "
            "again: it resumes after the last complete chunk"
        )

    def remove(self) -> None:
        """Delete the journal; nothing may be written afterwards."""
        remove_open(self.path, self._file)

    def _write(self, line: bytes) -> None:
        self._digest.update(line)
        self._size += len(line)
        self._file.write(line)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def differing_keys(ours: bytes, theirs: bytes) -> list[str]:
    """The keys that differ between two headers, or that one of them lacks; empty if `theirs` is no JSON object."""
    try:
        mine, other = parse_json(ours), dict(parse_json(theirs))
    except (ValueError, TypeError):
        return []
    missing = object()
    return [key for key in {**mine, **other} if mine.get(key, missing) != other.get(key, missing)]


def _number(row: bytes) -> int | None:
    """The number of the input line that a row belongs to; None if the bytes are no row."""
    try:
        number = parse_json(row)["line"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if type(number) is int else None


def _line(value: dict[str, Any]) -> bytes:
    # UTF-8 cannot encode a lone surrogate; backslashreplace writes the escape that JSON has for it.
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def _marker(done: int, refused: int, digest: str) -> bytes:
    return _line({"chunk": {"done": done, "refused": refused, "sha256": digest}})
