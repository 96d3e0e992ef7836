"""Reading and writing the benchmark records, and the description of the machine in each."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from lfx.machine import cpu_name, package_versions

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "records"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "numpy")


def environment() -> dict[str, Any]:
    """Return date, commit, hardware and versions of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "*.py") else ""),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": package_versions(_PACKAGES),
    }


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Replace the rows of the file `name`.jsonl, and return its path."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def update(name: str, row: dict[str, Any], key: tuple[str, ...]) -> Path:
    """Add `row` to the file `name`.jsonl, replacing a row with the same values of `key`, and sort the rows by `key`."""
    old = read(name) if (RECORDS / f"{name}.jsonl").exists() else []
    kept = [other for other in old if any(other.get(k) != row[k] for k in key)]
    return write(name, sorted([*kept, row], key=lambda item: tuple(item[k] for k in key)))


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of the file `name`.jsonl, in its order."""
    lines = (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip()
