"""The output of `lfx map` lies in its input, directly or by a link, so that a job reads what it writes."""

from __future__ import annotations

from pathlib import Path

from lfx.ray import map_documents
from lfx.ray.engine import EngineOptions
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """Each is refused before Ray starts, and nothing is written."""
    documents = folder / "documents"
    (documents / "deeper").mkdir(parents=True)
    (documents / "a.jsonl").write_text('{"text": "the fox"}\n')
    (folder / "link").symlink_to(documents)
    options = EngineOptions(make_bundle(folder / "bundle", "text-classification"))
    for output in ("documents", "documents/rows", "documents/deeper/rows", "link/rows", "documents/../documents/rows"):
        refusal = refused(map_documents, documents, folder / output, options)
    refused(map_documents, documents / "a.jsonl", documents / "a.jsonl", options)
    assert sorted(path.name for path in documents.rglob("*")) == ["a.jsonl", "deeper"]
    return refusal
