"""Graph passes, in pairs of a graph that is changed and one that is not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from lfx.errors import ExportError
from lfx.export.passes.constants import share_constants
from lfx.export.passes.gelu import reorder_gelu
from lfx.export.passes.hidden_states import add_hidden_states
from lfx.export.passes.names import name_after_modules, rename_dimensions
from lfx.export.passes.opset import set_opset
from lfx.export.passes.static_globals import fix_globals
from lfx.export.passes.tensor_constants import make_constants_tensors
from lfx.export.passes.weights import transpose_weights


def _model(text: str, opset: int = 18) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_weight_that_is_only_transposed_is_stored_transposed() -> None:
    model = _model("""
        g (float[n, 2] x) => (float[n, 3] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            t = Transpose<perm = [1, 0]>(w)
            y = MatMul(x, t)
        }""")
    assert transpose_weights(model)
    assert _kinds(model) == ["MatMul"]
    stored = model.graph.initializers["w.T"]
    assert stored.const_value is not None
    assert stored.const_value.numpy().tolist() == [[1, 3, 5], [2, 4, 6]]
    assert "w" not in model.graph.initializers


def test_a_transpose_that_swaps_no_axes_stays() -> None:
    model = _model("""
        g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            t = Transpose<perm = [0, 1]>(w)
            y = MatMul(x, t)
        }""")
    assert not transpose_weights(model)
    assert list(model.graph.initializers) == ["w"]


def test_a_tied_weight_stays_one_tensor() -> None:
    model = _model("""
        g (float[n, 2] x, int64[k] i) => (float[n, 3] y, float[k, 2] e) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            e = Gather(w, i)
            t = Transpose<perm = [1, 0]>(w)
            y = MatMul(x, t)
        }""")
    assert not transpose_weights(model)
    assert list(model.graph.initializers) == ["w"]


@pytest.mark.parametrize(
    "transposed",
    ["t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)", "y = Gemm<transB = 1>(x, w)"],
    ids=["MatMul", "Gemm"],
)
def test_a_square_weight_that_is_read_as_it_is_and_transposed_is_two_tensors(transposed: str) -> None:
    """OpenVINO (2026.4) takes the packed weight of one product for that of the other."""
    model = _model(f"""
        g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z) <float[2, 2] w = {{1, 2, 3, 4}}> {{
            {transposed}
            z = MatMul(x, w)
        }}""")
    assert transpose_weights(model)
    first, second = model.graph
    assert [node.inputs[1].name for node in (first, second) if node.inputs[1]] == ["w.transposed", "w"]
    stored = model.graph.initializers["w.transposed"].const_value
    assert stored is not None and stored.numpy().tolist() == [[1, 3], [2, 4]]
    x = np.array([[1.0, 2.0]], np.float32)
    y, z = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    assert (y.tolist(), z.tolist()) == ([[5, 11]], [[7, 10]])


_GELU = """
    g (float[n] x) => (float[n] y) <float r = {1.4142135}, float one = {1}, float half = {FACTOR}> {
        a = Div(x, r)
        b = Erf(a)
        c = Add(b, one)
        d = Mul(half, c)
        y = Mul(x, d)
    }"""


def test_gelu_is_reordered() -> None:
    model = _model(_GELU.replace("FACTOR", "0.5"))
    assert reorder_gelu(model)
    inner, outer = list(model.graph)[3:]
    assert [value.name for value in inner.inputs if value] == ["x", "c"]
    assert [value.name for value in outer.inputs if value] == ["d", "half"]


def test_nodes_that_only_resemble_gelu_stay() -> None:
    assert not reorder_gelu(_model(_GELU.replace("FACTOR", "0.25")))
    assert not reorder_gelu(_model("g (float[n] x) => (float[n] y) { a = Mul(x, x)  y = Mul(x, a) }"))


def test_equal_constants_become_one_and_weights_stay() -> None:
    model = _model("""
        g (float[n] x) => (float[n] y) <float a = {2}, float b = {2}, float w = {2}, float[1] c = {2}> {
            p = Mul(x, a)
            q = Mul(p, b)
            r = Mul(q, w)
            y = Mul(r, c)
        }""")
    assert share_constants(model, {"w"})
    assert set(model.graph.initializers) == {"constant/float_2", "constant/float[1]_2", "w"}


def test_constants_of_one_shape_get_names_of_their_own() -> None:
    shape, values = "float[5]", ("{1, 2, 3, 4, 5}", "{2, 3, 4, 5, 6}", "{3, 4, 5, 6, 7}")
    constants = ", ".join(f"{shape} {name} = {value}" for name, value in zip("abc", values, strict=True))
    model = _model(f"g (float[5] x) => (float[5] y) <{constants}> {{ p = Mul(x, a) q = Mul(p, b) y = Mul(q, c) }}")
    assert share_constants(model, set())
    assert list(model.graph.initializers) == ["constant/float_5", "constant/float_5_1", "constant/float_5_2"]


def test_nodes_take_the_name_of_their_module() -> None:
    model = _model("g (float[n] x) => (float[n] y) { a = Relu(x)  b = Relu(a)  y = Relu(b) }")
    scopes = ["['', 'model', 'model.layer.0', 'relu']", None, "['', 'relu_2']"]
    for node, scope in zip(model.graph, scopes, strict=True):
        if scope is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scope
    name_after_modules(model, "model.")
    assert [node.name for node in model.graph] == ["layer.0/Relu", "layer.0/Relu_1", "Relu"]
    assert [node.outputs[0].name for node in model.graph] == [
        "layer.0/Relu_output",
        "layer.0/Relu_1_output",
        "y",
    ]
    assert not any(node.metadata_props for node in model.graph)


def test_made_up_dimensions_are_renamed_and_known_ones_stay() -> None:
    model = _model("g (float[batch, u0] x) => (float[batch, u0] y) { y = Relu(x) }")
    assert rename_dimensions(model, {"batch"}, "global_slots")
    assert str(model.graph.inputs[0].shape) == "[batch,global_slots]"
    model = _model("g (float[u0, u1, u0, s2] x) => (float[u0, u1, u0, s2] y) { y = Relu(x) }")
    assert rename_dimensions(model, set(), "global_slots")
    assert str(model.graph.inputs[0].shape) == "[global_slots,global_slots_1,global_slots,global_slots_2]"
    model = _model("g (float[batch, 3] x) => (float[batch, 3] y) { y = Relu(x) }")
    assert not rename_dimensions(model, {"batch"}, "global_slots")


def test_reductions_of_opset_18_become_those_of_17() -> None:
    model = _model("""
        g (float[n, 2] x) => (float[n, 1] y) <int64[1] axes = {1}> { y = ReduceMax<keepdims = 1>(x, axes) }""")
    assert set_opset(model, 17)
    node = next(iter(model.graph))
    assert len(node.inputs) == 1
    assert list(node.attributes["axes"].as_ints()) == [1]
    assert model.opset_imports[""] == 17


def test_an_equal_split_loses_its_count_and_an_unequal_one_is_refused() -> None:
    text = "g (float[n, SIZE] x) => (float[n, 2] y, float[n, k] z) { y, z = Split<axis = 1, num_outputs = 2>(x) }"
    model = _model(text.replace("SIZE", "4"))
    assert set_opset(model, 17)
    assert "num_outputs" not in next(iter(model.graph)).attributes
    with pytest.raises(ExportError, match="Split of 5 into 2"):
        set_opset(_model(text.replace("SIZE", "5")), 17)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[n] x, int64[1] a) => (float[m] y) { y = ReduceMax(x, a) }", "computed axes"),
        ("g (int64[n] x) => (int64[n] y) { y = BitwiseNot(x) }", "no form in opset 17"),
        (
            "g (float[n] x) => (float[1] y) <int64[1] a = {0}> { y = ReduceLogSumExp(x, a) }",
            "no form in opset 17 that lfx can write; use --opset 18",
        ),
        ("g (float[n] x) => (float[n] y) { y = ReduceMax<noop_with_empty_axes = 1>(x) }", "without axes"),
        (
            "g (float[n] x, int64[k] i, float[k] u) => (float[n] y)"
            ' { y = ScatterElements<reduction = "max">(x, i, u) }',
            "reduction max",
        ),
    ],
)
def test_an_op_without_a_form_in_opset_17_is_refused_with_the_cure(text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        set_opset(_model(text), 17)


def test_ops_that_did_not_change_are_left_alone() -> None:
    model = _model("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    before = ir.to_proto(model.graph).SerializeToString()
    set_opset(model, 17)
    assert ir.to_proto(model.graph).SerializeToString() == before
    assert not set_opset(_model("g (float[n] x) => (float[n] y) { y = Relu(x) }"), 18)


def test_lowered_reductions_compute_the_same() -> None:
    from onnx.reference import ReferenceEvaluator

    text = """
        g (float[n, 3] x) => (float[n] a, float[1, 3] b) <int64[1] one = {1}, int64[1] zero = {0}> {
            a = ReduceMean<keepdims = 0>(x, one)
            b = ReduceMin(x, zero)
        }"""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = ReferenceEvaluator(ir.to_proto(_model(text))).run(None, {"x": x})
    lowered = _model(text)
    set_opset(lowered, 17)
    after = ReferenceEvaluator(ir.to_proto(lowered)).run(None, {"x": x})
    for mine, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_constants_become_tensors_inside_branches_too() -> None:
    model = _model("""
        g (bool c, float[2] x) => (float[2] y) {
            a = Constant<value_floats = [0.5, 0.25]>()
            y = If(c) <
                then_branch = t () => (float[2] z) { i = Constant<value_int = 3>() f = Cast<to = 1>(i) z = Add(x, f) },
                else_branch = e () => (float[2] w) { w = Mul(x, a) }
            >
        }""")
    assert make_constants_tensors(model.graph)
    arrays = [
        node.attributes["value"].as_tensor().numpy()
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "Constant"
    ]
    assert [(array.dtype.name, array.tolist()) for array in arrays] == [("float32", [0.5, 0.25]), ("int64", 3)]


def test_tensors_and_attributes_of_a_function_stay() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 18, "d" : 1]>
        g (float[1] x) => (float[1] y) { y = d.F<n = 2>(x) }
        <domain: "d", opset_import: ["" : 18]>
        F <n> (x) => (y) {
            a = Constant<value_int: int = @n>()
            b = Constant<value = float[1] {1.5}>()
            c = Cast<to = 1>(a)
            d = Add(b, c)
            y = Mul(x, d)
        }""")
    (function,) = model.functions.values()
    assert not make_constants_tensors(function)
    assert [list(node.attributes) for node in function if node.op_type == "Constant"] == [["value_int"], ["value"]]


