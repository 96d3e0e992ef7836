"""`Engine(kernels=…)`: what runs attention, and the same answers from the kernels as from the function bodies."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lfx.cli import bench, inspect
from lfx.errors import DependencyError
from lfx.export.quantize import quantize
from lfx.export.validate import compare_engine
from lfx.parity import full_cases
from lfx.runtime import Engine, custom_ops
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import VOCAB_SIZE, tiny_model
from tests.runtime.spawned import last_hidden_state

pytestmark = pytest.mark.usefixtures("remembered_references")
RAGGED = [[5, 6, 7, 8], list(range(3, 40)), [9], [11] * 17]


def assert_close(outputs: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for name in expected:
        for array, other in zip(outputs[name], expected[name], strict=True):
            np.testing.assert_allclose(array, other, atol=tolerance, rtol=0)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """lfx as it is installed without a C++ compiler."""
    monkeypatch.setattr(custom_ops, "LIBRARIES", ("libnone.so",))


@pytest.mark.parametrize("kernels", ["auto", "fused", "function"])
def test_the_engine_says_what_runs_attention(bundle: MakeBundle, kernels: str) -> None:
    with Engine(bundle(), kernels=kernels) as engine:
        assert engine.kernels == ("function" if kernels == "function" else "fused")


@fast_if(lambda task, opset: (task, opset) == ("feature-extraction", 17))
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "question-answering", "multiple-choice"])
@pytest.mark.parametrize("kernels", ["fused", "function"])
def test_models_agree_with_pytorch(bundle: MakeBundle, task: str, opset: int, kernels: str) -> None:
    with Engine(bundle(task, opset=opset), kernels=kernels) as engine:
        report = compare_engine(engine, tiny_model(task), full_cases, lambda step: None)
    assert not report.failures()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_global": 5}, {"global_attention": "first"}, {"global_attention": "none"}])
def test_every_mode_of_export_has_kernels(bundle: MakeBundle, options: dict[str, Any]) -> None:
    with Engine(bundle(**options), kernels="fused") as engine:
        report = compare_engine(engine, tiny_model(), full_cases, lambda step: None)
    assert not report.failures()


@pytest.mark.slow
def test_attention_weights_are_those_of_their_own_functions(bundle: MakeBundle) -> None:
    folder = bundle(output_attentions=True)
    with Engine(folder, kernels="fused") as fused, Engine(folder, kernels="function") as function:
        assert_close(fused.run(RAGGED[1]), function.run(RAGGED[1]))


def test_int8_models_run_attention_in_kernels(bundle: MakeBundle, tmp_path: Path) -> None:
    documents = [list(range(3, 60)), list(range(10, 80))]
    lines = "".join(f'{{"input_ids": {ids}}}\n' for ids in documents)
    (tmp_path / "calibration.jsonl").write_text(lines)
    int8 = quantize(bundle("text-classification"), tmp_path / "int8", calibration=tmp_path / "calibration.jsonl")
    with Engine(int8) as fused, Engine(int8, kernels="function") as function:
        assert (fused.kernels, function.kernels) == ("fused", "function")
        assert_close(fused.run(documents[0]), function.run(documents[0]), 0.1)


@pytest.mark.parametrize(
    ("export", "options", "reason"),
    [
        (
            {},
            {"backend": "openvino"},
            "backend 'openvino' has none; choose backend 'onnxruntime', or leave kernels out",
        ),
        ({}, {"backend": "reference"}, "backend 'reference' has none"),
        ({"inline_functions": True}, {}, "the model's attention nodes are inlined; export it without"),
        ({"precision": "fp16"}, {}, "the model is fp16, for which the CPU has none; export it with --precision fp32"),
    ],
    ids=["openvino", "reference", "inlined", "fp16"],
)
def test_kernels_that_there_are_none_of_are_an_error_with_a_cure(
    own_bundle: MakeBundle, export: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    folder = own_bundle(**export)
    with pytest.raises(DependencyError, match=f"kernels is 'fused', and {reason}"):
        Engine(folder, kernels="fused", **options)
    with Engine(folder, **options) as engine:
        assert engine.kernels == "function"


def test_a_single_onnx_file_has_kernels_too(bundle: MakeBundle, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(bundle() / name, tmp_path / name)
    with Engine(tmp_path / "model.onnx", kernels="fused") as engine:
        assert engine.kernels == "fused"


def test_without_the_library_the_functions_run(bundle: MakeBundle, no_library: None) -> None:
    with Engine(bundle()) as engine:
        assert engine.kernels == "function"
    with pytest.raises(
        DependencyError, match=r"'fused', and libnone.so is not installed; install lfx again where there"
    ):
        Engine(bundle(), kernels="fused")


def test_a_library_that_cannot_be_loaded_is_named(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(custom_ops, "library", lambda provider: tmp_path / "broken.so")
    with Engine(bundle()) as engine:
        assert engine.kernels == "function"
    with pytest.raises(DependencyError, match=r"broken.so cannot be loaded .*; install lfx again on this machine"):
        Engine(bundle(), kernels="fused")


def test_a_node_that_the_kernel_refuses_runs_its_function(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LFX_CPU_INSTRUCTIONS", "mmx")  # an error that the op gives when the model is loaded
    with Engine(bundle()) as engine:
        assert engine.kernels == "function"
    assert "attention runs without lfx's kernels: there is no kernel for a node" in caplog.text
    assert "LFX_CPU_INSTRUCTIONS is 'mmx'; it must be baseline, avx2 or avx512" in caplog.text
    with pytest.raises(
        DependencyError, match=r"no kernel for a node \(lfx::\w+Attention: LFX_CPU_INSTRUCTIONS is 'mmx'"
    ):
        Engine(bundle(), kernels="fused")


def test_kernels_have_a_known_name(bundle: MakeBundle) -> None:
    with pytest.raises(DependencyError, match="kernels"):
        Engine(bundle(), kernels="cuda")


def test_a_pickled_engine_keeps_its_choice(bundle: MakeBundle) -> None:
    with Engine(bundle(), kernels="function") as engine, pickle.loads(pickle.dumps(engine)) as copy:
        assert copy.kernels == "function"
    with Engine(bundle(), kernels="fused") as engine, pickle.loads(pickle.dumps(engine)) as copy:
        assert copy.kernels == "fused"
        np.testing.assert_array_equal(*(e.run(RAGGED[1])["last_hidden_state"] for e in (engine, copy)))


def test_a_spawned_process_computes_the_same_bits(bundle: MakeBundle) -> None:
    arguments = (bundle(), RAGGED[1])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(last_hidden_state, arguments), last_hidden_state(*arguments))


def test_sequences_that_run_together_get_what_each_gets_alone(bundle: MakeBundle) -> None:
    with Engine(bundle(), kernels="fused") as engine:
        together = engine.run(RAGGED)
        for i, ids in enumerate(RAGGED):
            alone = engine.run(ids)
            assert_close({name: [together[name][i]] for name in alone}, alone)


def test_the_order_of_a_batch_changes_no_bit(bundle: MakeBundle) -> None:
    ids = np.random.default_rng(0).integers(3, VOCAB_SIZE, (4, 60))
    with Engine(bundle(), kernels="fused") as engine:
        forward, backward = engine.run(ids), engine.run(ids[::-1].copy())
    for name in forward:
        np.testing.assert_array_equal(forward[name], backward[name][::-1])


@pytest.mark.slow
def test_sixteen_threads_get_the_answers_of_one(bundle: MakeBundle) -> None:
    with Engine(bundle(), kernels="fused", threads=2) as engine:
        expected = [engine.run(ids)["last_hidden_state"] for ids in RAGGED]

        def hammer(first: int) -> None:
            for i in range(first, first + 100):
                output = engine.run(RAGGED[i % 4])["last_hidden_state"]
                np.testing.assert_array_equal(output, expected[i % 4])

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(hammer, range(16)))


@pytest.mark.full_size
@pytest.mark.slow
def test_sixteen_threads_on_five_engines_get_the_answers_of_one(bundle: MakeBundle) -> None:
    """Half of the threads share one Engine, and the others have one for two of them."""
    folder = bundle()
    random = np.random.default_rng(0)
    inputs = [random.integers(3, VOCAB_SIZE, (batch, seqlen)) for batch, seqlen in ((1, 1), (3, 17), (2, 64), (1, 120))]
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(folder, kernels="fused", threads=2)) for _ in range(5)]
        expected = [engines[0].run(ids)["last_hidden_state"] for ids in inputs]

        def hammer(number: int) -> None:
            engine = engines[0] if number < 8 else engines[1 + (number - 8) // 2]
            for i in range(number, number + 1000):
                actual = engine.run(inputs[i % len(inputs)])["last_hidden_state"]
                np.testing.assert_array_equal(actual, expected[i % len(inputs)])

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(hammer, range(16)))


def test_commands_show_what_runs_attention(bundle: MakeBundle, no_library: None) -> None:
    inspected = CliRunner().invoke(inspect.command, [str(bundle())]).output
    assert "function (libnone.so is not installed" in inspected


@pytest.mark.parametrize("kernels", ["fused", "function"])
def test_bench_records_the_kernels(bundle: MakeBundle, kernels: str) -> None:
    arguments = [str(bundle()), "--length", "16", "--rounds", "1", "--json", "--kernels", kernels]
    done = CliRunner().invoke(bench.command, arguments)
    assert f'"kernels": "{kernels}"' in done.stdout, done.output
    assert "fused kernels" in CliRunner().invoke(inspect.command, [str(bundle())]).output
