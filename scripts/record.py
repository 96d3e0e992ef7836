"""What every benchmark record carries, and how it is written to its JSONL file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from lfx.config import package_versions

RECORDS = Path(__file__).resolve().parent.parent / "docs" / "records"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "numpy")


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "*.py") else ""),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": package_versions(_PACKAGES),
    }


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Make `rows` the content of the file `name`.jsonl, and return its path."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def update(name: str, row: dict[str, Any], key: tuple[str, ...]) -> Path:
    """Put `row` into the file `name`.jsonl, in the place of the row with the same values under `key`."""
    old = read(name) if (RECORDS / f"{name}.jsonl").exists() else []
    kept = [other for other in old if any(other.get(k) != row[k] for k in key)]
    return write(name, sorted([*kept, row], key=lambda found: tuple(found[k] for k in key)))


def read(name: str) -> list[dict[str, Any]]:
    """The records of a file, oldest first."""
    lines = (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RECORDS.parent)
    return found.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in named.get("flags", "").split()]
    return f"{named.get('model name', platform.processor())} ({', '.join(flags) or 'no vector flags'})"
