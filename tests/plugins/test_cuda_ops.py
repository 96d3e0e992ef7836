"""The custom ops on CUDA: in ONNX Runtime over the emulated kernels (fake_cuda.cpp), and the library that pip built."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lfx.errors import DependencyError
from lfx.export.validate import compare_engine
from lfx.parity import Case, quick_cases
from lfx.runtime import Engine, custom_ops
from lfx.runtime.backends import onnxruntime as backend
from tests.conftest import MakeBundle
from tests.models import tiny_model
from tests.plugins.build import built_once, fake_cuda_library
from tests.plugins.problems import Banded, Global, banded, global_
from tests.plugins.test_custom_ops import check, context, model, session

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
every_type = pytest.mark.parametrize("precision", TYPES)
CASES = [Case(1, 1), Case(2, 70, "scattered", "holes"), Case(3, 40, "ragged", "empty_row"), Case(2, 33, "all", "left")]


class FakeCuda:
    """The library of fake_cuda.cpp, and what its ops did since it was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._before = self._counts()

    def _counts(self) -> list[int]:
        counts = (ctypes.c_int32 * 4)()
        self._library.fakeCudaCounts(counts)
        return list(counts)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of events; `live` is that of allocations that were not freed."""
        names = ("allocations", "live", "launches", "other_streams")
        return {name: now - then for name, now, then in zip(names, self._counts(), self._before, strict=True)}

    def fail(self, error: int) -> None:
        """Make launches return an error; 0 = none."""
        self._library.fakeCudaFail(error)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """No scratch memory may be left after a test, and no launch may be on another stream than the context's."""
    fake = FakeCuda(built_once("fake-cuda", fake_cuda_library) / "libfake_cuda.so")
    yield fake
    fake.fail(0)
    assert fake.counts["live"] == fake.counts["other_streams"] == 0


def with_casts(problem: Banded | Global) -> bytes:
    """The model of a problem with float32 inputs and output, which it converts: numpy has no bfloat16."""
    proto = onnx.load_from_string(model(problem))
    graph = proto.graph
    casts = []
    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.INT32:
            casts.append(helper.make_node("Cast", [f"{value.name}_32"], [value.name], to=TYPES[problem.precision]))
            value.name, value.type.tensor_type.elem_type = f"{value.name}_32", TensorProto.FLOAT
    nodes = [*casts, *graph.node, helper.make_node("Cast", ["context"], ["context_32"], to=TensorProto.FLOAT)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output[0].name, graph.output[0].type.tensor_type.elem_type = "context_32", TensorProto.FLOAT
    return bytes(proto.SerializeToString())


def result(loaded: ort.InferenceSession, problem: Banded | Global) -> Any:
    """The context, by a session of `with_casts`."""
    feeds = {}
    for name, array in problem.inputs.items():
        is_float = array.dtype != np.int32
        feeds[f"{name}_32" if is_float else name] = array.astype(np.float32) if is_float else array
    return loaded.run(None, feeds)[0]


@every_type
def test_the_ops_compute_the_dense_definition(cuda: FakeCuda, precision: str) -> None:
    attributes: tuple[dict[str, int], ...] = ({}, {"dilation": 2}, {"causal": 1}, {})
    loaded = 0
    for case, more in zip(CASES, attributes, strict=True):
        problems: list[Banded | Global] = [
            banded(case, 2, 32, 9, precision=precision, **more),
            global_(case, 3, 2, 64, precision=precision),
            global_(case, 2, 1, 256, precision=precision),
        ]
        for problem in problems:
            output = result(session(with_casts(problem), cuda.path), problem)
            assert np.abs(output - problem.dense()).max() <= problem.tolerance(), (case, more)
            loaded += 1
    counts = cuda.counts
    assert counts["launches"] == loaded and counts["allocations"] == 2 * len(CASES)  # BandedAttention needs no memory


def test_the_output_has_the_shape_and_the_type_of_the_query(cuda: FakeCuda) -> None:
    problem = banded(Case(1, 20), 1, 16, 4, precision="fp16")
    (output,) = session(model(problem, width=16), cuda.path).get_outputs()
    assert (output.shape, output.type) == (["b", "s", 16], "tensor(float16)")


@pytest.mark.parametrize("name", ["key", "global_context"])
def test_inputs_of_two_types_are_refused_when_the_model_is_loaded(cuda: FakeCuda, name: str) -> None:
    proto = onnx.load_from_string(model(banded(Case(1, 20), 1, 16, 4)))
    next(value for value in proto.graph.input if value.name == name).type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(Exception, match="BandedAttention"):
        session(proto.SerializeToString(), cuda.path)


def test_float64_is_refused_when_the_model_is_loaded(cuda: FakeCuda) -> None:
    proto = onnx.load_from_string(model(banded(Case(1, 20), 1, 16, 4)))
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match="double"):
        session(proto.SerializeToString(), cuda.path)


