"""The columns of rows, and the bytes of a part of an output: JSON lines, or Parquet with the same columns in each."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lfx.errors import require
from lfx.runtime.documents.formats import NUMBERS, output_type, text_of
from lfx.runtime.documents.rows import outputs_per_sequence
from lfx.runtime.postprocess import answer_fields
from lfx.signature import TEXT_GENERATION, Signature, TensorSpec

FORMATS = ("parquet", "jsonl")


@dataclass(frozen=True)
class Columns:
    """The columns that the rows of a model may have; they are known before anything runs.

    Attributes:
        answer_fields: names of an answer's fields; empty if rows have no answers.
        outputs: the model's outputs per sequence.
        has_windows: whether rows have the column `window`.
        text: the column of the text that the model writes, "summary", or "output_ids" without a tokenizer; empty if it
            writes none.
    """

    answer_fields: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    has_windows: bool
    text: str = ""

    @classmethod
    def of(cls, signature: Signature, has_tokenizer: bool, has_windows: bool) -> Columns:
        """The columns of a model's rows."""
        fields = answer_fields(signature) if has_tokenizer else ()
        text = "summary" if has_tokenizer else "output_ids"
        writes = signature.task == TEXT_GENERATION
        return cls(fields, tuple(outputs_per_sequence(signature)), has_windows, text if writes else "")

    def results(self) -> list[tuple[str, Any]]:
        """Name and pyarrow type of each column that a run adds to a document."""
        pyarrow = require("pyarrow", "ray")
        columns = [("window", pyarrow.int64())] if self.has_windows else []
        columns.append(("tokens", pyarrow.int64()))
        if self.text:
            text_type = pyarrow.string() if self.text == "summary" else pyarrow.list_(pyarrow.int64())
            columns += [("new_tokens", pyarrow.int64()), (self.text, text_type)]
        if self.answer_fields:
            fields = [(name, pyarrow.type_for_alias(NUMBERS.get(name, "string"))) for name in self.answer_fields]
            columns.append(("answers", pyarrow.list_(pyarrow.struct(fields))))
        if self.outputs:  # Parquet has no struct without fields
            outputs = [(spec.name, output_type(pyarrow, spec)) for spec in self.outputs]
            columns.append(("outputs", pyarrow.struct(outputs)))
        return [*columns, ("error", pyarrow.string())]

    def schema(self) -> Any:
        """The pyarrow schema of a part: the file and the number of the document, its id as text, and the results."""
        pyarrow = require("pyarrow", "ray")
        identity = [("file", pyarrow.string()), ("line", pyarrow.int64()), ("id", pyarrow.string())]
        return pyarrow.schema([*identity, *self.results()])


def encode(rows: Sequence[dict[str, Any]], columns: Columns, file_format: str) -> bytes:
    """The bytes of a part, from its rows."""
    if file_format == "jsonl":
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        return b"".join(line.encode(errors="backslashreplace") for line in lines)
    pyarrow, parquet = require("pyarrow", "ray"), require("pyarrow.parquet", "ray")
    table = pyarrow.Table.from_pylist([_text_columns(row) for row in rows], schema=columns.schema())
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def join(pieces: Sequence[bytes], file_format: str) -> bytes:
    """The bytes of a part, from those of its pieces in order."""
    if len(pieces) == 1 or file_format == "jsonl":
        return b"".join(pieces)
    pyarrow, parquet = require("pyarrow", "ray"), require("pyarrow.parquet", "ray")
    tables = [parquet.read_table(io.BytesIO(piece)) for piece in pieces]
    file = io.BytesIO()
    parquet.write_table(pyarrow.concat_tables(tables), file)
    return file.getvalue()


def _text_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose id is text, and whose texts are UTF-8: a lone surrogate becomes its escape."""
    texts: dict[str, str] = {name: row[name] for name in row if name in ("file", "error")}
    if "id" in row:
        texts["id"] = text_of(row["id"])
    return {**row, **{name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}}
