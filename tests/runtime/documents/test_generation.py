"""Files of documents through a model that writes texts: summaries, errors of single documents, resumed runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import InputError, LfxError
from lfx.runtime import Engine
from lfx.runtime.documents import run as documents
from lfx.runtime.documents import run_documents
from lfx.runtime.documents.journal import read_header
from lfx.runtime.generation.graphs import GraphGenerator
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.documents.test_run import rows, texts, write

OPTIONS = {"max_new_tokens": 6, "num_beams": 2}


@pytest.fixture(scope="module")
def led(led_bundle: MakeLed) -> Iterator[tuple[Engine, Tokenizer]]:
    folder = led_bundle()[1]
    with Engine(folder, threads=1) as engine:
        yield engine, Tokenizer(folder, engine.signature)


def test_each_document_gets_its_summary(led: tuple[Engine, Tokenizer], tmp_path: Path) -> None:
    engine, tokenizer = led
    items = [*texts(5), {"id": "ids", "input_ids": [5, 6, 7, 2]}, {"id": "empty", "text": ""}, "no JSON"]
    summary = run_documents(
        engine, tokenizer, write(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl", generation=OPTIONS
    )
    assert (summary.documents, summary.refused) == (8, 2)
    written = rows(tmp_path / "out.jsonl")
    assert [row["line"] for row in written] == list(range(1, 9))
    for item, row in zip(items[:6], written, strict=False):
        assert isinstance(item, dict)
        ids = item["input_ids"] if "input_ids" in item else tokenizer.encode(item["text"]).ids
        tokens = engine.generate([ids], **OPTIONS)[0]
        assert row["summary"] == tokenizer.decode(tokens.tolist())
        assert row["tokens"] == len(ids)
        assert 1 <= row["new_tokens"] <= 6
        assert set(row) == {"line", "id", "tokens", "new_tokens", "summary"}
    assert [set(row) - {"id"} for row in written[6:]] == [{"line", "error"}] * 2


@pytest.mark.parametrize(
    ("generation", "message"), [({1: 2}, "generation is {1: 2}; give a dict"), ({"self": 1}, "self is no option of")]
)
def test_names_that_no_option_has_are_refused(
    generation: Any, message: str, led: tuple[Engine, Tokenizer], tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", texts(1))
    with pytest.raises(InputError, match=message):
        run_documents(*led, source, tmp_path / "out.jsonl", generation=generation)


def test_parquet_has_the_rows_of_jsonl(led: tuple[Engine, Tokenizer], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    engine, tokenizer = led
    source = write(tmp_path / "in.jsonl", texts(5))
    for name in ("out.jsonl", "out.parquet"):
        run_documents(engine, tokenizer, source, tmp_path / name, generation=OPTIONS)
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows(tmp_path / "out.jsonl")


def test_without_a_tokenizer_the_ids_are_written(led: tuple[Engine, Tokenizer], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    engine, _ = led
    source = write(tmp_path / "in.jsonl", [{"input_ids": [5, 6, 7, 2]}])
    for name in ("out.jsonl", "out.parquet"):
        run_documents(engine, None, source, tmp_path / name, generation=OPTIONS)
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["output_ids"] == engine.generate([[5, 6, 7, 2]], **OPTIONS)[0][: 1 + row["new_tokens"]].tolist()


def test_a_stopped_run_goes_on_after_its_last_chunk(
    led: tuple[Engine, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tokenizer = led
    monkeypatch.setattr(documents, "CHUNK", 4)
    source = write(tmp_path / "in.jsonl", texts(10))
    run_documents(engine, tokenizer, source, tmp_path / "whole.jsonl", generation=OPTIONS)

    def stop(line: str) -> None:
        if line.startswith("8 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=OPTIONS, progress=stop)
    done = run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=OPTIONS)
    assert done.resumed_at == 8
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_resumed_run_has_the_seed_of_the_stopped_one(
    led: tuple[Engine, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tokenizer = led
    monkeypatch.setattr(documents, "CHUNK", 2)
    source, sampling = write(tmp_path / "in.jsonl", texts(4)), {"max_new_tokens": 6, "do_sample": True}

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=sampling, progress=stop)
    seed = read_header(tmp_path / "out.jsonl")["generation"]["seed"]
    done = run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=sampling)
    assert done.resumed_at == 2
    given = {**sampling, "seed": seed}
    run_documents(engine, tokenizer, source, tmp_path / "whole.jsonl", generation=given)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run_documents(engine, tokenizer, source, tmp_path / "other.jsonl", generation=sampling, progress=stop)
    assert read_header(tmp_path / "other.jsonl")["generation"]["seed"] != seed  # each run draws its own


def test_equal_documents_get_samples_of_their_own(
    led: tuple[Engine, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each chunk, and where a batch fails and its documents run alone."""
    engine, _ = led
    monkeypatch.setattr(documents, "CHUNK", 4)
    source = write(tmp_path / "in.jsonl", [{"input_ids": [5, 6, 7, 2]}] * 10)
    sampling = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "top_k": 0, "seed": 5}
    run_documents(engine, None, source, tmp_path / "out.jsonl", generation=sampling)
    assert len({tuple(row["output_ids"]) for row in rows(tmp_path / "out.jsonl")}) == 10
    encode = GraphGenerator.encode

    def fail(self: Any, sequences: Any, copies: int) -> Any:
        if len(sequences) > 1:
            raise LfxError("out of memory")
        return encode(self, sequences, copies)

    monkeypatch.setattr(GraphGenerator, "encode", fail)
    run_documents(engine, None, source, tmp_path / "alone.jsonl", generation=sampling)
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_a_run_is_not_resumed_with_other_options(
    led: tuple[Engine, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tokenizer = led
    monkeypatch.setattr(documents, "CHUNK", 4)
    source = write(tmp_path / "in.jsonl", texts(10))

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=OPTIONS, progress=stop)
    other = {**OPTIONS, "max_new_tokens": 3}
    with pytest.raises(InputError, match="finished documents of a run with another generation"):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=other)


def test_a_document_that_fails_in_a_batch_runs_alone(
    led: tuple[Engine, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tokenizer = led
    encode = GraphGenerator.encode

    def fail(self: Any, sequences: Any, copies: int) -> Any:
        if any(9 in feeds["input_ids"] for feeds in sequences):
            raise LfxError("out of memory")
        return encode(self, sequences, copies)

    monkeypatch.setattr(GraphGenerator, "encode", fail)
    items = [{"input_ids": ids} for ids in ([5, 6, 2], [5, 9, 2], [6, 7, 2])]
    run_documents(engine, tokenizer, write(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl", generation=OPTIONS)
    written = rows(tmp_path / "out.jsonl")
    assert [row.get("error") for row in written] == [None, "out of memory", None]


def test_options_are_refused_before_anything_runs(
    led: tuple[Engine, Tokenizer], bundle: MakeBundle, tmp_path: Path
) -> None:
    engine, tokenizer = led
    source, output = write(tmp_path / "in.jsonl", texts(2)), tmp_path / "out.jsonl"
    for options, message in (
        ({"beams": 2}, "beams is no option of generate"),
        ({"num_beams": 2, "num_return_sequences": 2}, "one text is written for each document"),
    ):
        with pytest.raises(InputError, match=message):
            run_documents(engine, tokenizer, source, output, generation=options)
    with (
        Engine(bundle()) as other,
        pytest.raises(InputError, match=r"options of generation .* are for models that write"),
    ):
        run_documents(other, None, source, output, generation={"num_beams": 2})
    assert not output.exists()
