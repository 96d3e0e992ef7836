"""The journal of a run over documents: rows as they are computed, chunk by chunk, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lfx.checks import parse_json
from lfx.errors import InputError, one_line
from lfx.files import is_at, open_journal, try_lock

_MARKER = b'{"chunk":'  # a row begins with {"line":


def journal_path(output: Path) -> Path:
    """Where the journal of an output is."""
    return output.with_name(f".{output.name}.partial")


class Journal:
    """The journal of one output, open and locked; a context manager.

    It has a header line, then for each chunk of documents its rows and a marker. A marker has the number of documents,
    the number of refused ones, and the sha256 of everything before it: a chunk counts only where that is right.

    Args:
        output: the file that the rows are for.
        header: what decides the rows. An earlier journal with the same header is gone on with, from the end of its last
            whole chunk; any other is emptied.
        chunk: most documents of a chunk.
    Attributes:
        documents: number of documents in whole chunks. refused: of these.
    Raises:
        InputError: another run writes to this output, or something else has the journal's name.
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
        # A run that ended between our opening and locking took the file away.
        if not try_lock(self._file.fileno()) or not is_at(self._file.fileno(), self.path):
            raise InputError(f"another run is writing {output}; wait for it, or give another --output")
        if self._file.read(len(self._header)) == self._header:
            self._keep_whole_chunks()
        else:
            self.restart()

    def restart(self) -> None:
        """Empty it."""
        self.documents = self.refused = 0
        self._file.seek(0)
        self._file.truncate(0)
        self._digest = hashlib.sha256(self._header)
        self._file.write(self._header)

    def _keep_whole_chunks(self) -> None:
        self._digest = hashlib.sha256(self._header)
        digest, position = self._digest.copy(), len(self._header)
        end, found = position, set[int]()
        for line in self._file:
            position += len(line)
            if line.startswith(_MARKER):
                counts = self._counts(line, digest.hexdigest())
                if counts is None or found != set(range(self.documents + 1, self.documents + counts[0] + 1)):
                    break
                found = set()
                self.documents, self.refused = self.documents + counts[0], self.refused + counts[1]
            elif (number := _number(line)) is not None:
                found.add(number)
            else:
                break
            digest.update(line)
            if line.startswith(_MARKER):
                self._digest, end = digest.copy(), position
        self._file.seek(end)
        self._file.truncate(end)

    def _counts(self, line: bytes, digest: str) -> tuple[int, int] | None:
        """Numbers of documents and refused ones that a marker tells; None where it is not as `end_chunk` writes it."""
        try:
            chunk = parse_json(line)["chunk"]
            done, refused = chunk["done"], chunk["refused"]
        except (ValueError, KeyError, TypeError):
            return None
        if type(done) is not int or type(refused) is not int or line != _marker(done, refused, digest):
            return None
        return (done, refused) if 1 <= done <= self._chunk and 0 <= refused <= done else None

    def write(self, row: dict[str, Any]) -> None:
        """Add a row of the chunk that is being computed."""
        self._write(_line(row))

    def end_chunk(self, done: int, refused: int) -> None:
        """Mark the rows since the last marker as whole, and bring them to the disk.

        Args:
            done: number of documents that they are of, 1 to `chunk`. refused: of these.
        """
        self._write(_marker(done, refused, self._digest.hexdigest()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.documents, self.refused = self.documents + done, self.refused + refused

    def rows(self) -> Iterator[bytes]:
        """The lines of all rows, from the first."""
        self._file.seek(len(self._header))
        return (line for line in self._file if not line.startswith(_MARKER))

    def remove(self) -> None:
        """Take it away; nothing can be written after that."""
        self.path.unlink(missing_ok=True)

    def _write(self, line: bytes) -> None:
        self._digest.update(line)
        self._file.write(line)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _number(row: bytes) -> int | None:
    """The line of the input that a row is of; None where it is no row."""
    try:
        number = parse_json(row)["line"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if type(number) is int else None


def _line(value: dict[str, Any]) -> bytes:
    # A lone surrogate, which UTF-8 does not have, becomes JSON's own escape for it.
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def _marker(done: int, refused: int, digest: str) -> bytes:
    return _line({"chunk": {"done": done, "refused": refused, "sha256": digest}})
