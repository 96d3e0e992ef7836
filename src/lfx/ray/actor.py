"""The actor of a pool: one Engine in a process of Ray's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfx.ray.engine import DocumentEngine, EngineOptions
from lfx.ray.inputs import Document
from lfx.ray.parts import Columns, encode


@dataclass(frozen=True)
class Piece:
    """The rows of some documents.

    Attributes:
        content: the rows, in the format of the output.
        documents, refused, windows, tokens: counts.
        errors: a line for each row with an error: its file, its document and the error.
    """

    content: bytes
    documents: int
    refused: int
    windows: int
    tokens: int
    errors: list[str]


class DocumentActor:
    """Runs documents; `open` is called first. Ray makes it, so that its constructor must not fail."""

    def open(self, options: EngineOptions, file_format: str) -> tuple[dict[str, Any], Columns]:
        """Open the model; returns what decides the rows, and their columns.

        Raises:
            SystemExit: the process got a SIGTERM, which ends the actor.
        """
        try:
            self._engine, self._format = DocumentEngine(options), file_format
        except ImportError as error:
            if _is_exit(error):
                raise SystemExit(1) from error
            raise
        return self._engine.facts, self._engine.columns

    def run(self, documents: list[Document]) -> Piece:
        """Run some documents."""
        rows, summary = self._engine.rows(document for _, _, document in documents)
        placed = [{**row, "line": documents[row["line"]][1]} for row in rows]
        named = [{"file": documents[row["line"]][0], **new} for row, new in zip(rows, placed, strict=True)]
        refused = {row["line"] for row in rows if "error" in row}
        return Piece(
            encode(named, self._engine.columns, self._format),
            len(documents),
            len(refused),
            summary.windows,
            summary.tokens,
            _errors(named),
        )


def refused_piece(document: Document, reason: str, columns: Columns, file_format: str) -> Piece:
    """The row of one document that no actor could run."""
    file, line, content = document
    row: dict[str, Any] = {"file": file, "line": line}
    if isinstance(content, dict) and isinstance(content.get("id"), str | int):
        row["id"] = content["id"]
    row["error"] = reason
    return Piece(encode([row], columns, file_format), 1, 1, 0, 0, _errors([row]))


def _is_exit(error: BaseException | None) -> bool:
    """Whether an error was a SystemExit: a module in C++ makes an ImportError of one that is raised in its import."""
    while error is not None:
        if isinstance(error, SystemExit):
            return True
        error = error.__cause__ or error.__context__
    return False


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['file']}:{row['line']}: {row['error']}" for row in rows if "error" in row]
