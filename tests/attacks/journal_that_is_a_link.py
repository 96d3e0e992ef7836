"""The journal of a run over documents is a link to another file, which would be overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """A symbolic link, and then a hard link."""
    (folder / "in.jsonl").write_text(json.dumps({"input_ids": [5, 6]}) + "\n")
    victim, journal = folder / "victim", folder / ".out.jsonl.partial"
    victim.write_text("precious")
    refusal = ""
    with Engine(make_bundle(folder / "bundle")) as engine:
        for link in (os.symlink, os.link):
            link(victim, journal)
            refusal = refused(run_documents, engine, None, folder / "in.jsonl", folder / "out.jsonl")
            assert victim.read_text() == "precious"
            journal.unlink()
    return refusal
