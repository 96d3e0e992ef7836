"""Reads documents from JSONL or Parquet and writes rows to either, a few at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lfx.checks import parse_json
from lfx.errors import InputError, LfxError, one_line, require
from lfx.files import replacing
from lfx.runtime.documents.remote import RemoteFile
from lfx.signature import TensorSpec

SUFFIXES = (".jsonl", ".ndjson", ".parquet")  # in lower or upper case
FIELDS = ("text", "pair", "input_ids", "attention_mask", "global_attention_mask", "id")
Source = Path | RemoteFile
_MAX_LINE_BYTES = 50_000_000
# Limits of what is read of a Parquet file at a time; a file of kilobytes may hold rows of millions of values.
_BATCH_ROWS, _BATCH_VALUES, _BATCH_BYTES = 256, 2_000_000, 64_000_000
_MOST_BYTES = 1 << 30  # of a row of nested values, and of all values of one length, for which pyarrow reserves memory
_PLAIN, _DICTIONARY = {"PLAIN", "RLE", "BIT_PACKED"}, {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}  # encodings of Parquet
_PREFIXED = "DELTA_BYTE_ARRAY"  # has what a value and the one before it begin with only once
_GROUP_BYTES = 1 << 24  # JSON bytes of the rows of one Parquet row group
NUMBERS = {"score": "float64", "position": "int64", "choice": "int64"}  # fields of answers that are not strings


def is_documents(path: Path) -> bool:
    """Whether a file has documents, by its suffix; any other file is one text."""
    return path.suffix.lower() in SUFFIXES


def is_parquet(path: Source) -> bool:
    """Whether a file is Parquet, by its suffix."""
    return path.suffix.lower() == ".parquet"


def check_source(source: Source) -> None:
    """Check a file before its documents are read.

    Raises:
        InputError: the file does not exist, or is a Parquet file with two columns of one name, or with neither text nor
            input_ids.
        DependencyError: the file is Parquet and pyarrow is not installed.
    """
    if not source.is_file():
        raise InputError(f"{source} does not exist, or is no file")
    if not is_parquet(source):
        return
    names = _open_parquet(source).schema_arrow.names
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise InputError(f"{source} has several columns of the name {repeated[0]!r}; rename all but one")
    if not {"text", "input_ids"} & set(names):
        columns = ", ".join(map(repr, names)) or "none"
        raise InputError(f"{source} has the columns {columns}; one must be text or input_ids")


def count_documents(source: Source) -> int:
    """Number of documents in a file, broken ones included."""
    if is_parquet(source):
        return int(_open_parquet(source).metadata.num_rows)
    return sum(1 for _ in _bytes_lines(source))


def read_documents(source: Source, start: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield (number, document or InputError) for each document; numbers begin at 1.

    Args:
        start: number of documents to skip.
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
    """Write all rows to a file atomically, in the format of its suffix.

    Args:
        lines: returns an iterator over all rows as lines of JSON; it may be called more than once.
        outputs: the model's outputs per sequence.
    Raises:
        InputError: Parquet cannot represent the rows.
        OSError: the file cannot be written.
    """
    with replacing(output) as path, path.open("wb") as file:
        if is_parquet(output):
            _write_parquet(lines, file, outputs)
        else:
            file.writelines(lines())
        file.flush()
        os.fsync(file.fileno())


def _bytes_lines(source: Source) -> Iterator[bytes]:
    """Yield the lines of a file; of a line of more than `_MAX_LINE_BYTES`, its first `_MAX_LINE_BYTES` + 1 bytes."""
    try:
        with source.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                yield line
                while len(line) > _MAX_LINE_BYTES and not line.endswith(b"\n"):  # skip the rest of the line
                    line = file.readline(_MAX_LINE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {one_line(error)}") from error


def _json_document(line: bytes) -> Any:
    """Parse one line; an InputError if it is too long, not UTF-8 or not JSON."""
    if len(line) - line.endswith(b"\n") > _MAX_LINE_BYTES:
        return InputError(f"a line of more than {_MAX_LINE_BYTES:,} bytes; split the document")
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return InputError("not UTF-8")
    except ValueError as error:
        return InputError(f"broken JSON: {one_line(error)}" if line.strip() else "empty line")


def _open_parquet(source: Source, dictionary_columns: Sequence[str] = ()) -> Any:
    """Open a Parquet file; the columns whose paths are in `dictionary_columns` stay dictionary-encoded in memory."""
    parquet = require("pyarrow.parquet", "parquet")
    try:
        file = source if isinstance(source, Path) else source.open_random_access()
        return parquet.ParquetFile(file, read_dictionary=dictionary_columns)
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{source} cannot be read as Parquet: {one_line(error)}") from error


def _parquet_documents(source: Source, start: int) -> Iterator[tuple[int, Any]]:
    """`read_documents` for Parquet."""
    first = _open_parquet(source)
    columns = [name for name in first.schema_arrow.names if name in FIELDS]
    file = _open_parquet(source, _dictionary_columns(first.metadata))
    number = 0
    try:
        for batch in file.iter_batches(_batch_rows(file.metadata), columns=columns):
            stored = _without_own_types(batch)
            for i in range(stored.num_rows):
                number += 1
                if number > start:
                    yield number, parquet_document(stored, i)
    except (LfxError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{source} cannot be read as Parquet: {one_line(error)}") from error


def _without_own_types(batch: Any) -> Any:
    """Convert columns of extension types that Python code has registered to the types that they are stored as.

    Their conversion to Python types may run code: a value of ray.data.arrow_pickled_object is unpickled.

    Raises:
        InputError: such a type is inside a nested type.
    """
    pyarrow = require("pyarrow", "parquet")
    for i, name in enumerate(batch.schema.names):
        column = batch.column(i)
        while isinstance(column.type, pyarrow.ExtensionType):
            column = column.storage
        if (inner := _own_type(pyarrow, column.type)) is not None:
            raise InputError(f"{name} has the extension type {inner} inside another type; write it as a plain type")
        batch = batch.set_column(i, name, column)
    return batch


def _own_type(pyarrow: Any, data_type: Any) -> str | None:
    """The name of an extension type of Python code inside a type; None if there is none."""
    if isinstance(data_type, pyarrow.ExtensionType):
        return str(data_type.extension_name)
    inner = [data_type.field(i).type for i in range(data_type.num_fields)]
    if pyarrow.types.is_dictionary(data_type) or pyarrow.types.is_run_end_encoded(data_type):
        inner.append(data_type.value_type)
    if isinstance(data_type, pyarrow.BaseExtensionType):  # pyarrow's own, such as arrow.opaque, has no fields
        inner.append(data_type.storage_type)
    names = (_own_type(pyarrow, item) for item in inner)
    return next((name for name in names if name is not None), None)


def _columns(metadata: Any) -> list[int]:
    """The indices of the columns that are read, of which a nested field has several."""
    return [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] in FIELDS]


def _chunks(metadata: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each row group, with the metadata of each column in it that is read."""
    columns = _columns(metadata)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield from ((group, group.column(i)) for i in columns)


