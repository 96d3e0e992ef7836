"""A document has the key input_ids twice, so that a filter in front of lfx reads one and lfx the other."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from tests.attacks import make_bundle


def attack(folder: Path) -> str:
    """The document's row has an error and no outputs."""
    (folder / "in.jsonl").write_text('{"input_ids": [5], "input_ids": [6]}\n')
    with Engine(make_bundle(folder / "bundle")) as engine:
        run_documents(engine, None, folder / "in.jsonl", folder / "out.jsonl")
    return str(json.loads((folder / "out.jsonl").read_text())["error"])