_MASK_READER = """
    g (int64[batch, sequence] input_ids, int64[batch, sequence] {name}) => (int64[batch, sequence] y) {{
        y = Identity({name})
    }}"""


@pytest.mark.parametrize(("mode", "row"), [("first", [1, 0, 0]), ("none", [0, 0, 0])])
def test_the_global_attention_mask_is_computed_by_the_rule(mode: str, row: list[int]) -> None:
    model = _model(_MASK_READER.format(name="global_attention_mask"))
    assert fix_globals(model, mode)
    assert [value.name for value in model.graph.inputs] == ["input_ids"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (answer,) = session.run(None, {"input_ids": np.zeros((2, 3), np.int64)})
    assert np.asarray(answer).tolist() == [row, row]


def test_a_graph_without_a_global_attention_mask_stays() -> None:
    model = _model(_MASK_READER.format(name="attention_mask"))
    assert not fix_globals(model, "first")
    assert len(model.graph.inputs) == 2


_POOLED = """
    g (float[b, s, 4] x, float[4] scale) => (float[b, 4] y) {
        h = LayerNormalization(x, scale)
        axes = Constant<value = int64[1] {1}>()
        y = ReduceMean<keepdims = 0>(h, axes)
    }"""


def test_the_hidden_states_before_a_pooling_become_the_first_output() -> None:
    model = _model(_POOLED)
    model.graph[0].outputs[0].shape = ir.Shape(["b", "s", 4])
    model.graph[2].name = "pooling/ReduceMean"
    assert add_hidden_states(model) == 4
    assert [value.name for value in model.graph.outputs] == ["last_hidden_state", "y"]


def test_a_graph_without_a_pooling_gets_no_output() -> None:
    model = _model(_POOLED)
    assert add_hidden_states(model) is None
    assert [value.name for value in model.graph.outputs] == ["y"]
