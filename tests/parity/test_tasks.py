"""End to end: all tasks, opsets and precisions against PyTorch, over the full cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lfx.export.validate import compare_engine
from lfx.parity import Case, Report, full_cases
from lfx.runtime import Engine
from lfx.signature import TASKS
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import WINDOW, tiny_model

pytestmark = pytest.mark.usefixtures("remembered_references")
# A chosen bound, not derived; the measured errors are about a hundred times smaller.
LARGEST_FP32_ERROR = 1e-4


def _compare(folder: Path, task: str, backend: str = "auto", **changes: object) -> Report:
    with Engine(folder, backend) as engine:
        return compare_engine(engine, tiny_model(task, **changes), full_cases, lambda step: None)


@fast_if(lambda task, opset: (task, opset) == ("feature-extraction", 17))
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_agrees_with_pytorch_in_fp32(bundle: MakeBundle, task: str, opset: int) -> None:
    report = _compare(bundle(task, opset=opset), task)
    assert not report.failures()
    assert len(report.rows) >= 60
    for name, result in report.outputs.items():
        assert result.error <= LARGEST_FP32_ERROR, f"{name} at {result.worst}"


@fast_if(lambda task: task == "text-classification")
@pytest.mark.parametrize("task", ["feature-extraction", "fill-mask", "text-classification"])
def test_fp16_is_within_the_derived_tolerance(bundle: MakeBundle, task: str) -> None:
    assert not _compare(bundle(task, precision="fp16"), task).failures()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "reference"])
def test_bf16_is_within_the_derived_tolerance(bundle: MakeBundle, backend: str) -> None:
    report = _compare(bundle(precision="bf16"), "feature-extraction", backend)
    assert not report.failures()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_global": 5}, {"global_attention": "first"}, {"inline_functions": True}])
def test_every_mode_of_export_agrees_with_pytorch(bundle: MakeBundle, options: dict[str, object]) -> None:
    report = _compare(bundle(**options), "feature-extraction")
    assert not report.failures()
    assert max(result.error for result in report.outputs.values()) <= LARGEST_FP32_ERROR


def test_full_cases_have_all_lengths_around_the_window() -> None:
    cases = full_cases(WINDOW, 128)
    lengths = {case.seqlen for case in cases}
    window = 2 * WINDOW
    for boundary in (WINDOW, window):
        assert {boundary - 1, boundary, boundary + 1} <= lengths
    assert {1, 2 * window + 1, 3 * window} <= lengths
    assert Case(1, 1) in cases


def test_a_longer_batch_does_not_change_its_rows(bundle: MakeBundle) -> None:
    """The outputs of a row do not depend on the other rows of its batch."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 99, size).tolist() for size in (1, 5, 16, 17, 40, 100)]
    marks = [[int(i % 7 == 0) for i in range(len(row))] for row in rows]
    with Engine(bundle(opset=17)) as engine:
        together = engine.run(rows, global_attention_mask=marks)["last_hidden_state"]
        for row, mark, actual in zip(rows, marks, together, strict=True):
            alone = engine.run(row, global_attention_mask=mark)["last_hidden_state"][0]
            np.testing.assert_allclose(actual, alone, atol=1e-5)
