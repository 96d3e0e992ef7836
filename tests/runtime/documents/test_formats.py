"""JSONL and Parquet: bad files are refused before anything runs, and all computed rows can be written."""

from __future__ import annotations

import builtins
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.errors import DependencyError, InputError
from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.documents.formats import check_source, count_documents, read_documents, write_rows
from lfx.runtime.documents.journal import journal_path
from lfx.signature import TensorSpec
from tests.conftest import MakeBundle

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
OUTPUTS = [TensorSpec("logits", "float32", ("batch", 2))]


def table(rows: list[dict[str, Any]], folder: Path, outputs: list[TensorSpec] = OUTPUTS) -> Any:
    """Write rows to Parquet, and read them as a table."""
    path = folder / "out.parquet"
    write_rows(lambda: iter([json.dumps(row).encode() for row in rows]), path, outputs)
    return parquet.read_table(path)


IDS: dict[str, tuple[list[Any], list[Any]]] = {
    "strings": (["a", "é", None], ["a", "é", None]),
    "whole numbers": ([1, -(2**63), 2**63 - 1], [1, -(2**63), 2**63 - 1]),
    "fractions": ([0.5, 1e300, None], [0.5, 1e300, None]),
    "truth values": ([True, None, False], [True, None, False]),
    "numbers and strings": ([1, "a", "1"], ["1", "a", "1"]),
    "numbers and truth values": ([1, True, 0], ["1", "true", "0"]),
    "whole numbers and fractions": ([1, 0.5, None], ["1", "0.5", None]),
    "large": ([2**64, 1, 2**63], [str(2**64), "1", str(2**63)]),
    "all large": ([2**64], [str(2**64)]),
    "an empty object": ([{}], ["{}"]),
    "empty lists": ([[], [[]]], ["[]", "[[]]"]),
    "nested": ([{"a": [1, {"b": None}]}, "x", ["é"]], ['{"a": [1, {"b": null}]}', "x", '["é"]']),
    "objects of several fields": ([{"a": 1}, {"b": "c"}], ['{"a": 1}', '{"b": "c"}']),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_written_as_text_if_no_column_type_holds_all(name: str, tmp_path: Path) -> None:
    given, written = IDS[name]
    rows = [{"line": i, **({"id": value} if value is not None else {})} for i, value in enumerate(given, 1)]
    assert table(rows, tmp_path).column("id").to_pylist() == written


def test_rows_are_written_in_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.runtime.documents.formats._GROUP_BYTES", 200)
    answer = {"label": "a", "score": None}
    rows: list[dict[str, Any]] = [
        {"line": i, "window": 0, "tokens": 4, "answers": [answer], "outputs": {"logits": [0.5, None]}}
        for i in range(1, 20)
    ]
    rows.insert(3, {"line": 3, "error": "bad"})
    written = table(rows, tmp_path)
    assert written.column_names == ["line", "window", "tokens", "answers", "outputs", "error"]
    assert [{k: v for k, v in row.items() if v is not None} for row in written.to_pylist()] == rows
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups > 4


def test_no_rows_give_an_empty_table_with_a_line_column(tmp_path: Path) -> None:
    written = table([], tmp_path)
    assert (written.column_names, written.num_rows) == (["line"], 0)


def test_a_model_with_outputs_per_token_only_has_no_outputs_column(tmp_path: Path) -> None:
    rows = [{"line": 1, "tokens": 2, "answers": [{"token": "a", "label": "b", "score": 1.0}], "outputs": {}}]
    assert table(rows, tmp_path, []).to_pylist() == [{k: v for k, v in rows[0].items() if k != "outputs"}]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_an_empty_input_gives_an_empty_output(name: str, bundle: MakeBundle, tmp_path: Path) -> None:
    if name == "in.jsonl":
        (tmp_path / name).write_text("")
    else:
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    with Engine(bundle("text-classification"), threads=1) as engine:
        assert run_documents(engine, None, tmp_path / name, tmp_path / "out.parquet").documents == 0
        run_documents(engine, None, tmp_path / name, tmp_path / "out.jsonl")
    assert parquet.read_table(tmp_path / "out.parquet").column_names == ["line"]
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_a_token_classifier_writes_parquet(bundle: MakeBundle, tmp_path: Path) -> None:
    from lfx.runtime.tokenizer import Tokenizer

    source, folder = tmp_path / "in.jsonl", bundle("token-classification")
    source.write_text('{"text": "the fox"}\n')
    with Engine(folder, threads=1) as engine:
        run_documents(engine, Tokenizer(folder, engine.signature), source, tmp_path / "out.parquet")
    assert len(parquet.read_table(tmp_path / "out.parquet").to_pylist()[0]["answers"]) == 4


def refuse_to_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is to be computed")


COLUMNS: dict[str, tuple[Callable[[], Any], str]] = {
    "a column twice": (
        lambda: pyarrow.Table.from_arrays([pyarrow.array(["fox"]), pyarrow.array(["dog"])], ["text", "text"]),
        "several columns of the name 'text'; rename all but one",
    ),
    "another column twice": (
        lambda: pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["text", "x", "x"]),
        "several columns of the name 'x'",
    ),
    "neither text nor ids": (
        lambda: pyarrow.table({"body": ["fox"], "id": [1]}),
        "has the columns 'body', 'id'; one must be text or input_ids",
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_bad_columns_are_refused_before_anything_runs(
    name: str, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = COLUMNS[name]
    parquet.write_table(make(), tmp_path / "in.parquet")
    monkeypatch.setattr(Engine, "stream", refuse_to_run)
    with Engine(bundle("text-classification"), threads=1) as engine, pytest.raises(InputError, match=reason):
        run_documents(engine, None, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert not journal_path(tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("source", "output"), [("in.jsonl", "out.parquet"), ("in.parquet", "out.jsonl")])
def test_a_missing_pyarrow_is_an_error_before_anything_runs(
    source: str, output: str, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, package: str | None = None) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")
        return real(name, package)

    real = importlib.import_module
    (tmp_path / source).write_text('{"input_ids": [3, 4]}\n')
    with Engine(bundle("text-classification"), threads=1) as engine:
        monkeypatch.setattr(importlib, "import_module", missing)
        monkeypatch.setattr(Engine, "stream", refuse_to_run)
        with pytest.raises(DependencyError, match=r"longformer-lfx\[parquet\]"):
            run_documents(engine, None, tmp_path / source, tmp_path / output)
    assert not journal_path(tmp_path / output).exists()


def test_rows_that_parquet_cannot_represent_are_written_as_json_as_the_error_says(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"input_ids": [3, 4]}\n' * 3)

    def fail(*_: Any, **__: Any) -> Any:
        raise pyarrow.ArrowNotImplementedError("no such type")

    with Engine(bundle("text-classification"), threads=1) as engine:
        with monkeypatch.context() as patched, pytest.raises(InputError, match="no such type; nothing is lost: rename"):
            patched.setattr(parquet.ParquetWriter, "write_table", fail)
            run_documents(engine, None, source, output)
        assert not output.exists()
        other = tmp_path / "out.jsonl"
        journal_path(output).rename(journal_path(other))
        summary = run_documents(engine, None, source, other)
    assert (summary.resumed_at, summary.tokens) == (3, 0)
    assert len(other.read_text().splitlines()) == 3


def test_repeated_texts_of_a_parquet_file_are_in_memory_once(tmp_path: Path) -> None:
    text = "fox " * 500_000
    table = pyarrow.table({"text": [text] * 256, "id": range(256), "input_ids": [[1, 2]] * 256})
    parquet.write_table(table, tmp_path / "in.parquet", compression="zstd")
    assert (tmp_path / "in.parquet").stat().st_size < 100_000
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        for number, document in read_documents(tmp_path / "in.parquet"):
            assert document == {"text": text, "id": number - 1, "input_ids": [1, 2]}
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 32 * len(text)


LONG = "a" * 1_000_000
REPEATED: dict[str, tuple[Any, Any, str | None]] = {  # type of the column, the value of all rows, encoding
    "bytes": (pyarrow.binary(), LONG.encode(), None),
    "lists": (pyarrow.list_(pyarrow.string()), [LONG], None),
    "structs": (pyarrow.struct([("a", pyarrow.struct([("b", pyarrow.binary())]))]), {"a": {"b": LONG.encode()}}, None),
    "deltas": (pyarrow.string(), LONG, "DELTA_BYTE_ARRAY"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_values_of_other_columns_are_in_memory_a_few_at_a_time(name: str, tmp_path: Path) -> None:
    column, value, encoding = REPEATED[name]
    table = pyarrow.table({"text": ["fox"] * 256, "id": pyarrow.array([value] * 256, column)})
    options: dict[str, Any] = {"dictionary_pagesize_limit": 1 << 30}
    if encoding is not None:
        options = {"use_dictionary": ["text"], "column_encoding": {"id": encoding}}
    parquet.write_table(table, tmp_path / "in.parquet", compression="zstd", **options)
    assert (tmp_path / "in.parquet").stat().st_size < 100_000
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        for number, document in read_documents(tmp_path / "in.parquet"):
            assert number % 50 or document == {"text": "fox", "id": value}
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 150 * len(LONG)


@pytest.mark.parametrize("name", ["lists", "one length"])
def test_repeated_values_that_would_all_be_in_memory_are_refused(name: str, tmp_path: Path) -> None:
    if name == "lists":
        texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), pyarrow.array([LONG]))
        ids = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2000], pyarrow.int32()), texts)
    else:
        ids = pyarrow.array([LONG[:50_000].encode()], pyarrow.binary(50_000)).take(pyarrow.array([0] * 30_000))
    table = pyarrow.table({"text": ["fox"] * len(ids), "id": ids})
    parquet.write_table(table, tmp_path / "in.parquet", compression="zstd")
    with pytest.raises(InputError, match=r"id.* may take more than 1,073,741,824 bytes of memory; leave the column"):
        list(read_documents(tmp_path / "in.parquet"))


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_texts_are_read_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    texts = [f"the fox {i}" for i in range(600)]
    options: Any = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in.parquet", **options)
    assert [document["text"] for _, document in read_documents(tmp_path / "in.parquet")] == texts


def test_few_long_rows_of_a_parquet_file_are_in_memory_at_once(tmp_path: Path) -> None:
    ids, count = 500_000, 64
    lists = pyarrow.ListArray.from_arrays(
        pyarrow.array(range(0, ids * count + 1, ids), pyarrow.int32()), pyarrow.array(np.full(ids * count, 5))
    )
    parquet.write_table(pyarrow.table({"input_ids": lists}), tmp_path / "in.parquet", compression="zstd")
    assert (tmp_path / "in.parquet").stat().st_size < 100_000
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        _, document = next(read_documents(tmp_path / "in.parquet"))
    finally:
        pyarrow.set_memory_pool(before)
    assert document == {"input_ids": [5] * ids}
    assert pool.max_memory() < 100_000_000  # all rows have 256,000,000 bytes


def test_a_parquet_row_that_cannot_be_read_is_one_refused_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"the fox", b"\xff\xfe", b"dog"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw, "more": [1, 2, 3]}), tmp_path / "in.parquet")
    documents = list(read_documents(tmp_path / "in.parquet"))
    assert [documents[0], documents[2]] == [(1, {"text": "the fox"}), (3, {"text": "dog"})]
    assert isinstance(documents[1][1], InputError)


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_documents_are_counted_and_read_from_any_start(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "in.jsonl":
        path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(600)))
    else:
        parquet.write_table(pyarrow.table({"text": [str(i) for i in range(600)]}), path)
    assert count_documents(path) == 600
    assert list(read_documents(path, 597)) == [(i + 1, {"text": str(i)}) for i in (597, 598, 599)]
    assert list(read_documents(path, 600)) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "fox", "text": "dog"}', "broken JSON: the key 'text' appears twice"),
        ('{"text": "fox", "id": NaN}', "broken JSON: NaN is not JSON"),
        ('{"text": "fox", "x": {"y": -Infinity}}', "broken JSON: -Infinity is not JSON"),
        ('{"id": ' + "9" * 5000 + "}", "broken JSON"),
    ],
)
def test_lines_that_are_not_strict_json_are_refused(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line + '\n{"text": "fox"}\n')
    (_, bad), (_, good) = read_documents(tmp_path / "in.jsonl")
    assert str(bad).startswith(reason)
    assert good == {"text": "fox"}


