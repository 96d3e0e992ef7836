"""all-MiniLM-L6-v2, converted to 4,096 tokens: questions find the document that answers them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lfx.export import convert, export
from lfx.export.quantize import quantize
from lfx.parity import pair_tolerance
from lfx.runtime import Engine
from lfx.runtime.tokenizer import Tokenizer
from scripts.constitution import FEDERALIST, FEDERALIST_QUESTIONS, QUESTIONS, articles, essay
from scripts.demo import packaged_model

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="the trained model is not installed: pip install 'longformer-lfx[demo]'"
)
pytestmark = pytest.mark.slow
LAYERS = 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted and exported model."""
    folder = tmp_path_factory.mktemp("trained")
    convert(packaged_model(), folder / "checkpoint", max_seqlen=4096)
    return export(folder / "checkpoint", folder / "bundle")


@pytest.fixture(scope="module")
def original() -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(packaged_model(), device="cpu")


def right_answers(engine: Engine, questions: dict[str, str], texts: dict[str, str]) -> list[str]:
    """The questions whose nearest document is the right one."""
    names = list(texts)
    nearest = (engine.embed(list(questions)) @ engine.embed(texts.values()).T).argmax(axis=1)
    return [question for question, i in zip(questions, nearest, strict=True) if names[i] == questions[question]]


def same(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """Whether two float32 computations of the model differ by rounding only."""
    largest = float(np.abs(expected).max())
    return float(np.abs(actual - expected).max()) <= pair_tolerance("fp32", LAYERS, largest)


def test_short_texts_have_the_embeddings_of_sentence_transformers(bundle: Path, original: object) -> None:
    texts = [*QUESTIONS, *(text[:900] for text in articles().values()), "a"]
    with Engine(bundle) as engine:
        assert same(engine.embed(texts), original.encode(texts))  # type: ignore[attr-defined]


def test_every_question_finds_its_document(bundle: Path) -> None:
    questions = {**QUESTIONS, **FEDERALIST_QUESTIONS}
    with Engine(bundle) as engine:
        assert right_answers(engine, questions, {**articles(), FEDERALIST: essay()}) == list(questions)


def test_every_question_finds_its_article_in_int8(bundle: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "articles.txt"
    calibration.write_text("\n\n".join(articles().values()))
    with Engine(quantize(bundle, tmp_path / "int8", calibration=calibration)) as engine:
        assert right_answers(engine, QUESTIONS, articles()) == list(QUESTIONS)


def test_the_essay_is_one_document_of_several_thousand_tokens(bundle: Path) -> None:
    with Engine(bundle) as engine:
        tokens = len(Tokenizer(bundle, engine.signature).encode(essay()).ids)
    assert 3_000 < tokens <= 4_096
    assert essay().startswith("THE FEDERALIST, No. 10\n")
    assert essay().endswith("\nPUBLIUS\n")
