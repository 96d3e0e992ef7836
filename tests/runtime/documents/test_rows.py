"""Rows of documents: groups of windows, and documents on which the engine or the tokenizer fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.errors import LfxError
from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle

CLASSIFIER = "text-classification"


@pytest.fixture
def engine(bundle: MakeBundle) -> Any:
    """A classifier."""
    with Engine(bundle(CLASSIFIER), threads=1) as opened:
        yield opened


def run(engine: Engine, folder: Path, documents: list[Any], tokenizer: Tokenizer | None = None, **options: Any) -> Any:
    """Run the documents; returns the summary and the rows."""
    (folder / "in.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    summary = run_documents(engine, tokenizer, folder / "in.jsonl", folder / "out.jsonl", **options)
    return summary, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def watch(engine: Engine, check: Callable[[Any], None]) -> None:
    """Call `check` with the ids of each batch before the engine runs it."""
    infer = engine._backend.infer  # type: ignore[union-attr]

    def checked(feeds: Any, *names: Any, **options: Any) -> Any:
        check(feeds["input_ids"])
        return infer(feeds, *names, **options)

    engine._backend.infer = checked  # type: ignore[union-attr, method-assign]


def groups(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the number of sequences of each group is appended."""
    sizes: list[int] = []
    stream = engine.stream

    def counted(sequences: Any, *, ahead: int = 0, **options: Any) -> Any:
        sizes.append(len(sequences))
        return stream(sequences, **options)

    monkeypatch.setattr(engine, "stream", counted)
    return sizes