def test_an_input_that_cannot_be_opened_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(builtins, "open", denied)
    with pytest.raises(InputError, match=r"in\.jsonl cannot be read: .*Permission denied"):
        list(read_documents(path))


def test_a_line_above_the_limit_is_one_refused_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.runtime.documents.formats._MAX_LINE_BYTES", 40)
    (tmp_path / "in.jsonl").write_bytes(b'{"input_ids": [5]}\n' + b"\0" * 1000 + b'\n{"input_ids": [6]}\n')
    first, long, last = read_documents(tmp_path / "in.jsonl")
    assert (first, last) == ((1, {"input_ids": [5]}), (3, {"input_ids": [6]}))
    assert long[0] == 2
    assert "a line of more than 40 bytes" in str(long[1])


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_of_the_limit_is_read(end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.runtime.documents.formats._MAX_LINE_BYTES", 18)
    (tmp_path / "in.jsonl").write_bytes(b'{"input_ids": [5]}\n' + b'{"input_ids": [6]}' + end)
    assert [document for _, document in read_documents(tmp_path / "in.jsonl")] == [
        {"input_ids": [5]},
        {"input_ids": [6]},
    ]


def test_a_file_of_many_columns_is_read(tmp_path: Path) -> None:
    # A search that is quadratic in the number of columns would take minutes.
    table = pyarrow.table({"text": ["fox"], **{f"c{i}": pyarrow.nulls(1, pyarrow.int8()) for i in range(20_000)}})
    parquet.write_table(table, tmp_path / "in.parquet")
    assert list(read_documents(tmp_path / "in.parquet")) == [(1, {"text": "fox"})]
    check_source(tmp_path / "in.parquet")
