"""A short run of scripts/bench/generation.py, and its table."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from scripts import record
from scripts.bench import generation
from tests.conftest import MakeLed
from tests.models import VOCAB_SIZE


def test_a_short_run_measures_float32_int8_and_hugging_face(
    led_bundle: MakeLed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, folder, path = led_bundle()[1], tmp_path / "work", tmp_path / "generation.jsonl"
    shutil.copytree(bundle, folder / "bundle")
    (folder / "checkpoint").symlink_to(bundle.parent / "checkpoint")
    setup = generation.Setup((16, 40), 3, {"vocab_size": VOCAB_SIZE})
    monkeypatch.setattr(generation, "SETUPS", {"tiny": setup})
    monkeypatch.setattr(generation, "CALIBRATION", {"documents": 2, "tokens": 20, "new_tokens": 3})
    monkeypatch.setattr(generation, "peak_memory", lambda *arguments: 3_000_000)
    without = ("--without", "lfx openvino", "--threads", "1")
    command = ["generation", "--tiny", *without, "--rounds", "1", "--folder", str(folder), "--output", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    generation.main()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    contenders = ["lfx onnxruntime", "lfx onnxruntime int8", "Hugging Face"]
    assert [(row["seqlen"], row["contender"]) for row in rows] == [(n, name) for n in (16, 40) for name in contenders]
    assert [row["precision"] for row in rows] == 2 * ["fp32", "int8", "fp32"]
    assert rows[0]["model"] == rows[2]["model"] != rows[1]["model"]

    made = (folder / "bundle-int8" / "lfx.json").read_bytes()
    generation.main()
    assert (folder / "bundle-int8" / "lfx.json").read_bytes() == made  # used as it is

    capsys.readouterr()
    generation.print_peak("lfx onnxruntime int8", folder, setup, 16, 1)
    assert json.loads(capsys.readouterr().out)["peak_memory_bytes"] > 0

    monkeypatch.syspath_prepend(Path(record.__file__).parent)  # where tables.py is run
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables.record, "RECORDS", tmp_path)
    assert "| 40 | lfx onnxruntime int8 | " in tables.generation()
    assert "random weights, fp32 unless the row says int8, batch 1, 3 new tokens" in tables.generation()
