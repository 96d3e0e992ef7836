"""JSONL and Parquet: documents are read from either, and rows written to either, a few at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lfx.checks import parse_json
from lfx.errors import InputError, LfxError, one_line, require
from lfx.files import replacing
from lfx.signature import TensorSpec

SUFFIXES = (".jsonl", ".ndjson", ".parquet")  # in any case
FIELDS = ("text", "pair", "input_ids", "id")
_LONGEST_LINE = 50_000_000  # bytes
_BATCH = 256  # rows of a Parquet file that are read together
_STRINGS = ("string", "large_string")  # types of columns
_GROUP_BYTES = 1 << 24  # of JSON, that become one row group of a Parquet file
_NUMBERS = {"score": "float64", "position": "int64", "choice": "int64"}  # fields of answers that are no strings


def is_documents(path: Path) -> bool:
    """Whether a file is one of documents, by its name; others are one text."""
    return path.suffix.lower() in SUFFIXES


def is_parquet(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".parquet"


def check_source(source: Path) -> None:
    """Look at what can be known of a file before its documents are read.

    Raises:
        InputError: it is no file, or a Parquet file with a column twice, or without text and input_ids.
        DependencyError: it is a Parquet file, and pyarrow is not installed.
    """
    if not source.is_file():
        raise InputError(f"{source} does not exist, or is no file")
    if not is_parquet(source):
        return
    names = _open_parquet(source).schema_arrow.names
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"{source} has several columns of the name {twice[0]!r}; rename all but one")
    if not {"text", "input_ids"} & set(names):
        columns = ", ".join(map(repr, names)) or "none"
        raise InputError(f"{source} has the columns {columns}; one must be text or input_ids")


def count_documents(source: Path) -> int:
    """Number of documents in a file, bad ones included."""
    if is_parquet(source):
        return int(_open_parquet(source).metadata.num_rows)
    return sum(1 for _ in _bytes_lines(source))


def read_documents(source: Path, start: int = 0) -> Iterator[tuple[int, Any]]:
    """(number, document or InputError), numbers from 1; the first `start` documents are left out.

    Raises:
        InputError: the file cannot be read.
    """
    if is_parquet(source):
        yield from _parquet_documents(source, start)
        return
    for number, line in enumerate(_bytes_lines(source), 1):
        if number > start:
            yield number, _json_document(line)


def write_rows(lines: Callable[[], Iterator[bytes]], output: Path, outputs: Sequence[TensorSpec]) -> None:
    """Write rows, given as lines of JSON, in the format that the output's name asks for; whole or not at all.

    Args:
        lines: gives them all at each call.
        outputs: the model's outputs per sequence.
    Raises:
        InputError: Parquet cannot hold them. OSError: the file cannot be written.
    """
    with replacing(output) as path, path.open("wb") as file:
        if is_parquet(output):
            _write_parquet(lines, file, outputs)
        else:
            file.writelines(lines())
        file.flush()
        os.fsync(file.fileno())


def _bytes_lines(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while line := file.readline(_LONGEST_LINE + 1):
                yield line
                while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):  # what is left of it
                    line = file.readline(_LONGEST_LINE + 1)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {one_line(error)}") from error


def _json_document(line: bytes) -> Any:
    if len(line) > _LONGEST_LINE:
        return InputError(f"a line of more than {_LONGEST_LINE:,} bytes; split the document")
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return InputError("not UTF-8")
    except ValueError as error:
        return InputError(f"broken JSON: {one_line(error)}" if line.strip() else "empty line")


def _open_parquet(source: Path, held_once: Sequence[str] = ()) -> Any:
    """A Parquet file. Equal values of the columns `held_once`, of strings, are held once in memory, as in the file."""
    parquet = require("pyarrow.parquet", "parquet")
    try:
        return parquet.ParquetFile(source, read_dictionary=held_once)
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{source} cannot be read as Parquet: {one_line(error)}") from error


def _parquet_documents(source: Path, start: int) -> Iterator[tuple[int, Any]]:
    columns = [column for column in _open_parquet(source).schema_arrow if column.name in FIELDS]
    file = _open_parquet(source, [column.name for column in columns if str(column.type) in _STRINGS])
    number = 0
    try:
        for batch in file.iter_batches(_BATCH, columns=[column.name for column in columns]):
            for i in range(batch.num_rows):
                number += 1
                if number > start:
                    yield number, _parquet_document(batch, i)
    except (LfxError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{source} cannot be read as Parquet: {one_line(error)}") from error


def _parquet_document(batch: Any, index: int) -> Any:
    """One row of a record batch; a value that Python has no form for is an InputError of this row alone."""
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except MemoryError:
        raise
    except Exception as error:
        return InputError(f"the row cannot be read: {one_line(error)}")


def _write_parquet(lines: Callable[[], Iterator[bytes]], file: IO[bytes], outputs: Sequence[TensorSpec]) -> None:
    pyarrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        schema, ids_as_text = _schema(pyarrow, lines(), outputs)
        with parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(lines()):
                rows = [json.loads(line) for line in group]
                for row in rows:
                    if ids_as_text and "id" in row:
                        row["id"] = _text_of(row["id"])
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    except (LfxError, OSError, MemoryError):
        raise
    except Exception as error:
        raise InputError(one_line(error)) from error


def _groups(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lines of some megabytes together, one at least."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _schema(pyarrow: Any, lines: Iterator[bytes], outputs: Sequence[TensorSpec]) -> tuple[Any, bool]:
    """The columns that the rows have, and whether ids are written as text: no other type holds them all."""
    names: dict[str, None] = {"line": None}
    answer: dict[str, None] = {}
    id_types: set[str] = set()
    for row in map(json.loads, lines):
        names.update(dict.fromkeys(row))
        if row.get("answers"):
            answer.update(dict.fromkeys(row["answers"][0]))
        if "id" in row:
            id_types.add(_id_type(row["id"]))
    ids_as_text = len(id_types) > 1 or id_types == {"json"}
    types: dict[str, Any] = {
        "line": pyarrow.int64(),
        "id": pyarrow.type_for_alias("string" if ids_as_text else next(iter(id_types), "string")),
        "window": pyarrow.int64(),
        "tokens": pyarrow.int64(),
        "answers": pyarrow.list_(
            pyarrow.struct([(key, pyarrow.type_for_alias(_NUMBERS.get(key, "string"))) for key in answer])
        ),
        "outputs": pyarrow.struct([(spec.name, _output_type(pyarrow, spec)) for spec in outputs]),
        "error": pyarrow.string(),
    }
    if not outputs:
        names.pop("outputs", None)  # Parquet has no struct without fields
    return pyarrow.schema([(name, types[name]) for name in names]), ids_as_text


def _id_type(value: Any) -> str:
    """The column type of one id; "json" where none of the plain ones holds it."""
    if type(value) is int:
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {str: "string", bool: "bool", float: "float64"}.get(type(value), "json")


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _output_type(pyarrow: Any, spec: TensorSpec) -> Any:
    """Nested lists, one for each axis but the batch."""
    kind = "float64" if "float" in spec.dtype else "bool" if spec.dtype == "bool" else "int64"
    found = pyarrow.type_for_alias(kind)
    for _ in spec.shape[1:]:
        found = pyarrow.list_(found)
    return found
