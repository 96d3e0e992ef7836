"""Random files of documents: each line gets a row with outputs or with an error."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfx.checks import parse_json
from lfx.errors import InputError, LfxError
from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.tokenizer import END_TO_END, Tokenizer
from lfx.signature import Signature
from tests.conftest import MakeBundle
from tests.models import VOCAB_SIZE

numbers = st.one_of(st.integers(-3, VOCAB_SIZE + 3), st.integers(), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
documents = st.one_of(
    st.fixed_dictionaries({"input_ids": ids}, optional={"id": values}),
    st.fixed_dictionaries({"text": st.text(max_size=200)}, optional={"id": values, "pair": values}),
    st.fixed_dictionaries({}, optional={"input_ids": values, "text": values, "pair": values, "id": values}),
    values,
)
lines = st.one_of(
    documents.map(lambda value: json.dumps(value).encode()),
    documents.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40).filter(lambda content: b"\n" not in content),
)


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Any:
    with Engine(bundle("text-classification")) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(bundle: MakeBundle, engine: Engine) -> Tokenizer:
    return Tokenizer(bundle("text-classification"), engine.signature)


def run_lines(engine: Engine, tokenizer: Tokenizer, content: list[bytes], stride: int | None) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_bytes(b"".join(line + b"\n" for line in content))
        run_documents(engine, tokenizer, source, output, stride=stride)
        return [parse_json(line) for line in output.read_bytes().splitlines()]


@pytest.mark.slow
@given(st.lists(lines, max_size=6), st.sampled_from([None, 5]))
def test_each_line_gets_a_row(engine: Engine, tokenizer: Tokenizer, content: list[bytes], stride: int | None) -> None:
    rows = run_lines(engine, tokenizer, content, stride)
    assert list(dict.fromkeys(row["line"] for row in rows)) == list(range(1, len(content) + 1))
    for row in rows:
        assert ("error" in row) != ("outputs" in row)
        if "error" in row:
            assert isinstance(row["error"], str)
            assert row["error"]
        else:
            assert all(np.isfinite(score) for score in row["outputs"]["logits"])


@given(st.lists(documents, min_size=1, max_size=5))
@settings(max_examples=settings.default.max_examples // 4)
def test_parquet_gives_the_rows_of_jsonl(engine: Engine, tokenizer: Tokenizer, values: list[Any]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        for output in ("out.jsonl", "out.parquet"):
            run_documents(engine, tokenizer, folder / "in.jsonl", folder / output)
        rows = [parse_json(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
        table = parquet.read_table(folder / "out.parquet").to_pylist()
    assert len(table) == len(rows)
    for row, other in zip(rows, table, strict=True):
        assert row["line"] == other["line"]
        assert row.get("error") == other.get("error")
        if "outputs" in row:
            assert row["outputs"]["logits"] == pytest.approx(other["outputs"]["logits"])
        if "id" in row and isinstance(other["id"], str) and not isinstance(row["id"], str):
            assert parse_json(other["id"]) == row["id"]
        elif "id" in row:
            assert other["id"] == row["id"]


@pytest.mark.slow
@given(st.binary(max_size=300), st.integers(0, 2), st.booleans())
def test_a_journal_of_any_bytes_changes_no_result(
    engine: Engine, tokenizer: Tokenizer, junk: bytes, whole_lines: int, has_header: bool
) -> None:
    content = [b'{"input_ids": [5, 6]}', b'{"input_ids": [7]}']
    expected = run_lines(engine, tokenizer, content, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in content))
        journal = b'{"journal": 2, "input": "x"}\n' * has_header + b'{"input": "x"}\n' * whole_lines + junk
        (folder / ".out.jsonl.partial").write_bytes(journal)
        try:
            run_documents(engine, tokenizer, folder / "in.jsonl", folder / "out.jsonl")
        except InputError as error:  # it is no journal, or another run's
            assert re.search("is no journal of lfx|has finished documents of a run with another", str(error))
            assert (folder / ".out.jsonl.partial").read_bytes() == journal
            return
        assert [parse_json(line) for line in (folder / "out.jsonl").read_bytes().splitlines()] == expected


@given(st.text(alphabet="the quick brown fox</s>", max_size=600), st.integers(1, 126))
def test_overlapping_windows_cover_the_whole_text(tokenizer: Tokenizer, engine: Engine, text: str, stride: int) -> None:
    limit = engine.signature.max_seqlen
    assert limit == 128
    try:
        windows = [window.ids for window in tokenizer.windows(text, None, stride)]
        whole = [window.ids for window in tokenizer.windows(text, None, END_TO_END)]
    except InputError:
        assert not text.strip()
        return
    assert all(ids[0] == 0 and ids[-1] == 2 and len(ids) <= limit for ids in (*windows, *whole))
    joined = windows[0][1:-1] + [token for ids in windows[1:] for token in ids[1:-1][limit - 2 - stride :]]
    assert joined == [token for ids in whole for token in ids[1:-1]]


@given(st.text(max_size=60))
def test_a_tokenizer_file_with_any_text_is_refused_in_one_line(text: str) -> None:
    signature = Signature("M", "feature-extraction", "fp32", (), (), (4,))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8", errors="replace")
        with pytest.raises(LfxError) as caught:
            Tokenizer(Path(folder), signature)
        assert "\n" not in str(caught.value)
