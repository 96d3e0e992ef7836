"""A folder holds a bundle and a program that is named as a module which lfx imports; lfx is started in that folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lfx.runtime.serve.supervisor import WORKER


def attack(folder: Path) -> str:
    """A worker process of the server imports the modules of the installation; it ends, as it is given no settings."""
    (folder / "json.py").write_text("open('ran', 'w')")
    done = subprocess.run(WORKER, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert not (folder / "ran").exists(), "the program was run"
    assert done.returncode == 1, done.stderr
    return "the program was not run"
