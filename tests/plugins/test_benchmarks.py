"""The GPU benchmarks, as far as they go without a GPU: cases, work, contenders' numbers, tables, verdicts, dry runs.

Every contender and the model around our ops run here on the CPU: the kernels as their own source on the emulated
machine, through the very lfx.torch that the benchmark captures.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import re
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lfx import reference
from lfx.errors import DependencyError
from lfx.torch import accelerate, kernels
from scripts.bench import band_cases, gpu, rivals, sass, timing
from scripts.bench import gpu_kernels as bench
from scripts.bench import gpu_model as whole
from scripts.bench.launch import Kernels
from tests.conftest import MakeOnce
from tests.marks import first_of_each
from tests.models import VOCAB_SIZE, tiny_model
from tests.plugins.build import ROOT

SMALL = band_cases.Case(seqlen=64, window=8, globals=2, batch=2, heads=2, precision="fp32", head_size=16)
CASES = [SMALL, replace(SMALL, globals=0), replace(SMALL, globals=20, seqlen=80), replace(SMALL, seqlen=16)]


def visible_of_the_reference(case: band_cases.Case) -> np.ndarray:
    """Which keys each query sees, read off lfx.reference: values are one-hot, so a context row is its weights."""
    size = case.seqlen
    index = np.arange(case.globals)[None] if case.globals else np.full((1, 1), -1)
    flat = np.zeros((1, size, size))
    actual = reference.banded_attention(
        flat,
        flat,
        np.eye(size)[None],
        np.ones((1, size)),
        index,
        np.zeros((1, index.shape[1], size)),
        num_heads=1,
        window=case.window,
    )
    return actual[0] > 0  # rows of global tokens are empty: they are given


def drawn(case: band_cases.Case, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """One buffer set of the benchmark."""
    torch.manual_seed(case.seqlen)
    return bench.buffer_sets(case, 0, "cpu", dtype)[0]


def dense(case: band_cases.Case, s: SimpleNamespace) -> torch.Tensor:
    """The local rows by lfx.reference, (batch, length - globals, width) float64."""
    slots = max(case.globals, 1)
    index = np.arange(slots) if case.globals else np.array([-1])
    arrays = [x.double().numpy() for x in (s.q, s.k, s.v)]
    actual = reference.banded_attention(
        *arrays,
        np.ones((case.batch, case.seqlen)),
        np.tile(index, (case.batch, 1)),
        np.zeros((case.batch, slots, arrays[0].shape[2])),
        num_heads=case.heads,
        window=case.window,
    )
    return torch.from_numpy(actual)[:, case.globals :]


def test_cases_are_those_of_the_claims_first_and_then_every_combination() -> None:
    all_cases, quick = band_cases.cases(), band_cases.cases(quick=True)
    assert len(all_cases) == len(set(all_cases)) == 7 * 2 * 2 * 3 * 2 * 2
    assert all_cases[: len(quick)] == quick
    assert all(case.required for case in quick)
    assert len(quick) == 4 * 2 * 2 * 2
    assert {case.seqlen for case in quick} == {4096, 8192, 16384, 32768}
    assert not any(case.required for case in all_cases[len(quick) :])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_useful_work_is_the_count_of_the_references_visible_pairs(case: band_cases.Case) -> None:
    pairs = int(visible_of_the_reference(case).sum())
    assert band_cases.useful_pairs(case) == pairs
    assert band_cases.useful_flops(case) == 4 * 16 * pairs * 2 * 2


def test_a_query_in_the_middle_sees_513_keys_and_the_global_one() -> None:
    case = band_cases.Case(4096, 256, 0, 1, 1, "fp16")
    assert band_cases.useful_pairs(case) == 4096 * 513 - 256 * 257
    assert band_cases.useful_pairs(replace(case, globals=1)) == 4096 * 513 - 256 * 257 - 257 + (4096 - 257)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mask_function_is_the_references_visible_mask(case: band_cases.Case) -> None:
    at = torch.arange(case.seqlen)
    actual = bench.visible(case, at, at)[case.globals :]
    assert np.array_equal(actual.numpy(), visible_of_the_reference(case)[case.globals :])


def test_kernel_costs_are_those_of_the_readme() -> None:
    case = band_cases.Case(32768, 256, 1, 1, 12, "fp16")
    computed = band_cases.kernel_costs(case)["computed_over_useful"] * band_cases.useful_pairs(case)
    assert computed / case.seqlen == pytest.approx(560, rel=0.01)


def test_floors_follow_the_published_rates() -> None:
    case = band_cases.Case(4096, 256, 1, 8, 12, "fp16")
    actual = band_cases.floors(case, band_cases.Peaks(1e15, 1e12, 1e12, 1e13))
    assert actual["arithmetic_us"] == pytest.approx(band_cases.useful_flops(case) / 1e9)
    assert actual["bytes_us"] == pytest.approx(band_cases.least_bytes(case) / 1e6)
    assert band_cases.least_bytes(case) == pytest.approx(4 * 8 * 4096 * 768 * 2, rel=0.01)
    assert actual["exponentials_us"] == pytest.approx(actual["arithmetic_us"] * 1000 / 256)


def test_the_floors_in_the_readme_are_those_of_the_function() -> None:
    readme = (ROOT / "plugins" / "README.md").read_text()
    peaks = band_cases.PEAKS["NVIDIA H100 80GB HBM3"]
    rows = re.findall(r"^\| (8|1) \| ([\d,]+) \| (.*) \|$", readme, re.MULTILINE)
    assert len(rows) == 4
    for batch, tokens, figures in rows:
        actual = band_cases.floors(band_cases.Case(int(tokens.replace(",", "")), 256, 1, int(batch), 12, "fp16"), peaks)
        assert figures == " | ".join(f"{value:.1f}" for value in actual.values())


def contender(name: str, case: band_cases.Case, kernels: Kernels) -> Any:
    """run(s) of a contender, on the CPU."""
    return {
        "plain": lambda: lambda s: bench.plain(case, s.q, s.k, s.v, block=32),
        "lfx": lambda: bench.lfx(case, kernels, "cpu", torch.float32)[0],
        "flex": lambda: bench.flex(case, "cpu"),
        "sdpa": lambda: bench.sdpa(case, "cpu", torch.float32),
        "huggingface": lambda: bench.huggingface(case, "cpu"),
    }[name]()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["plain", "lfx", "flex", "sdpa", "huggingface"])
def test_every_contender_computes_the_references_rows(name: str, case: band_cases.Case, emulated: Kernels) -> None:
    s = drawn(case)
    with torch.no_grad():
        actual = bench.flattened(contender(name, case, emulated)(s))
    assert actual.shape == s.q.shape
    assert (
        bench._error(actual, torch.cat([actual[:, : case.globals].double(), dense(case, s)], 1), slice(0, None)) < 1e-5
    )


def test_ours_keeps_the_given_global_rows_and_sees_two_precisions(emulated: Kernels) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        s = drawn(SMALL, dtype)
        run, given = bench.lfx(SMALL, emulated, "cpu", dtype)
        out = run(s)
        assert torch.equal(out[:, : SMALL.globals], given)
        exact = bench.plain(SMALL, s.q.double(), s.k.double(), s.v.double())
        local = slice(SMALL.globals, None)
        witness = bench._error(bench.plain(SMALL, s.q, s.k, s.v), exact, local)
        assert bench._error(out, exact, local) <= 2 * witness


def test_an_error_that_is_no_number_is_infinite() -> None:
    assert bench._error(torch.full((1, 2, 3), float("nan")), torch.zeros(1, 2, 3), slice(0, None)) == float("inf")


def test_a_tensor_that_is_not_contiguous_is_refused(emulated: Kernels) -> None:
    s = drawn(SMALL)
    run, _ = bench.lfx(SMALL, emulated, "cpu", torch.float32)
    s.k = s.k.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="key is not contiguous"):
        run(s)


def test_packed_rows_need_no_copy_and_change_no_bit(emulated: Kernels) -> None:
    for dtype in (torch.float32, torch.float16):
        s = drawn(SMALL, dtype)
        run, _ = bench.lfx(SMALL, emulated, "cpu", dtype)
        expected = run(s).clone()
        s.q, s.k, s.v = torch.cat([s.q, s.k, s.v], dim=2).chunk(3, dim=2)
        s.out = torch.full((*expected.shape[:2], 40), float("nan"), dtype=dtype)[:, :, : expected.shape[2]]
        assert torch.equal(run(s), expected)
    with pytest.raises(ValueError, match="key is not contiguous"):
        s.k = torch.empty(2, 64, 33)[:, :, :32]
        run(s)


def model_inputs(globals_: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and masks, (2, 48): `globals_` tokens in front."""
    torch.manual_seed(globals_)
    ids = torch.randint(3, VOCAB_SIZE, (2, 48))
    mask, marks = torch.ones_like(ids), torch.zeros_like(ids)
    marks[:, :globals_] = 1
    return ids, mask, marks


