"""`Engine.embed`, and sentence embeddings in `lfx run`: texts in, vectors out, nothing truncated unasked."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lfx.cli.run import run_text
from lfx.errors import ArtifactError, InputError
from lfx.manifest import MANIFEST, Manifest, sha256
from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.text_files import PROMPTS
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle

TASK = "sentence-embedding"
TEXTS = ["the quick brown fox", "dog", "the lazy dog jumps over the quick brown fox " * 3, "fox fox"]
LONG = "the quick brown fox jumps over the lazy dog " * 20


class DataFrame:
    """Two axes and an iterator over the names of the columns, as pandas' has."""

    ndim = 2

    def __iter__(self) -> Iterator[str]:
        yield "text"


@pytest.fixture
def engine(bundle: MakeBundle) -> Iterator[Engine]:
    """Sentence embeddings: normalized means."""
    with Engine(bundle(TASK), threads=1) as opened:
        yield opened


@pytest.fixture
def prompted(bundle: MakeBundle, tmp_path: Path) -> Path:
    """A bundle whose checkpoint puts a prompt before each text."""
    folder = shutil.copytree(bundle(TASK), tmp_path / "prompted")
    prompts = {"query": "quick ", "document": "lazy "}
    (folder / PROMPTS).write_text(json.dumps({"prompts": prompts, "default_prompt_name": "query"}))
    Manifest.read(folder).write(folder)
    return folder


def test_each_text_gets_the_vector_that_it_gets_alone(engine: Engine, bundle: MakeBundle) -> None:
    vectors = engine.embed(TEXTS)
    assert (vectors.dtype, vectors.shape) == (np.float32, (4, 32))
    tokenizer = Tokenizer(bundle(TASK), engine.signature)
    for text, vector in zip(TEXTS, vectors, strict=True):
        expected = engine.run(tokenizer.encode(text).ids)["sentence_embedding"]
        np.testing.assert_allclose(vector, expected[0], atol=1e-6)
        np.testing.assert_allclose(engine.embed(text), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("make", [tuple, iter, lambda texts: np.array(texts, dtype=object)])
def test_any_iterable_of_texts_is_taken(make: Any, engine: Engine) -> None:
    assert np.array_equal(engine.embed(make(TEXTS)), engine.embed(TEXTS))


def test_a_string_of_numpy_is_one_text(engine: Engine) -> None:
    assert np.array_equal(engine.embed(np.str_("the fox")), engine.embed("the fox"))


def test_no_texts_give_no_vectors(engine: Engine) -> None:
    assert engine.embed([]).shape == (0, 32)


def test_a_long_text_is_refused_or_cut_to_its_beginning_if_asked(engine: Engine, bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match=r"text 1: the text has \d+ tokens, above the model's maximum 128"):
        engine.embed(["fox", LONG])
    ids = Tokenizer(bundle(TASK), engine.signature)._tokenize(LONG, None, None).ids
    cut = engine.run([*ids[:127], ids[-1]])["sentence_embedding"]
    np.testing.assert_allclose(engine.embed(["fox", LONG], truncate=True)[1], cut[0], atol=1e-6)
    assert np.array_equal(engine.embed(TEXTS, truncate=True), engine.embed(TEXTS))


@pytest.mark.parametrize(
    ("texts", "options", "reason"),
    [
        (5, {}, "texts is int; give a list of strings"),
        (b"fox", {}, "texts is bytes"),
        ({"fox": 1}, {}, "texts is dict"),
        (np.array("fox"), {}, "texts is ndarray"),
        (DataFrame(), {}, "texts is DataFrame; give a list of strings"),
        (["fox", 5], {}, "text 1: text and pair are int"),
        (["fox", ["dog"]], {}, "text 1: text and pair are list"),
        (["\ud800"], {}, "text 0: the text is not UTF-8"),
        (["fox"], {"prompt": 5}, "prompt is int"),
        (["fox"], {"truncate": 1}, "truncate"),
        (["fox"], {"tokenizer": "bundle"}, "tokenizer is str; give a Tokenizer"),
    ],
)
def test_what_is_no_text_is_refused(texts: Any, options: dict[str, Any], reason: str, engine: Engine) -> None:
    with pytest.raises(InputError, match=reason):
        engine.embed(texts, **options)
    assert engine.metrics.snapshot().failed == 1


def test_a_model_of_another_task_is_refused(bundle: MakeBundle) -> None:
    reason = "task sentence-embedding, and this one is for text-classification"
    with Engine(bundle("text-classification")) as engine, pytest.raises(InputError, match=reason):
        engine.embed(TEXTS)


def test_a_closed_engine_is_refused(bundle: MakeBundle) -> None:
    engine = Engine(bundle(TASK))
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.embed(TEXTS)


def test_a_bundle_without_a_tokenizer_takes_one(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle(TASK), tmp_path / "copy")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    Manifest.read(folder).write(folder)
    with Engine(bundle(TASK)) as original, Engine(folder) as engine:
        with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
            engine.embed(TEXTS)
        tokenizer = Tokenizer(bundle(TASK), engine.signature)
        assert np.array_equal(engine.embed(TEXTS, tokenizer=tokenizer), original.embed(TEXTS))


def test_a_plan_finds_the_tokenizer_of_its_bundle(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle(TASK), tmp_path / "b")
    with Engine(folder) as engine:
        expected = engine.embed(TEXTS)
    with Engine(folder) as engine:  # a plan's Engine has this path and this manifest
        engine.path = tmp_path / "b.plan"
        recorded: Any = SimpleNamespace(bundle={"name": "b", "sha256": sha256(folder / MANIFEST)})
        engine.manifest = recorded
        assert np.array_equal(engine.embed(TEXTS), expected)


def test_threads_and_a_pickled_engine_give_the_same_vectors(engine: Engine) -> None:
    expected = engine.embed(TEXTS)
    with Engine(engine.path, threads=1) as fresh, ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(vectors, expected) for vectors in pool.map(fresh.embed, [TEXTS] * 16))
        assert fresh.metrics.snapshot().requests == 16
    assert np.array_equal(pickle.loads(pickle.dumps(engine)).embed(TEXTS), expected)


