"""A label of a model holds terminal controls and markup, which `lfx run` would carry out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lfx.manifest import Manifest
from tests.attacks import make_bundle


def attack(folder: Path) -> str:
    """One label clears the screen, another is rich's markup: neither takes effect."""
    bundle = make_bundle(folder / "bundle", "text-classification")
    config = json.loads((bundle / "config.json").read_text())
    config["id2label"] = {"0": "\x1b[2Jgone", "1": "[/b][u]ax"}
    (bundle / "config.json").write_text(json.dumps(config))
    Manifest.read(bundle).write(bundle)
    command = [sys.executable, "-m", "lfx.cli", "run", str(bundle), "--text", "the fox"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\x1b[2J" not in done.stdout
    assert "[/b][u]ax" in done.stdout
    (shown,) = [line for line in done.stdout.splitlines() if "gone" in line]
    return shown.strip()