def _dictionary_columns(metadata: Any) -> list[str]:
    """The columns that stay dictionary-encoded: strings and bytes, without nested ones and deltas (pyarrow fails)."""
    others = {chunk.path_in_schema for _, chunk in _chunks(metadata) if set(chunk.encodings) - _PLAIN - _DICTIONARY}
    columns = [metadata.schema.column(i) for i in _columns(metadata)]
    return [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and "." not in c.path and c.path not in others]


def _batch_rows(metadata: Any) -> int:
    """Number of rows to read at a time, by the row group with the most values or bytes in a row.

    Raises:
        InputError: pyarrow may need more than `_MOST_BYTES` even for one row.
    """
    rows = _BATCH_ROWS
    lengths = {metadata.schema.column(i).path: max(metadata.schema.column(i).length, 0) for i in _columns(metadata)}
    for group, chunk in _chunks(metadata):
        path, number, encodings = chunk.path_in_schema, chunk.num_values, set(chunk.encodings)
        size, is_nested = chunk.total_uncompressed_size, "." in path
        if _PREFIXED in encodings or (is_nested and encodings & _DICTIONARY and chunk.physical_type == "BYTE_ARRAY"):
            size *= number  # each value may be as large as the whole column in the file
        if number * lengths[path] > _MOST_BYTES or (is_nested and size > _MOST_BYTES * max(group.num_rows, 1)):
            raise InputError(f"{path} may take more than {_MOST_BYTES:,} bytes of memory; leave the column out")
        rows = min(
            rows, group.num_rows * _BATCH_VALUES // max(number, 1), group.num_rows * _BATCH_BYTES // max(size, 1)
        )
    return max(rows, 1)


