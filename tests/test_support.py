"""scripts/support.py and its record: a row for each model class and feature, and a reason for what does not work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfx.errors import ExportError
from lfx.export.families import FAMILIES
from lfx.signature import OPSETS, PRECISIONS, QUANTIZED, TASKS
from scripts import record, support

CELLS = ("exported", "onnxruntime", "openvino", "function", "plugin")


def test_the_record_has_all_rows_in_the_order_of_the_script() -> None:
    assert [row["name"] for row in record.read("support")] == list(support.rows())


def test_every_task_family_opset_and_precision_has_a_row() -> None:
    names = " ".join(support.rows())
    for task in TASKS.values():
        assert task.architecture in names
    for family in FAMILIES.values():
        assert f"{family.prefix}Model, converted" in names
    for name in ("opset 17", f"opset {OPSETS[1]}", QUANTIZED, *(p for p in PRECISIONS if p != "fp32")):
        assert name in names


@pytest.mark.parametrize("row", record.read("support"), ids=lambda row: row["name"])
def test_every_cell_is_of_a_run(row: dict[str, dict[str, object]]) -> None:
    assert row["exported"]["ok"], row["exported"]["reason"]
    for name in CELLS:
        assert row[name]["ok"] or row[name]["reason"], name
    for name in ("onnxruntime", "openvino"):
        if row[name]["ok"]:
            assert row[name]["cases"] > 0
            assert row[name]["error"] <= row[name]["tolerance"]
    if row["plugin"]["ok"]:
        assert row["plugin"]["plugin_layers"] == row["plugin"]["attention_nodes"]


def test_a_model_that_cannot_be_exported_has_the_reason_and_no_other_cell(tmp_path: Path) -> None:
    def refused(folder: Path) -> Path:
        (folder / "empty").mkdir()
        return folder / "empty"

    result = support.measure(support.Row("model class", refused), tmp_path)
    assert list(result) == ["exported"]
    assert not result["exported"]["ok"]
    assert "config.json" in result["exported"]["reason"]


def test_a_model_that_cannot_be_made_has_the_reason(tmp_path: Path) -> None:
    def failing(folder: Path) -> Path:
        raise ExportError("no such model")

    assert support.measure(support.Row("model class", failing), tmp_path) == {
        "exported": {"ok": False, "reason": "no such model"}
    }
