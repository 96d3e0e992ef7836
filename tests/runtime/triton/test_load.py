"""The load tests of scripts/bench, for a second, on a tiny model; and that their records become a table and a chart."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from scripts import figures, record
from scripts.bench import serve, triton
from tests.conftest import MakeBundle

TEXTS = ["the quick brown fox", "the fox", "jumps over the lazy dog " * 8]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "load"), [("serve", serve.load), ("triton", triton.load)])
def test_a_short_load_test_has_answers_equal_to_one_by_one_runs(
    name: str, load: serve.Load, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = serve.measure(bundle("text-classification"), TEXTS, 3, 1.0, 1, load)
    assert row["statuses"] == {"200": row["answered"]}
    assert row["answered"] >= 3
    assert row["broken_connections"] == 0
    assert row["largest_difference"] < 1e-5
    assert len(row["resident_bytes"]) == 10
    assert min(row["resident_bytes"]) > 10_000_000
    assert 0 < row["client_share_of_cpu"] < 1

    rows: list[dict[str, Any]] = [{**record.environment(), **row, "clients": clients} for clients in (1, 3)]
    record.write(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.syspath_prepend(Path(record.__file__).parent)  # where tables.py is run
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables.record, "RECORDS", tmp_path)
    table = getattr(tables, name)()
    assert f"| 3 | {row['answered']:,} |" in table
    assert f"figures/{name}.png" in table
    figures.load_test(rows, name, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
