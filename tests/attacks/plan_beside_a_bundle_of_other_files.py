"""A plan lies beside its bundle, which lists a program or a secret, so that `lfx triton` copies it to a repository."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfx.manifest import MANIFEST, sealed, sha256
from lfx.runtime.triton.repository import Settings, write_model
from tests.attacks import make_bundle, refused
from tests.runtime.backends.test_tensorrt import MANIFEST as PLAN_MANIFEST
from tests.runtime.backends.test_tensorrt import write_plan


def attack(folder: Path) -> str:
    """Paths out of the bundle and other content are refused, and Python files are not copied."""
    (folder / "model.py").write_text("raise SystemExit")
    (folder / "secret.json").write_text('{"password": 1}')

    secret = folder / "secret.json"
    entry = {"sha256": sha256(secret), "bytes": secret.stat().st_size}
    forms: list[tuple[dict[str, Any], Callable[[Path], Any]]] = [
        ({"../secret.json": entry}, lambda config: None),
        ({str(secret): entry}, lambda config: None),
        ({}, lambda config: (config.unlink(), config.symlink_to(secret))),
        ({}, lambda config: (config.unlink(), os.mkfifo(config))),
    ]
    refusal = ""
    for i, (files, change) in enumerate(forms):
        bundle = make_bundle(folder / f"bundle{i}")
        change(bundle / "config.json")
        refusal = refused(write_model, _plan(bundle, files), folder / "models", Settings(name="m"))
        assert not list((folder / "models").iterdir())
    bundle = make_bundle(folder / "triton_python_backend_utils")  # which the server's Python imports
    (bundle / "__init__.py").write_text("raise SystemExit")
    entries = {name: {"sha256": sha256(bundle / name), "bytes": 16} for name in ("../model.py", "__init__.py")}
    written = write_model(_plan(bundle, entries), folder / "models", Settings(name="m"))
    assert {path.name for path in written.folder.rglob("*.py")} == {"model.py"}
    assert "TritonPythonModel" in (written.folder / "1" / "model.py").read_text()
    return refusal


def _plan(bundle: Path, files: dict[str, Any]) -> Path:
    """Add entries to the manifest of a bundle, and write a plan that was made from it."""
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(sealed({**data, "files": {**data["files"], **files}})))
    source = {"name": bundle.name, "sha256": sha256(bundle / MANIFEST)}
    return write_plan(bundle.parent, replace(PLAN_MANIFEST, bundle=source))
