"""A config.json names a kernel, a class and an adapter on the hub, and a module beside it, all of which are code."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.export import export
from lfx.export.load import load
from tests.models import save_tiny_checkpoint

CODE = {
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "attn_implementation": "someone/kernel",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "someone/repository--evil.Model"},
    "custom_pipelines": {"evil": {"impl": "evil.Pipeline"}},
    "experts_implementation": "someone/kernel",
}


def attack(folder: Path) -> str:
    """The model is loaded without them, and a bundle of it does not name them either."""
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    (checkpoint / "evil.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **CODE}))
    module, _ = load(str(checkpoint))
    assert getattr(module.config, "_attn_implementation") == "eager"  # noqa: B009  a private name
    bundle = export(checkpoint, folder / "bundle")
    written = json.loads((bundle / "config.json").read_text())
    assert not CODE.keys() & written.keys()
    assert not list(folder.rglob("ran")) and not list(bundle.rglob("*.py"))
    return "what names code in config.json is left out, and attention is eager"