def parquet_document(batch: Any, index: int) -> Any:
    """Convert one row of a record batch or table to Python types; an InputError if Python cannot represent a value."""
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except MemoryError:
        raise
    except Exception as error:
        return InputError(f"the row cannot be read: {one_line(error)}")


def _write_parquet(lines: Callable[[], Iterator[bytes]], file: IO[bytes], outputs: Sequence[TensorSpec]) -> None:
    """`write_rows` for Parquet; reads the rows twice, first to find their schema."""
    pyarrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        schema, ids_as_text = _schema(pyarrow, lines(), outputs)
        with parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(lines()):
                rows = [json.loads(line) for line in group]
                for row in rows:
                    if ids_as_text and "id" in row:
                        row["id"] = text_of(row["id"])
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    except (LfxError, OSError, MemoryError):
        raise
    except Exception as error:
        raise InputError(one_line(error)) from error


def _groups(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Group lines into lists of at least `_GROUP_BYTES`, except the last."""
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
    """The schema of the rows, and whether ids are written as text because no other column type holds all of them."""
    names: dict[str, None] = {"line": None}
    answer_fields: dict[str, None] = {}
    id_types: set[str] = set()
    for row in map(json.loads, lines):
        names.update(dict.fromkeys(row))
        if row.get("answers"):
            answer_fields.update(dict.fromkeys(row["answers"][0]))
        if "id" in row:
            id_types.add(_id_type(row["id"]))
    ids_as_text = len(id_types) > 1 or id_types == {"json"}
    types: dict[str, Any] = {
        "line": pyarrow.int64(),
        "id": pyarrow.type_for_alias("string" if ids_as_text else next(iter(id_types), "string")),
        "window": pyarrow.int64(),
        "tokens": pyarrow.int64(),
        "new_tokens": pyarrow.int64(),
        "summary": pyarrow.string(),
        "output_ids": pyarrow.list_(pyarrow.int64()),
        "answers": pyarrow.list_(
            pyarrow.struct([(key, pyarrow.type_for_alias(NUMBERS.get(key, "string"))) for key in answer_fields])
        ),
        "outputs": pyarrow.struct([(spec.name, output_type(pyarrow, spec)) for spec in outputs]),
        "error": pyarrow.string(),
    }
    if not outputs:
        names.pop("outputs", None)  # Parquet has no struct without fields
    return pyarrow.schema([(name, types[name]) for name in names]), ids_as_text


def _id_type(value: Any) -> str:
    """The column type of one id; "json" if it is no string, bool, float or int64."""
    if type(value) is int:
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {str: "string", bool: "bool", float: "float64"}.get(type(value), "json")


def text_of(value: Any) -> str:
    """An id as text: a string unchanged, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def output_type(pyarrow: Any, spec: TensorSpec) -> Any:
    """The column type of an output: nested lists, one for each axis except the batch."""
    item = "float64" if "float" in spec.dtype else "bool" if spec.dtype == "bool" else "int64"
    column = pyarrow.type_for_alias(item)
    for _ in spec.shape[1:]:
        column = pyarrow.list_(column)
    return column