def test_the_model_around_flex_attention_gives_hugging_faces_numbers() -> None:
    model = tiny_model()
    inputs = model_inputs(2)
    masks = {
        window: create_block_mask(band_cases.band_or_global(window, 2), None, None, 48, 48, device="cpu")
        for window in (4, 8)
    }
    with torch.no_grad():
        expected = whole.eager(model, *inputs)
        actual = whole.Whole(model, whole.FlexAttention, 2, block_masks=masks)(*inputs)
    assert (actual[0] - expected[0]).abs().max() < 1e-5


def test_compiled_layers_keep_our_ops_whole_and_share_one_compilation(
    emulated_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = kernels.CudaKernels(emulated_path)
    monkeypatch.setattr(kernels, "_installed", lambda: fused)
    model = tiny_model(attention_window=[16, 16])
    inputs = model_inputs(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = whole.eager(model, *inputs)[0]
        compiled = whole.compile_layers(accelerate(copy.deepcopy(model), max_global=1), backend="aot_eager")
        actual = whole.eager(compiled, *inputs)[0]
    assert (actual - expected).abs().max() < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert sorted(launched) == ["BandedParams"] * 2 + ["GlobalParams"] * 2  # in each layer


def test_a_captured_graph_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights and inputs, a replay would read the memory of other tensors."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replayed: list[str] = []
    graph = SimpleNamespace(replay=lambda: replayed.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    weights, given = torch.ones(2), torch.ones(2)
    alive = {"weights": weakref.ref(weights), "given": weakref.ref(given)}
    captured, outputs = timing.capture(functools.partial(torch.add, weights), iter([given]))
    del weights, given
    gc.collect()
    assert [name for name, ref in alive.items() if ref() is None] == []
    captured.replay()
    assert replayed == ["replay"]
    assert torch.equal(outputs[0], torch.full((2,), 2.0))
    del captured
    gc.collect()
    assert [name for name, ref in alive.items() if ref() is not None] == []  # nothing else kept them


def test_contenders_take_turns_with_the_cache_emptied_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 0.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    racing = {name: timing.Contender(lambda name=name: done.append(name), calls=5) for name in "ab"}
    actual = timing.interleaved(racing, 2, lambda: done.append("flush"))
    assert done == ["flush", "event", "a", "event", "flush", "event", "b", "event"] * 2
    assert actual == {"a": [100.0, 100.0], "b": [100.0, 100.0]}
    on_host = timing.interleaved({"c": timing.Contender(lambda: None, on_host=True)}, 3, lambda: None)
    assert len(on_host["c"]) == 3
    assert all(0 < t < 1e6 for t in on_host["c"])


def invented(case: band_cases.Case, us: float, flex: float, error: float = 1e-4) -> dict[str, Any]:
    """A row as `measure` makes it, the product at 800 TFLOP/s and the copy at 3 TB/s."""

    def timed(median: float, **more: Any) -> dict[str, Any]:
        spread = {"median_us": median, "p5_us": median, "p95_us": median}
        return {"max_error": error, **spread, "times_slower": median / us, **more}

    contenders = {
        "lfx": timed(us, global_rows_kept=True, all_written=True),
        "flex": timed(flex),
        "flex-64": timed(2 * flex),
        "sdpa": {"skipped": "too large"},
        "huggingface": {"failed": "OutOfMemoryError"},
        "matmul": timed(2 * 8192**3 / 800e12 * 1e6),
        "copy": timed(2 * bench.COPY_BYTES / 3e12 * 1e6),
    }
    return {**bench.asdict(case), "witness_error": 1e-4, "contenders": contenders}


REQUIRED = band_cases.Case(4096, 256, 1, 8, 12, "fp16")


def test_rates_and_table_say_what_the_rows_say() -> None:
    row = invented(REQUIRED, us=100.0, flex=140.0)
    actual = bench.rates(row)
    assert actual["tflops"] == pytest.approx(band_cases.useful_flops(REQUIRED) / 1e-4 / 1e12)
    assert actual["of_matmul"] == pytest.approx(actual["tflops"] / 800)
    assert actual["of_copy"] == pytest.approx(band_cases.least_bytes(REQUIRED) / 1e-4 / 3e12)
    assert actual["of_ceiling"] == max(actual["of_matmul"], actual["of_copy"])
    assert actual["band_of_matmul"] < actual["of_matmul"]  # no credit for the global key
    header, rule, line = bench.table([row]).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    assert "| yes | 100.0 (100.0-100.0) |" in line
    assert "| 1.40x | 2.80x | skipped | failed |" in line


def test_verdicts_hold_fail_and_stay_open() -> None:
    good = invented(REQUIRED, us=100.0, flex=140.0)
    assert [v["holds"] for v in bench.verdicts([good])] == [True, True, True, None]
    slow = invented(replace(REQUIRED, seqlen=8192), us=300.0, flex=350.0)
    right, flex, share, flash = bench.verdicts([good, slow])
    assert flash["holds"] is None
    good["contenders"]["flex-flash"] = {"times_slower": 0.99}
    assert bench.verdicts([good, slow])[3]["holds"] is False
    good["contenders"]["flex-flash"] = {"times_slower": 1.01}
    assert bench.verdicts([good, slow])[3]["holds"] is True
    assert right["holds"]
    assert not flex["holds"]
    assert flex["figure"].startswith("1.17 times")
    assert flex["worst"] == share["worst"] == str(replace(REQUIRED, seqlen=8192))
    assert not share["holds"]
    others = [invented(replace(REQUIRED, window=64), us=100.0, flex=100.0)]
    assert [v["holds"] for v in bench.verdicts(others)] == [True, None, None, None]
    assert [v["holds"] for v in bench.verdicts([])] == [None, None, None, None]


def test_wrong_missing_and_failed_results_are_reported() -> None:
    wrong = invented(REQUIRED, us=100.0, flex=140.0, error=2.1e-4)
    unwritten = invented(REQUIRED, us=100.0, flex=140.0)
    unwritten["contenders"]["lfx"]["all_written"] = False
    failed = invented(REQUIRED, us=100.0, flex=140.0)
    failed["contenders"]["lfx"] = {"failed": "RuntimeError: the launch failed"}
    for row in (wrong, unwritten, failed):
        assert not bench.passed(row)
        assert bench.verdicts([row])[0]["holds"] is False
        assert "| NO |" in bench.table([row])


def test_contenders_are_skipped_by_stated_bytes() -> None:
    assert set(bench.skipped(band_cases.Case(512, 256, 1, 1, 12, "fp16"))) == {"flex-64"}
    assert "huggingface" in bench.skipped(band_cases.Case(16384, 256, 1, 8, 12, "fp16"))
    assert "2.1 GB" in bench.skipped(band_cases.Case(32768, 256, 1, 1, 12, "fp16"))["sdpa"]


def model_row(seqlen: int, milliseconds: dict[str, float], error: float = 1e-3) -> dict[str, Any]:
    """A row of the model's benchmark."""
    timed = {
        name: {"max_error": error, "median_us": 1e3 * ms, "p5_us": 1e3 * ms, "p95_us": 1e3 * ms}
        for name, ms in milliseconds.items()
    }
    return {"seqlen": seqlen, "batch": 1, "witness_error": 1e-3, "contenders": timed}


def test_the_models_verdicts_take_the_fastest_of_ours_that_is_right() -> None:
    row = model_row(4096, {"lfx": 2.9, "lfx-eager": 3.5, "huggingface": 20.0})
    right, at_4096, at_16384 = whole.verdicts([row])
    assert right["holds"]
    assert at_4096["holds"]
    assert at_4096["figure"] == "2.90 ms (lfx)"
    assert at_16384["holds"] is None
    row["contenders"]["lfx"]["max_error"] = 1.0
    right, at_4096, _ = whole.verdicts([row])
    assert right["holds"] is False
    assert at_4096["figure"] == "3.50 ms (lfx-eager)"
    assert at_4096["holds"] is False
    assert "2.90 (2.90-2.90) WRONG" in whole.table([row])


def test_the_models_shapes_are_those_of_the_claims_first() -> None:
    assert whole.SHAPES[:2] == [(4096, 1), (16384, 1)]
    assert len(whole.SHAPES) == len(set(whole.SHAPES)) == 12


def test_straight_runs_of_machine_code() -> None:
    lines = ["MOV R1, R2", "LDS R3, [R1]", "@P0 BRA 0x10", "HMMA.16816.F32 R0, R1, R2, R3", "@!P1 BRA 0x0", "EXIT"]
    code = "".join(f"        /*{16 * i:04x}*/    {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))
    assert sass.straight_runs(code) == [["MOV"], ["LDS", "BRA"], ["HMMA", "BRA"], ["EXIT"]]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated: Kernels, on_cpu: None) -> Path:
    """Both scripts run as on a GPU, on the CPU: graphs are functions called again, events a clock that stands still."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "require", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(bench, "Kernels", lambda path: emulated)
    for module in (bench, whole):
        monkeypatch.setattr(module, "MOST_ROUNDS", 5)
    monkeypatch.setattr(bench, "MATMUL", 32)
    monkeypatch.setattr(bench, "COPY_BYTES", 64)
    return tmp_path / "records" / "record.jsonl"


@pytest.mark.parametrize("precision", first_of_each(["fp16", "bf16"]))
def test_the_kernels_benchmark_from_its_cases_to_its_record(no_gpu: Path, precision: str) -> None:
    small = [replace(case, precision=precision) for case in CASES[:3]]
    # flex-64 runs only where a claim is about the case; the tiny ones get its reason instead.
    rows = bench.run(Path("none"), small, time.monotonic() + 600, no_gpu)
    assert [bench.case_of(row) for row in rows] == small
    assert all(map(bench.passed, rows)), bench.table(rows)
    for row in rows:
        for name in ("lfx", "flex", "sdpa", "huggingface", "matmul", "copy"):
            assert row["contenders"][name].get("median_us", 0) > 0, (name, row["contenders"][name])
        assert row["contenders"]["lfx"]["times_slower"] == 1.0
        assert row["floors"]["bytes_us"] > 0
    written = [json.loads(line) for line in no_gpu.read_text().splitlines()]
    assert written == json.loads(json.dumps(rows + bench.verdicts(rows)))
    assert bench.table(rows).count("| yes |") == len(rows)
    assert bench.run(Path("none"), small, time.monotonic() - 1, no_gpu) == []  # the time is over


def test_a_contender_that_fails_does_not_end_the_run(no_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel of this name")

    monkeypatch.setattr(bench, "flex", fails)
    (row,) = bench.run(Path("none"), [replace(SMALL, precision="fp16")], time.monotonic() + 600, no_gpu)
    assert row["contenders"]["flex"] == {"failed": "RuntimeError: no kernel of this name"}
    assert row["passed"]
    monkeypatch.setattr(bench, "lfx", lambda *_: (fails, torch.zeros(2, 2, 32)))
    (row,) = bench.run(Path("none"), [replace(SMALL, precision="fp16")], time.monotonic() + 600, no_gpu)
    assert not row["passed"]
    assert "| NO | RuntimeError: no kernel of this name |" in bench.table([row])


def test_the_models_benchmark_from_its_shapes_to_its_record(
    no_gpu: Path, emulated_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "base_model", lambda max_seqlen: tiny_model(attention_window=[16, 16]))
    monkeypatch.setattr(whole, "WINDOW", 8)
    monkeypatch.setattr(whole, "inputs_of", tiny_inputs)
    monkeypatch.setattr(whole, "compile_layers", lambda made: made)
    monkeypatch.setattr(whole, "LIMITS_MS", {(48, 2): 3.0})
    monkeypatch.setattr(whole, "compile_model", lambda model: model)
    monkeypatch.setattr(whole, "compile_flex", lambda: flex_attention)
    monkeypatch.setattr(whole.importlib.util, "find_spec", lambda name: None)  # no TensorRT
    rows = whole.run(emulated_path, [(48, 2), (32, 1)], time.monotonic() + 600, no_gpu, True, no_gpu.parent)
    for row in rows:
        for name in ("lfx", "lfx-eager", "lfx-calls", "flex", "flex-eager", "huggingface", "huggingface-compiled"):
            assert row["contenders"][name].get("median_us", 0) > 0, (name, row["contenders"][name])
            assert whole.is_right(row, name)
    assert set(launched) == {"BandedParams", "GlobalParams"}
    assert "--compile-all" in whole.skipped(compile_all=False)["huggingface-compiled"]
    assert [verdict["holds"] for verdict in whole.verdicts(rows)] == [True, True]
    assert len(no_gpu.read_text().splitlines()) == 2 + 2
    assert "WRONG" not in whole.table(rows)


def test_the_contender_in_onnx_runtime_runs_our_custom_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU provider in float32; a provider and a precision without kernels are skipped with the reason."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(whole.timing, "DEVICE", "cpu")
    model = tiny_model()
    inputs = model_inputs(1)
    contender, out = whole.onnxruntime(model, inputs, tmp_path, "cpu", "fp32")
    with torch.no_grad():
        expected = whole.by_row(model, inputs)
    assert contender.on_host
    assert (out - expected).abs().max() < 1e-5
    (tmp_path / "base-fp16").symlink_to(tmp_path / "base-fp32")
    with pytest.raises(DependencyError, match=r"kernels is 'fused'|no CUDAExecutionProvider"):
        whole.onnxruntime(model, inputs, tmp_path)
    if "CUDAExecutionProvider" not in rivals.providers():
        assert whole.skipped(compile_all=True)["lfx-onnxruntime"] == "onnxruntime-gpu is not installed"


def tiny_inputs(seqlen: int, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids that the tiny model has, with one global token in front."""
    ids = torch.randint(3, VOCAB_SIZE, (batch, seqlen))
    marks = torch.zeros_like(ids)
    marks[:, :1] = 1
    return ids, torch.ones_like(ids), marks


@pytest.fixture(scope="module")
def built(made_once: MakeOnce) -> Path:
    """The library, as the scripts build it."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    return made_once("benchmark-library", lambda folder: gpu.build(folder, None, "sm_90")) / "liblfx_plugins.so"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu_kernels", "gpu_model"])
def test_a_dry_run_lists_everything_and_stops(script: str, built: Path, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    command = [sys.executable, "-m", f"scripts.bench.{script}", "--dry-run", "--library", str(built)]
    done = subprocess.run([*command, "--record", str(path)], check=True, capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1]
    count = len(band_cases.cases()) if script == "gpu_kernels" else len(whole.SHAPES)
    assert last.startswith(f"dry run: {count} ")
    assert last.endswith("nothing was run on a GPU")
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("script", first_of_each(["gpu_kernels", "gpu_model"]))
def test_without_a_gpu_and_without_dry_run_they_say_so(script: str, tmp_path: Path) -> None:
    """Before they look for the library."""
    command = [sys.executable, "-m", f"scripts.bench.{script}", "--library", str(tmp_path / "no.so")]
    command += ["--record", str(tmp_path / "record.jsonl")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "PyTorch sees no NVIDIA GPU; --dry-run shows" in done.stderr
    assert list(tmp_path.iterdir()) == []
