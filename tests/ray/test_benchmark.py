"""A short run of scripts/bench/ray_map.py, and its table and figure."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from scripts import figures, record

pytest.importorskip("ray")


@pytest.mark.slow
def test_a_short_run_has_the_rows_of_lfx_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ray.jsonl"
    options = ["--documents", "300", "--rounds", "1", "--output", str(path)]
    command = [sys.executable, "-m", "scripts.bench.ray_map", *options]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    (row,) = (json.loads(line) for line in path.read_text().splitlines())
    assert [pool["actors"] for pool in row["pools"]] == [1, 2, 4]
    assert all(pool["same_rows"] for pool in (*row["pools"], row["killed"]))
    assert row["killed"]["killed_at_seconds"] > 0

    monkeypatch.syspath_prepend(Path(record.__file__).parent)  # where tables.py is run
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables.record, "RECORDS", tmp_path)
    assert "| 2 actors, one killed after" in tables.ray()
    monkeypatch.setattr(figures, "RAY_RECORD", path)
    figure = figures.ray()
    figure.savefig(tmp_path / "ray.svg")
    plt.close(figure)
