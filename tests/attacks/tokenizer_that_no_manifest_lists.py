"""A tokenizer and labels are put into a bundle, as links to files outside, and left out of its manifest."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.manifest import MANIFEST, sealed
from lfx.runtime import Engine
from lfx.runtime.text_files import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from lfx.runtime.tokenizer import Tokenizer
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """The bundle opens without them, and its tokenizer does not."""
    bundle, outside = make_bundle(folder / "bundle"), folder / "outside"
    outside.mkdir()
    data = json.loads((bundle / MANIFEST).read_text())
    for name in (TOKENIZER, CONFIG, TOKENIZER_CONFIG):
        del data["files"][name]
        (bundle / name).rename(outside / name)
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    refusal = ""
    with Engine(bundle) as engine:
        for name in (CONFIG, TOKENIZER_CONFIG, TOKENIZER):
            (bundle / name).symlink_to(outside / name)
            refusal = refused(Tokenizer, bundle, engine.signature)
    return refusal
