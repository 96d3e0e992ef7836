"""The files of a bundle's tokenizer, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import tiny_tokenizer

LABELS = {"0": "bad", "1": "good", "2": "so-so"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that Tokenizer reads."""
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": LABELS}))
    return tmp_path
