"""The checks for a GPU, as far as they go without one: models over emulated kernels, bundles on the CPU provider."""

from __future__ import annotations

import fcntl
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lfx.export
import lfx.torch
from lfx.parity import Case
from scripts import gpu_check, record
from scripts.bench import rivals, timing
from tests.models import tiny_model


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, on_cpu: None, launched: list[str]) -> list[str]:
    """Two cases, few slots, nothing compiled, and no check that needs a GPU; returns the launches."""
    monkeypatch.setattr(gpu_check, "SLOTS", 20)
    monkeypatch.setattr(gpu_check, "some_cases", lambda: [Case(2, 9, "first", "right"), Case(2, 20, "ragged")])
    monkeypatch.setattr(gpu_check, "refused", lambda library: {"passed": True, "cases": 1})
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: model)
    return launched


def changed(model: Any) -> Any:
    """The model with other weights in the value projection of a layer's attention."""
    weight = next(weight for name, weight in model.named_parameters() if name.endswith("value.weight"))
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=0))
    return model


def test_accelerated_models_on_the_emulated_kernels_are_the_definition(small: list[str], emulated_path: Path) -> None:
    rows = gpu_check.models(emulated_path)
    assert [row for row in rows if not row["passed"]] == []
    ways = [(row["op"], row["precision"], row["way"]) for row in rows]
    assert len(ways) == len(set(ways)) == 2 * 3 * 3 - 2 + 2
    assert {precision for op, precision, _ in ways if op == gpu_check.LED_ENCODER} == set(gpu_check.PRECISIONS)
    assert all(row["cases"] >= 1 and row["gpu"] for row in rows)
    assert set(small) == {"BandedParams", "GlobalParams"}


def test_models_with_other_weights_and_those_that_fail_do_not_pass(
    small: list[str], emulated_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = lfx.torch.accelerate
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(lfx.torch, "accelerate", lambda model, **options: accelerate(changed(model), **options))
    rows = gpu_check.models(emulated_path)
    assert [row["way"] for row in rows if row["passed"]] == ["too many global tokens"]

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the launch failed")

    monkeypatch.setattr(lfx.torch, "accelerate", accelerate)
    monkeypatch.setattr(gpu_check, "generated", lambda: {"passed": True})
    monkeypatch.setattr(timing, "capture", fails)
    rows = gpu_check.models(emulated_path)
    failed = [row for row in rows if not row["passed"]]
    assert [row["way"] for row in failed] == ["graph", "graph"]
    assert failed[0]["failures"] == ["RuntimeError: the launch failed"]


def test_a_graph_that_does_not_read_its_inputs_again_does_not_pass(
    small: list[str], emulated_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = timing.capture
    idle = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing, "capture", lambda run, sets: (idle, capture(run, sets)[1]))
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("fp32",))
    assert [row["way"] for row in gpu_check.models(emulated_path) if not row["passed"]] == ["graph", "graph"]


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "passed"),
    [
        (1, "", "RuntimeError: a row has more than max_global=2 global tokens", True),
        (1, "", "torch.AcceleratorError: CUDA error: device-side assert triggered", True),
        (0, "it returned", "", False),
        (0, "it returned", "device-side assert triggered", False),
        (1, "", "ModuleNotFoundError: No module named 'torch'", False),
    ],
)
def test_too_many_global_tokens_must_end_in_the_error_of_the_slots(
    code: int, stdout: str, stderr: str, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, stdout=stdout, stderr=stderr)
    )
    assert gpu_check.refused(Path("library.so"))["passed"] is passed


def test_bundles_run_with_and_without_the_custom_ops(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    rows = gpu_check.bundles("cpu", ["fp32"])
    assert [(row["way"], row["passed"], row["cases"]) for row in rows] == [("fused", True, 2), ("function", True, 2)]
    export = lfx.export.export
    monkeypatch.setattr(
        lfx.export, "export", lambda model, *given, **options: export(tiny_model(seed=1), *given, **options)
    )
    rows = gpu_check.bundles("cpu", ["fp32"])
    assert [row["passed"] for row in rows] == [False, False]
    assert all(row["failures"] for row in rows)


def test_without_the_cuda_provider_one_row_says_so(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "providers", lambda: ["CPUExecutionProvider"])
    (row,) = gpu_check.bundles()
    assert row["passed"]
    assert row["skipped"] == "no onnxruntime-gpu on this machine"


def test_checks_of_one_precision_keep_the_rows_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    shared = {"gpu": "H100", "commit": "abc", "op": "BandedAttention", "way": "launch"}
    old = [{**shared, "precision": "fp16", "cases": 1}, {**shared, "precision": "fp32", "gpu": "A100"}]
    assert gpu_check.kept(path, []) == []
    record.write(path, old)
    assert gpu_check.kept(path, [{**shared, "precision": "bf16"}]) == old[:1]
    assert gpu_check.kept(path, [{**shared, "precision": "fp16"}]) == []
    assert {precision for precision, _ in gpu_check.cases(["bf16"])} == {"bf16"}


def test_checks_side_by_side_keep_the_rows_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records" / "gpu.jsonl"
    kept, write = gpu_check.kept, record.write

    def while_locked(run: Any) -> Any:
        def checked(*given: Any) -> Any:
            with path.with_suffix(".lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return run(*given)

        return checked

    monkeypatch.setattr(gpu_check, "kept", while_locked(kept))
    monkeypatch.setattr(record, "write", while_locked(write))
    rows = [{"gpu": "H100", "commit": "abc", "op": "op", "way": str(i)} for i in range(20)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda row: gpu_check.write(path, [row], resume=True), rows))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(written, key=lambda row: int(row["way"])) == rows
    gpu_check.write(path, rows[:1], resume=False)
    assert json.loads(path.read_text()) == rows[0]
