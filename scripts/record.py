"""Reading and writing the benchmark records, and the description of the machine in each."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lfx.machine import cpu_name, package_versions

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "records"
SOURCES = ("*.py", "*.c", "*.cpp", "*.cu", "*.cuh", "*.h", "*.txt")
# Names the commit of a copy whose git does not know it, such as one that was sent to a machine with a GPU.
COMMIT_VARIABLE = "LFX_COMMIT"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "numpy")


def environment() -> dict[str, Any]:
    """Return date, commit, CPU and versions of this run."""
    return {
        **_date_and_commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": package_versions(_PACKAGES),
    }


def gpu_environment(torch: Any) -> dict[str, Any]:
    """Return date, commit, GPU and versions of this run."""
    return {
        **_date_and_commit(),
        "gpu": query_gpu("name,driver_version") or torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "versions": package_versions(("triton", "transformers")),
    }


def query_gpu(fields: str) -> str:
    """Query fields of the first GPU with nvidia-smi; returns an empty string without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    lines = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


def write(name: str | Path, rows: list[dict[str, Any]]) -> Path:
    """Replace the rows of the file `name`.jsonl in docs/records, or of the file at a Path, and return its path."""
    path = name if isinstance(name, Path) else RECORDS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return unfinished.replace(path)


def update(name: str, row: dict[str, Any], key: tuple[str, ...]) -> Path:
    """Add `row` to the file `name`.jsonl, replacing a row with the same values of `key`, and sort the rows by `key`."""
    old = read(name) if (RECORDS / f"{name}.jsonl").exists() else []
    kept = [other for other in old if any(other.get(k) != row[k] for k in key)]
    return write(name, sorted([*kept, row], key=lambda item: tuple(item[k] for k in key)))


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of the file `name`.jsonl, in its order."""
    lines = (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _date_and_commit() -> dict[str, str]:
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *SOURCES)
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") + ("+" if changed else "")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": os.environ.get(COMMIT_VARIABLE) or commit,
    }


def _output(*command: str) -> str:
    """Run a command; returns what it prints, or an empty string if it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