def test_shapes_and_attributes_are_refused_by_name(cuda: FakeCuda) -> None:
    problem = banded(Case(2, 40, "first"), 2, 16, 8)
    loaded = session(model(problem), cuda.path)
    problem.inputs["key"] = problem.inputs["key"][:, :30]
    with pytest.raises(Exception, match=r"lfx::BandedAttention: the shapes do not fit together: query \(2, 40, 32\)"):
        context(loaded, problem)
    problem = banded(Case(2, 40, "first"), 2, 16, 8, causal=2)
    with pytest.raises(Exception, match="lfx::BandedAttention: causal must be 0 or 1"):
        session(model(problem), cuda.path)


def test_a_launch_that_fails_is_an_error_and_its_memory_is_freed(cuda: FakeCuda) -> None:
    problem = global_(Case(1, 40), 3, 2, 16)
    loaded = session(model(problem), cuda.path)
    cuda.fail(700)
    with pytest.raises(Exception, match="lfx::GlobalAttention: the kernel was not launched: CUDA error 700"):
        context(loaded, problem)
    assert cuda.counts == {"allocations": 1, "live": 0, "launches": 1, "other_streams": 0}
    cuda.fail(0)
    check(loaded, problem)


def test_threads_share_a_session(cuda: FakeCuda) -> None:
    problems = [global_(Case(1, seqlen), 3, 2, 16) for seqlen in (20, 33, 70, 130)]
    loaded = session(model(problems[0]), cuda.path)
    expected = [context(loaded, problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for i, output in enumerate(pool.map(lambda i: context(loaded, problems[i % 4]), range(16))):
            np.testing.assert_array_equal(output, expected[i % 4])


# ---- Engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_is_the_cpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Engine(provider="cuda") runs on the fake."""
    monkeypatch.setitem(backend.PROVIDERS, "cuda", "CPUExecutionProvider")
    of_cpu = custom_ops.library
    monkeypatch.setattr(custom_ops, "library", lambda provider="cpu": cuda.path if provider == "cuda" else of_cpu())
    return cuda


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_on_cuda_runs_the_kernels(bundle: MakeBundle, cuda_is_the_cpu: FakeCuda, precision: str) -> None:
    with Engine(bundle(precision=precision), provider="cuda") as engine:
        assert engine.kernels == "fused"
        report = compare_engine(engine, tiny_model(), quick_cases, lambda step: None)
    assert not report.failures()
    assert cuda_is_the_cpu.counts["launches"] > 0


def test_an_engine_on_cuda_runs_the_functions_on_request(bundle: MakeBundle, cuda_is_the_cpu: FakeCuda) -> None:
    with Engine(bundle(), provider="cuda", kernels="function") as engine:
        assert engine.kernels == "function"
        engine.run([5, 6, 7])
    assert cuda_is_the_cpu.counts["launches"] == 0


def test_an_engine_on_cuda_does_not_round_the_factors_of_float32_products(
    bundle: MakeBundle, cuda_is_the_cpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Session(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, *arguments: Any, providers: Any, **others: Any) -> None:
            asked.extend(providers)
            super().__init__(*arguments, providers=providers, **others)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    with Engine(bundle(), provider="cuda"):
        assert [settings["use_tf32"] for _, settings in asked] == ["0"]


def test_an_engine_on_cuda_says_that_there_is_no_library(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(custom_ops, "CUDA_LIBRARY", "libnone.so")
    with Engine(bundle(), provider="cuda") as engine:
        assert engine.kernels == "function"
    with pytest.raises(DependencyError, match=r"libnone.so is not installed; install lfx again where there is nvcc"):
        Engine(bundle(), provider="cuda", kernels="fused")


def test_an_engine_on_cuda_says_that_there_is_no_provider(bundle: MakeBundle) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(DependencyError, match=r"this onnxruntime .* has no CUDAExecutionProvider; install it") as e:
        Engine(bundle(), provider="cuda")
    assert "\n" not in str(e.value)


# ---- the library that pip built -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built() -> Path:
    """The library, where nvcc was on the PATH."""
    try:
        return custom_ops.library("cuda")
    except custom_ops.NoKernelError as error:
        pytest.skip(f"no CUDA library: {error}")


def test_it_registers_without_the_provider_and_says_what_is_missing(built: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    for precision in ("fp32", "fp16"):
        for problem in (banded(Case(1, 20), 1, 16, 4, precision=precision), global_(Case(1, 20), 2, 1, 16)):
            with pytest.raises(
                Exception,
                match=r"lfx::\w+Attention: this ONNX Runtime has no CUDAExecutionProvider; install onnxruntime-gpu, or",
            ) as raised:
                session(model(problem), built)
            assert custom_ops.refusal(raised.value)  # one line


def test_it_needs_only_the_libraries_of_its_compiler(built: Path) -> None:
    printed = subprocess.run(["readelf", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[([a-z_+-]+)[^\]]*\]", printed))
    assert needed <= {"libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x", "ld-linux-aarch"}, needed


def test_it_exports_what_is_documented(built: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(built)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[2] for line in printed.splitlines() if " T " in line] == [
        "RegisterCustomOps",
        "lfxBandedAttention",
        "lfxGlobalAttention",
        "lfxGlobalWorkspaceBytes",
    ]
