"""Fixtures for the tests of the command line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import Done, Forked, forked_commands
from tests.models import save_tiny_checkpoint, tiny_tokenizer

LABELS = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Commands in copies of a process that has imported torch."""
    with forked_commands() as opened:
        yield opened


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the checkpoint `checkpoints/tiny-reviews`."""
    workspace = tmp_path_factory.mktemp("cli")
    folder = save_tiny_checkpoint(workspace / "checkpoints" / "tiny-reviews", "text-classification", **LABELS)
    tiny_tokenizer().save_pretrained(folder)
    return workspace


@pytest.fixture(scope="module")
def exported(workspace: Path, forked: Forked) -> Done:
    """The export of that checkpoint, with --json."""
    return forked.run(["export", "--model", "checkpoints/tiny-reviews", "--json"], workspace)


@pytest.fixture(scope="module")
def reviews(exported: Done, workspace: Path) -> Path:
    """The exported bundle."""
    assert exported.code == 0, exported.stderr
    return workspace / "tiny-reviews"


@pytest.fixture
def copy(reviews: Path, tmp_path: Path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(reviews, tmp_path / "copy"))