def test_windows_run_in_groups_of_a_fixed_number(
    engine: Engine, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = groups(engine, monkeypatch)
    tokenizer = Tokenizer(bundle(CLASSIFIER), engine.signature)
    documents = [{"text": "fox"}, {"text": "the " * 700}, {"text": ""}, {"text": "dog"}]
    summary, rows = run(engine, tmp_path, documents, tokenizer, stride=1)
    assert sizes == [256, 256, 65]
    assert summary.windows == 577
    assert [row["line"] for row in rows] == [1, *[2] * 575, 3, 4]


def test_rows_are_yielded_before_the_next_group_is_made(
    engine: Engine, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfx.runtime.documents.rows.AHEAD", 4)
    calls: list[int] = []
    tokenizer = Tokenizer(bundle(CLASSIFIER), engine.signature)
    answers = Postprocessor.answers

    def noted(*arguments: Any) -> Any:
        calls.append(1)
        return answers(*arguments)

    seen: list[int] = []
    monkeypatch.setattr(Postprocessor, "answers", noted)
    watch(engine, lambda ids: seen.append(len(calls)))
    run(engine, tmp_path, [{"text": "the " * 140}], tokenizer, stride=1)
    assert set(seen) == {0, 4, 8, 12}


def test_large_outputs_per_token_give_smaller_groups(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfx.runtime.documents.rows.OUTPUT_BYTES", 4 * 99 * 10)  # float32 logits of 10 tokens
    with Engine(bundle("fill-mask"), threads=1) as engine:
        sizes = groups(engine, monkeypatch)
        run(engine, tmp_path, [{"input_ids": [3] * length} for length in (4, 4, 4, 20, 1, 9, 2)])
    assert sizes == [3, 1, 2, 1]


def test_a_sequence_that_the_engine_fails_on_is_one_row(engine: Engine, tmp_path: Path) -> None:
    def fail(ids: Any) -> None:
        if (ids == 9).any():
            raise OverflowError("too large")
        if len(ids) > 2:
            raise LfxError("ONNX Runtime failed: out of memory")

    expected = run(engine, tmp_path, [{"input_ids": [3, 4]}] * 5)[1]
    watch(engine, fail)
    documents = [{"input_ids": [3, 4]}] * 2 + [{"id": 7, "input_ids": [3, 9]}] + [{"input_ids": [3, 4]}] * 2
    summary, rows = run(engine, tmp_path, documents)
    assert (summary.documents, summary.refused, summary.windows) == (5, 1, 4)
    assert rows[2] == {"line": 3, "id": 7, "error": "OverflowError: too large"}
    for i in (0, 1, 3, 4):
        np.testing.assert_allclose(rows[i]["outputs"]["logits"], expected[i]["outputs"]["logits"], rtol=0, atol=1e-5)


def test_an_id_that_would_multiply_the_output_is_one_row_with_an_error(engine: Engine, tmp_path: Path) -> None:
    documents = [{"id": "é" * n, "input_ids": [3, 4]} for n in (4_999, 5_000)]
    first, second = run(engine, tmp_path, documents)[1]
    assert first["id"] == documents[0]["id"]
    assert second == {"line": 2, "error": "id has 10,002 bytes as JSON, above the 10,000 allowed; shorten it"}


def test_a_single_document_that_the_engine_fails_on_is_one_row(engine: Engine, tmp_path: Path) -> None:
    def fail(ids: Any) -> None:
        if ids.shape[1] > 20:
            raise LfxError("ONNX Runtime failed: out of memory")

    watch(engine, fail)
    assert run(engine, tmp_path, [{"input_ids": [3] * 30}])[1] == [
        {"line": 1, "error": "ONNX Runtime failed: out of memory"}
    ]


def test_an_engine_that_fails_on_all_inputs_stops_the_run_and_keeps_completed_chunks(
    engine: Engine, tmp_path: Path
) -> None:
    broken: list[str] = []

    def fail(ids: Any) -> None:
        if broken:
            raise LfxError("ONNX Runtime failed: the device is lost")

    watch(engine, fail)
    reason = "the engine fails on every input: ONNX Runtime failed: the device is lost; completed documents are kept"
    with pytest.raises(LfxError, match=reason):
        run(engine, tmp_path, [{"input_ids": [3, 4]}] * 300, progress=broken.append)
    broken.clear()
    summary, rows = run(engine, tmp_path, [{"input_ids": [3, 4]}] * 300)
    assert (summary.resumed_at, summary.refused, len(rows)) == (256, 0, 300)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_interrupts_and_memory_errors_end_the_run(error: type[BaseException], engine: Engine, tmp_path: Path) -> None:
    def fail(ids: Any) -> None:
        raise error

    watch(engine, fail)
    with pytest.raises(error):
        run(engine, tmp_path, [{"input_ids": [3, 4]}])


def changed_tokenizer(folder: Path, bundle: Path, **changes: Any) -> Path:
    """A copy of a bundle's tokenizer with some parts replaced."""
    folder.mkdir()
    data = json.loads((bundle / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, **changes}))
    return folder


def test_a_document_that_the_tokenizer_panics_on_is_one_row(engine: Engine, bundle: MakeBundle, tmp_path: Path) -> None:
    single = json.loads((bundle(CLASSIFIER) / "tokenizer.json").read_text())["post_processor"]
    missing = {"SpecialToken": {"id": "<missing>", "type_id": 0}}  # of pairs only
    template = {**single, "pair": [missing, *single["pair"]]}
    tokenizer = Tokenizer(
        changed_tokenizer(tmp_path / "t", bundle(CLASSIFIER), post_processor=template), engine.signature
    )
    documents = [{"text": "fox"}, {"text": "fox", "pair": "dog"}, {"text": "dog"}]
    for stride in (None, 5):
        summary, rows = run(engine, tmp_path, documents, tokenizer, stride=stride)
        assert summary.refused == 1
        assert "the tokenizer fails on this text" in rows[1]["error"]
        assert "error" not in rows[0] | rows[2]


def test_a_document_with_no_tokens_is_one_row(engine: Engine, bundle: MakeBundle, tmp_path: Path) -> None:
    nothing = {"type": "Replace", "pattern": {"String": "fox"}, "content": ""}
    folder = changed_tokenizer(tmp_path / "t", bundle(CLASSIFIER), normalizer=nothing, post_processor=None)
    rows = run(engine, tmp_path, [{"text": "fox"}, {"text": "dog"}], Tokenizer(folder, engine.signature))[1]
    assert rows[0] == {"line": 1, "error": "the tokenizer has no tokens for this text; leave it out"}
    assert "error" not in rows[1]


def test_an_id_outside_the_models_vocabulary_is_named(engine: Engine, bundle: MakeBundle, tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"fox": 5, "dog": 1234}, "unk_token": "fox"}
    folder = changed_tokenizer(tmp_path / "t", bundle(CLASSIFIER), model=model)
    rows = run(engine, tmp_path, [{"text": "dog"}, {"text": "fox"}], Tokenizer(folder, engine.signature))[1]
    assert "id 1234, outside the vocabulary of 99; use the tokenizer that belongs to this model" in rows[0]["error"]
    assert "error" not in rows[1]


def test_an_answer_with_an_unknown_id_is_one_row_with_an_error(bundle: MakeBundle, tmp_path: Path) -> None:
    with Engine(bundle("fill-mask"), threads=1) as engine:
        tokenizer = Tokenizer(bundle("fill-mask"), engine.signature)
        infer = engine._backend.infer  # type: ignore[union-attr]

        def outside(feeds: Any, *names: Any, **options: Any) -> Any:
            outputs = infer(feeds, *names, **options)
            outputs["logits"][..., 98] += 1000.0 * (feeds["input_ids"] == 4)  # the tokenizer has no id 98
            return outputs

        engine._backend.infer = outside  # type: ignore[union-attr, method-assign]
        rows = run(engine, tmp_path, [{"text": "the <mask>"}, {"text": "fox"}], tokenizer)[1]
    assert rows[0]["error"].startswith("id 98 is not in the tokenizer's vocabulary")
    assert "error" not in rows[1]


def test_a_pair_beside_ids_is_refused(engine: Engine, tmp_path: Path) -> None:
    rows = run(engine, tmp_path, [{"input_ids": [3, 4], "pair": "the fox"}, {"input_ids": [3, 4], "pair": None}])[1]
    assert rows[0]["error"] == "the document has input_ids and pair; give the ids of both texts as input_ids"
    assert "error" not in rows[1]


def test_names_of_fields_are_shown_without_control_characters(engine: Engine, tmp_path: Path) -> None:
    rows = run(engine, tmp_path, [{"\x1b[31m\n": 1}])[1]
    assert rows[0]["error"] == r"the document has the fields \x1b[31m\n; give either text or input_ids"
