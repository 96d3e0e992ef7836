"""One server of several models, for the tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import MakeBundle
from tests.runtime.serve.running import Running, running

TASKS = {
    "cls": "text-classification",
    "emb": "sentence-embedding",
    "qa": "question-answering",
    "choice": "multiple-choice",
    "ner": "token-classification",
    "mask": "fill-mask",
    "org/bare": "feature-extraction",
}


@pytest.fixture(scope="module")
def server(bundle: MakeBundle) -> Iterator[Running]:
    """A server of a model for each task."""
    with running({name: bundle(task) for name, task in TASKS.items()}) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    """A client of `server`."""
    with server.client() as opened:
        yield opened