def test_the_default_prompt_is_put_before_each_text_unless_another_is_given(engine: Engine, prompted: Path) -> None:
    with Engine(prompted, threads=1) as opened:
        assert np.array_equal(opened.embed(TEXTS), engine.embed([f"quick {text}" for text in TEXTS]))
        assert np.array_equal(opened.embed(TEXTS, prompt="lazy "), engine.embed([f"lazy {text}" for text in TEXTS]))
        assert np.array_equal(opened.embed(TEXTS, prompt=""), engine.embed(TEXTS))
        assert Tokenizer(prompted, opened.signature).sha256 != Tokenizer(engine.path, opened.signature).sha256


def test_an_enum_of_strings_is_the_text_that_is_its_value(engine: Engine, prompted: Path) -> None:
    class Word(str, Enum):  # noqa: UP042  a StrEnum is formatted as its value
        FOX = "the fox"
        LAZY = "lazy "

    with Engine(prompted, threads=1) as opened:
        assert np.array_equal(opened.embed([Word.FOX]), engine.embed(["quick the fox"]))
        assert np.array_equal(opened.embed([Word.FOX], prompt=Word.LAZY), engine.embed(["lazy the fox"]))
        for folder in (prompted, engine.path):
            tokenizer = Tokenizer(folder, opened.signature)
            assert tokenizer.token_texts(Word.FOX) == tokenizer.token_texts("the fox")


@pytest.mark.parametrize("prompts", [{}, {"a": "b"}, None])
def test_the_prompts_query_and_document_are_empty_unless_given(prompts: Any, engine: Engine, prompted: Path) -> None:
    (prompted / PROMPTS).write_text(json.dumps({"prompts": prompts, "default_prompt_name": "document"}))
    Manifest.read(prompted).write(prompted)
    with Engine(prompted, threads=1) as opened:
        assert np.array_equal(opened.embed(TEXTS), engine.embed(TEXTS))


def test_a_long_text_is_cut_to_its_end_if_the_tokenizer_truncates_on_the_left(
    engine: Engine, bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle(TASK), tmp_path / "left")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    Manifest.read(folder).write(folder)
    theirs = AutoTokenizer.from_pretrained(folder)(LONG, truncation=True, max_length=128).input_ids
    with Engine(folder, threads=1) as opened:
        assert Tokenizer(folder, opened.signature).truncate(LONG).ids == theirs
        np.testing.assert_allclose(
            opened.embed(LONG, truncate=True), engine.run(theirs)["sentence_embedding"], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("settings", [{"default_prompt_name": "none"}, {"default_prompt_name": 5}, {"prompts": 5}, []])
def test_a_broken_prompt_is_an_artifact_error(settings: Any, prompted: Path) -> None:
    settings = settings and {"prompts": {"a": 5}, "default_prompt_name": "a", **settings}
    with Engine(prompted) as engine:
        (prompted / PROMPTS).write_text(json.dumps(settings))
        with pytest.raises(ArtifactError, match="was changed after the export"):
            engine.embed(TEXTS)
    Manifest.read(prompted).write(prompted)
    with Engine(prompted) as engine, pytest.raises(ArtifactError, match=PROMPTS):
        engine.embed(TEXTS)


def test_run_prints_the_vector_of_a_text(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    expected = engine.embed("the fox")
    for as_json in (False, True):
        run_text(engine, engine.path, "the fox", (), None, None, tokenizer=None, as_json=as_json)
    *lines, printed = capsys.readouterr().out.splitlines()
    first = ", ".join(f"{value:.4f}" for value in expected[0, :4])
    assert lines[1] == f"sentence_embedding: shape (1, 32), first values {first}"
    np.testing.assert_allclose(json.loads(printed)["outputs"]["sentence_embedding"]["values"], expected)


def test_documents_get_a_list_column(engine: Engine, bundle: MakeBundle, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = Tokenizer(bundle(TASK), engine.signature)
    for name in ("out.parquet", "out.jsonl"):
        assert run_documents(engine, tokenizer, tmp_path / "in.jsonl", tmp_path / name).refused == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    column = table.column("outputs").combine_chunks().field("sentence_embedding")
    assert str(column.type) == "list<element: double>"
    np.testing.assert_allclose(np.stack(column.to_pylist()), engine.embed(TEXTS), atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["outputs"]["sentence_embedding"] for row in rows] == column.to_pylist()
