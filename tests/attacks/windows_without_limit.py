"""One document and a stride of one token ask for a window at every token."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.tokenizer import Tokenizer
from tests.attacks import make_bundle


def attack(folder: Path) -> str:
    """The document is refused in its row, and the run continues."""
    lines = [{"text": "fox " * 20_000}, {"text": "the fox"}]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bundle = make_bundle(folder / "bundle")
    with Engine(bundle) as engine:
        summary = run_documents(
            engine, Tokenizer(bundle, engine.signature), folder / "in.jsonl", folder / "out.jsonl", stride=1
        )
    assert (summary.documents, summary.refused) == (2, 1)
    refusal, answer = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert "outputs" in answer
    return str(refusal["error"])
