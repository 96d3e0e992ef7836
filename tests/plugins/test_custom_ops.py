"""The library of custom ops in plain ONNX Runtime: one node with its function, against the dense definition."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lfx.export import functions
from lfx.parity import Case, full_cases
from lfx.runtime import custom_ops
from tests.marks import fast_where
from tests.plugins.problems import Banded, Global, banded, global_

WINDOW = 8
SETS = ("baseline", "avx2", "avx512")
CASES = full_cases(WINDOW, None)


@pytest.fixture(scope="session")
def ops_library() -> Path:
    """The library that pip built; the README asks for the C++ compiler that it takes."""
    return custom_ops.library()


def model(problem: Banded | Global, opset: int = 17, inside_if: bool = False, width: int | str = "w") -> bytes:
    """A model of one attention node and its function; with `inside_if` the node is in both branches of an If."""
    op = "BandedAttention" if isinstance(problem, Banded) else "GlobalAttention"
    inputs = []
    for name, array in problem.inputs.items():
        data_type = TensorProto.INT32 if array.dtype == np.int32 else helper.np_dtype_to_tensor_dtype(array.dtype)
        axes = ["b", "g" if name.startswith("global") or (name == "query" and op[0] == "G") else "s", width]
        inputs.append(helper.make_tensor_value_info(name, data_type, axes[: array.ndim]))
    float_type = inputs[0].type.tensor_type.elem_type
    attributes = problem.attributes
    nodes = [helper.make_node(op, list(problem.inputs), ["context"], "attention", domain="lfx", **attributes)]
    output = helper.make_tensor_value_info("context", float_type, None)
    if inside_if:
        inputs.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
        branches = {f"{name}_branch": helper.make_graph(nodes, name, [], [output]) for name in ("then", "else")}
        nodes = [helper.make_node("If", ["condition"], ["context"], **branches)]
    proto = helper.make_model(
        helper.make_graph(nodes, op, inputs, [output]),
        functions=[ir.to_proto(functions.function(body, opset)) for body in functions.OPS],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("lfx", 1)],
        ir_version=10,
    )
    return bytes(proto.SerializeToString())


def session(model: bytes, library: Path | None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def context(loaded: ort.InferenceSession, problem: Banded | Global, **more: Any) -> Any:
    return loaded.run(None, {**problem.inputs, **more})[0]


def check(loaded: ort.InferenceSession, problem: Banded | Global, **more: Any) -> None:
    error = np.abs(context(loaded, problem, **more).astype(np.float64) - problem.dense()).max()
    assert error <= problem.tolerance(), problem.inputs["query"].shape


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_banded_attention_is_the_dense_definition(ops_library: Path, dilation: int, causal: int, opset: int) -> None:
    first = banded(CASES[0], 2, 16, WINDOW, dilation=dilation, causal=causal)
    loaded = session(model(first, opset), ops_library, threads=2)
    for case in CASES:
        check(loaded, banded(case, 2, 16, WINDOW, dilation=dilation, causal=causal))


@pytest.mark.parametrize("seqlen", fast_where([1, 255, 256, 257, 129, 1134], lambda seqlen: seqlen < 1000))
def test_the_base_shape(ops_library: Path, seqlen: int) -> None:
    case = Case(1, seqlen, "scattered", "right")
    problem = banded(case, 12, 64, 256)
    check(session(model(problem), ops_library, threads=2), problem)
    folded = global_(case, 24, 1, 768)
    check(session(model(folded), ops_library, threads=2), folded)


@pytest.mark.parametrize("instructions", SETS)
def test_the_environment_names_the_instruction_set(
    ops_library: Path, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFX_CPU_INSTRUCTIONS", instructions)
    for problem in (
        banded(Case(2, 150, "ragged", "holes"), 2, 32, 20),
        global_(Case(2, 600, padding="left"), 5, 2, 16),
    ):
        try:
            loaded = session(model(problem), ops_library)
        except Exception as error:
            assert re.search(
                f"LFX_CPU_INSTRUCTIONS is '{instructions}'; it must be baseline, avx2 or avx512", str(error)
            )
            pytest.skip(f"this CPU has no {instructions}")
        check(loaded, problem)


def test_an_unknown_instruction_set_is_refused(ops_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFX_CPU_INSTRUCTIONS", "mmx")
    with pytest.raises(Exception, match="LFX_CPU_INSTRUCTIONS is 'mmx'; it must be baseline, avx2 or avx512"):
        session(model(banded(Case(1, 8), 1, 8, 2)), ops_library)


def test_a_node_inside_if_runs_the_kernel(ops_library: Path) -> None:
    for problem in (banded(Case(2, 90, "first", "left"), 2, 16, 8), global_(Case(2, 90), 5, 2, 16)):
        loaded = session(model(problem, inside_if=True), ops_library)
        for condition in (True, False):
            check(loaded, problem, condition=np.array(condition))


def test_the_kernel_runs_and_not_the_function(ops_library: Path) -> None:
    """The function takes any head size, and the kernel says which it takes."""
    problem = banded(Case(1, 20), 1, 12, 4)
    context(session(model(problem), None), problem)
    with pytest.raises(Exception, match="lfx::BandedAttention: the head size must be a multiple of 8; given: query"):
        context(session(model(problem), ops_library), problem)


def test_a_width_that_no_kernel_takes_is_refused_when_the_model_is_loaded(ops_library: Path) -> None:
    for problem, width in ((banded(Case(1, 20), 1, 136, 4), 136), (global_(Case(1, 20), 2, 1, 1032), 1032)):
        with pytest.raises(Exception, match=r"lfx::\w+Attention: the head size must be at most \d+; given: query"):
            session(model(problem, width=width), ops_library)


def test_a_query_of_unknown_width_has_the_width_of_the_key(ops_library: Path) -> None:
    """A query that comes from a Reshape has no known width when the model is loaded."""
    proto = onnx.load_from_string(model(global_(Case(1, 20), 2, 1, 1032), width=1032))
    proto.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    with pytest.raises(Exception, match="lfx::GlobalAttention: the head size must be at most 1024; given: query"):
        session(proto.SerializeToString(), ops_library)


@pytest.mark.parametrize(("batch", "seqlen"), [(70_000, 2), (1, 2**18 + 1)])
def test_sizes_beyond_the_grids_of_cuda_run_on_the_cpu(ops_library: Path, batch: int, seqlen: int) -> None:
    """Results that are known exactly: a window of 0 sees one value, and equal scores give the mean of whole numbers."""
    case = Case(batch, seqlen)
    alone = banded(case, 1, 8, 0)
    np.testing.assert_array_equal(context(session(model(alone), ops_library), alone), alone.inputs["value"])
    mean = global_(case, 1, 1, 8)
    mean.inputs["query"][...] = 0
    mean.inputs["value"] = mean.inputs["value"].round()
    expected = mean.inputs["value"].mean(axis=1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(context(session(model(mean), ops_library), mean), expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("size", [3e4, 1e5, 1e8])
def test_huge_scores_give_the_dense_definition(ops_library: Path, size: float) -> None:
    """Each row is the value of its largest score, whose weight is exactly 1."""
    for problem in (banded(Case(2, 75), 2, 64, 8), global_(Case(2, 75), 3, 2, 64)):
        for name in ("query", "key"):
            problem.inputs[name] *= np.float32(size)
        found = context(session(model(problem), ops_library), problem)
        np.testing.assert_allclose(found, problem.dense(), atol=2.0**-22, rtol=2.0**-22)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_heads": 0}, "num_heads is 0; it must be 1 or more"),
        ({"num_heads": 5}, "query has width 32; it must be a multiple of num_heads 5"),
        ({"window": -3}, "window must be 0 or more"),
        ({"dilation": 0}, "dilation must be 1 or more"),
        ({"causal": 2}, "causal must be 0 or 1"),
        ({"window": 2**40, "dilation": 2**40}, "dilation must be 1 or more, and dilation . num_heads at most 65535"),
    ],
)
def test_wrong_attributes_are_refused_when_the_model_is_loaded(
    ops_library: Path, change: dict[str, int], reason: str
) -> None:
    problem = banded(Case(1, 20), 2, 16, 4)
    for name, value in change.items():
        setattr(problem, name, value)
    with pytest.raises(Exception, match=f"lfx::BandedAttention: {reason}"):
        session(model(problem, width=32), ops_library)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("scale", 1, "scale must be a float"),  # make_node makes an integer of it
        ("scale", "1.0", "scale must be a float"),
        ("dilation", 2.0, "dilation must be an integer"),
        ("causal", 1.0, "causal must be an integer"),
        ("window", "4", "window must be an integer"),
    ],
)
def test_an_attribute_of_another_type_is_refused_when_the_model_is_loaded(
    ops_library: Path, name: str, value: Any, reason: str
) -> None:
    for problem in (banded(Case(1, 20), 2, 16, 4), global_(Case(1, 20), 2, 2, 16)):
        if isinstance(problem, Global) and name != "scale":
            continue
        proto = onnx.load_from_string(model(problem))
        (node,) = proto.graph.node
        others = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*others, helper.make_attribute(name, value)])
        with pytest.raises(Exception, match=rf"lfx::\w+Attention: {reason}; the node has another type"):
            session(proto.SerializeToString(), ops_library)


def test_shapes_that_do_not_fit_are_refused_by_name(ops_library: Path) -> None:
    problem = banded(Case(2, 40, "first"), 2, 16, 8)
    loaded = session(model(problem), ops_library)
    expected = context(loaded, problem)
    for name in ("key", "key_mask", "global_index", "global_context"):
        given = problem.inputs[name]
        problem.inputs[name] = given[:1]
        with pytest.raises(
            Exception, match=r"lfx::BandedAttention: the shapes do not fit together: query \(2, 40, 32\)"
        ):
            context(loaded, problem)
        problem.inputs[name] = given
    np.testing.assert_array_equal(context(loaded, problem), expected)


def test_tensors_of_too_many_axes_are_refused_by_name(ops_library: Path) -> None:
    problem = banded(Case(1, 20), 1, 8, 4)
    for axes, shape in ((4, r"\(2, 2, 2, 2\)"), (9, "of 9 axes")):
        proto = onnx.load_from_string(model(problem))
        names = [value for value in proto.graph.input if value.name == "key"]
        del names[0].type.tensor_type.shape.dim[:]
        for _ in range(axes):
            names[0].type.tensor_type.shape.dim.add().dim_value = 2
        with pytest.raises(Exception, match=f"lfx::BandedAttention: key {shape} must have 3 axes"):
            session(proto.SerializeToString(), ops_library)


def test_float16_has_no_kernel(ops_library: Path) -> None:
    problem = banded(Case(1, 20), 1, 8, 4, precision="fp16")
    with pytest.raises(Exception, match="float16"):
        session(model(problem), ops_library)


def test_the_output_has_the_shape_of_the_query(ops_library: Path) -> None:
    loaded = session(model(banded(Case(1, 20), 1, 16, 4), width=16), ops_library)
    assert loaded.get_outputs()[0].shape == ["b", "s", 16]


def test_sizes_that_have_no_name_stay_unknown(ops_library: Path) -> None:
    """ONNX Runtime stops the process if a shape has a size of -1."""
    proto = onnx.load_from_string(model(banded(Case(1, 20), 1, 16, 4), width=16))
    for tensor in proto.graph.input:
        for dimension in tensor.type.tensor_type.shape.dim[:2]:
            dimension.Clear()
    proto.graph.node.append(helper.make_node("Slice", ["context", "one", "two", "one"], ["sliced"]))
    for name, value in (("one", 1), ("two", 2)):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    proto.graph.output[0].name = "sliced"
    loaded = session(proto.SerializeToString(), ops_library)
    problem = banded(Case(1, 20), 1, 16, 4)
    np.testing.assert_allclose(context(loaded, problem), problem.dense()[:, 1:2], atol=problem.tolerance(), rtol=0)


def test_results_do_not_depend_on_threads_or_on_the_order_of_the_batch(ops_library: Path) -> None:
    for problem in (
        banded(Case(3, 300, "ragged", "holes"), 2, 32, 20),
        global_(Case(3, 700, padding="left"), 5, 2, 16),
    ):
        expected = context(session(model(problem), ops_library), problem)
        threaded = session(model(problem), ops_library, threads=3)
        np.testing.assert_array_equal(context(threaded, problem), expected)
        problem.inputs = {name: array[::-1].copy() for name, array in problem.inputs.items()}
        np.testing.assert_array_equal(context(threaded, problem), expected[::-1])


def test_sixteen_threads_run_one_session(ops_library: Path) -> None:
    problems = [banded(Case(1, seqlen, "first"), 2, 16, 8) for seqlen in range(20, 150, 8)]
    loaded = session(model(problems[0]), ops_library, threads=2)
    expected = [context(loaded, problem) for problem in problems]

    def hammer(i: int) -> None:
        for j in range(150):
            k = (i + j) % len(problems)
            np.testing.assert_array_equal(context(loaded, problems[k]), expected[k])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hammer, range(16)))


def test_the_library_can_be_registered_again_after_all_sessions_are_gone(ops_library: Path) -> None:
    problem = banded(Case(1, 40, "first"), 2, 16, 8)
    for _ in range(3):
        first, second = session(model(problem), ops_library), session(model(problem), ops_library)
        del first
        check(second, problem)
        del second


def test_the_library_links_only_the_libraries_of_its_compiler(ops_library: Path) -> None:
    printed = subprocess.run(["readelf", "-d", str(ops_library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[([a-z_+-]+)[^\]]*\]", printed))
    assert needed <= {"libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-", "ld-linux-aarch"}, needed


def test_the_library_exports_what_is_documented(ops_library: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(ops_library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[2] for line in printed.splitlines() if " T " in line] == [
        "RegisterCustomOps",
        "lfxBandedAttentionCpu",
        "lfxCpuInstructionSet",
        "lfxGlobalAttentionCpu",
    ]
