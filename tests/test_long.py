"""scripts/bench/long.py: its references are the dense one, and it measures and compares what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfx.export.torch_runners import reference_runner
from scripts import record
from scripts.bench import long
from scripts.bench.long_reference import OUTPUT, compare_rows, layer_rows, reference_of, slice_rows

SETUP = long.Setup(**{**vars(long.TINY), "lengths": (200, 300), "window": 8, "rows": 5})


def dense(model: Any, ids: Any, global_positions: Any = ()) -> Any:
    """The output of the dense float64 reference, all rows."""
    mask = np.zeros_like(ids)
    mask[0, list(global_positions)] = 1
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "global_attention_mask": mask}
    return reference_runner(model)(inputs)[OUTPUT]


def test_a_row_depends_on_the_tokens_within_the_reach_of_all_layers() -> None:
    model, ids = SETUP.model(SETUP.layers), SETUP.ids(200)
    expected, reach = dense(model, ids), SETUP.layers * SETUP.window
    for rows in SETUP.slices(200).values():
        actual = slice_rows(reference_of(model), ids, rows)[OUTPUT]
        np.testing.assert_allclose(actual, expected[:, rows.start : rows.stop], rtol=0, atol=1e-12)
        witnessed = slice_rows(model, ids, rows)[OUTPUT]
        np.testing.assert_allclose(witnessed, actual, rtol=0, atol=1e-5)
    rows = SETUP.slices(200)["inner"]
    for distance, changes in ((reach, True), (reach + 1, False)):
        changed = ids.copy()
        changed[0, rows.start - distance] += 1
        different = np.abs(dense(model, changed)[:, rows.start] - expected[:, rows.start]).max() > 0
        assert different == changes


def test_rows_of_one_layer_are_those_of_the_dense_reference() -> None:
    ids, positions, rows = SETUP.ids(300), SETUP.global_positions(300), SETUP.layer_rows(300)
    assert set(positions) <= set(rows)
    expected = dense(SETUP.model(1), ids, positions)[:, rows]
    actual = layer_rows(SETUP.model(1), ids, positions, rows, torch.float64)[OUTPUT]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_the_rows_of_one_layer_lie_around_the_ends_of_blocks_and_of_the_sequence() -> None:
    rows = set(long.Setup().layer_rows(16384))
    assert {0, 1, 126, 127, 128, 129, 255, 256, 257, 8191, 8192, 16382, 16383} <= rows
    assert max(rows) < 16384


def test_a_wrong_row_is_out_of_tolerance() -> None:
    rows = {OUTPUT: np.linspace(-1, 1, 40).reshape(1, 5, 8)}
    actual = rows[OUTPUT].astype(np.float32)
    assert compare_rows(rows, {OUTPUT: actual}, actual, 2)["passed"]
    actual[0, 3] += 1e-4
    assert not compare_rows(rows, {OUTPUT: rows[OUTPUT]}, actual, 2)["passed"]


@pytest.mark.slow
def test_the_script_writes_a_row_for_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(module: str, *flags: str, **options: Any) -> dict[str, Any]:
        parsed = long.parser().parse_args([*flags, *(f"--{key}={value}" for key, value in options.items())])
        return long.child(parsed, long.setup_of(parsed))

    monkeypatch.setattr(long, "run_child", in_this_process)
    output = tmp_path / "long.jsonl"
    long.main(["--tiny", "--lengths=256,1024", "--threads=1", f"--output={output}"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["seqlen"] for row in rows] == [256, 1024]
    for row in rows:
        assert [(check["model"], check["place"]) for check in row["checks"]] == [
            ("whole", "first"),
            ("whole", "inner"),
            ("whole", "last"),
            ("one layer", "all over"),
        ]
        assert all(check["passed"] and check["rows"] >= 16 for check in row["checks"])
        assert row["median_ms"] > 0
        assert 0 < row["open_bytes"] <= row["peak_bytes"]


def test_time_and_memory_of_the_record_grow_with_the_length() -> None:
    rows = {row["seqlen"]: row for row in record.read("long")}
    assert set(rows) >= {16384, 32768, 65536}
    assert all(check["passed"] for row in rows.values() for check in row["checks"])
    for figure in ("median_ms", "peak_bytes"):
        assert rows[65536][figure] <= 4.5 * rows[16384][figure], figure
