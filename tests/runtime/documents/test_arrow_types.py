"""Every type of pyarrow as each column of documents: each row is what pyarrow reads, or an error of that row.

Enumerated are the plain types, the extension types of Arrow, and each of them in a dictionary, four types of
lists, a struct and a map, with nulls, as text, id and input_ids. Ways of writing take turns. The witness is
pyarrow's `read_table`.
"""

from __future__ import annotations

import decimal
import functools
import itertools
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfx.errors import InputError
from lfx.runtime.documents.formats import check_source, count_documents, read_documents

NUMBERS = [3, 4, 5, 6, 7, 8]
TEXTS = [f"the fox {number}" for number in NUMBERS]
BYTES = [text.encode() for text in TEXTS]
BOTH = pa.array([*range(0, 13, 2)], pa.int32())  # offsets of lists of two values
ORDER = [5, None, 1, 1, None, 0]  # rows in another order, with nulls


def _each(columns: Iterable[Any], make: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
    """Name of a type -> makes an array of it."""
    return {str(column): functools.partial(make, column) for column in columns}


UNITS = ("s", "ms", "us", "ns")
PLAIN: dict[str, Callable[[], Any]] = {
    "null": lambda: pa.nulls(len(NUMBERS)),
    **_each(
        map(pa.type_for_alias, ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]),
        lambda column: pa.array(NUMBERS).cast(column),
    ),
    **_each([pa.float16(), pa.float32(), pa.float64()], lambda column: pa.array(NUMBERS).cast(column)),
    "large uint64": lambda: pa.array([2**64 - number for number in NUMBERS], pa.uint64()),
    "floats": lambda: pa.array([float("nan"), float("inf"), -0.0, 1e308, 5e-324, 1.5]),
    **_each(
        [pa.decimal32(5, 2), pa.decimal64(12, 2), pa.decimal128(30, 2), pa.decimal256(60, 2)],
        lambda column: pa.array([decimal.Decimal(number) for number in NUMBERS], column),
    ),
    **_each(
        [
            *(pa.timestamp(unit, zone) for unit in UNITS for zone in (None, "UTC", "No/Where")),
            *(pa.duration(unit) for unit in UNITS),
            *(pa.time64("us"), pa.time64("ns")),
        ],
        lambda column: pa.array(NUMBERS, pa.int64()).view(column),
    ),
    **_each([pa.date32(), pa.time32("s"), pa.time32("ms")], lambda column: pa.array(NUMBERS, pa.int32()).view(column)),
    "after the year 9999": lambda: pa.array([2**62] * len(NUMBERS), pa.timestamp("s")),
    **_each([pa.string(), pa.large_string(), pa.string_view()], lambda column: pa.array(TEXTS, column)),
    **_each(
        [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(BYTES[0]))],
        lambda column: pa.array(BYTES, column),
    ),
    "not UTF-8": lambda: pa.array([b"\xff", b"\xfe", b"a", b"b", b"c", b"d"]).view(pa.string()),
    "json": lambda: pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS)),
    "uuid": lambda: pa.array([uuid.UUID(int=number) for number in NUMBERS], pa.uuid()),
    "bool8": lambda: pa.ExtensionArray.from_storage(pa.bool8(), pa.array(NUMBERS, pa.int8())),
    "opaque": lambda: pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "a", "b"), pa.array(TEXTS)),
    "tensor": lambda: pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int64(), [2]), pa.array([[n, n] for n in NUMBERS], pa.list_(pa.int64(), 2))
    ),
}
NESTED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda array: array,
    "dictionary": lambda array: pa.DictionaryArray.from_arrays(pa.array([5, 4, 3, 2, 1, 0], pa.int8()), array),
    "list": lambda array: pa.ListArray.from_arrays(BOTH, pa.concat_arrays([array, array])),
    "large list": lambda array: pa.LargeListArray.from_arrays(BOTH.cast("int64"), pa.concat_arrays([array, array])),
    "list view": lambda array: pa.ListViewArray.from_arrays(
        BOTH[:-1], pa.array([2] * 6, pa.int32()), pa.concat_arrays([array, array])
    ),
    "fixed list": lambda array: pa.FixedSizeListArray.from_arrays(pa.concat_arrays([array, array]), 2),
    "struct": lambda array: pa.StructArray.from_arrays([array], ["a.b"]),
    "map": lambda array: pa.MapArray.from_arrays(pa.array(range(7), pa.int32()), pa.array(TEXTS), array),
}
WRITTEN: list[dict[str, Any]] = [
    {},
    {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd"},
    {"store_schema": False, "row_group_size": 4, "compression": "lz4"},
    {"version": "1.0", "row_group_size": 5, "compression": "gzip"},
]
REFUSED = "refused"


def _rows(table: Any) -> list[Any]:
    """The rows of a table as Python's types; REFUSED for one that Python cannot represent."""
    rows = []
    for i in range(table.num_rows):
        try:
            rows.append(table.slice(i, 1).to_pylist()[0])
        except Exception:
            rows.append(REFUSED)
    return rows


def _read(path: Path) -> Any:
    """The rows that lfx reads, or the message of its error."""
    try:
        check_source(path)
        rows = [REFUSED if isinstance(row, InputError) else row for _, row in read_documents(path)]
    except InputError as error:
        return str(error)
    assert count_documents(path) == len(rows)
    return rows


@pytest.mark.parametrize("nesting", NESTED)
def test_a_column_of_any_type_is_read_as_pyarrow_reads_it(nesting: str, tmp_path: Path) -> None:
    path, failures, number = tmp_path / "in.parquet", [], 0
    for i, (name, column) in enumerate(itertools.product(PLAIN, ("text", "id", "input_ids"))):
        options = WRITTEN[i % len(WRITTEN)]
        others = {"text": TEXTS} if column == "id" else {}
        try:
            array = NESTED[nesting](PLAIN[name]())
            if i % 2:
                array = array.take(pa.array(ORDER))
            pq.write_table(pa.table({**others, column: array}), path, **options)
            table = pq.read_table(path, partitioning=None)
        except (pa.ArrowException, OSError, TypeError, ValueError):
            continue  # Arrow has no such nesting, or pyarrow can not write it or not read it back
        number += 1
        rows = _read(path)
        if repr(rows) != repr(_rows(table)) and not str(rows).endswith("not implemented for chunked array outputs"):
            failures.append((name, column, options, rows))
    assert failures == []
    assert number > 50
