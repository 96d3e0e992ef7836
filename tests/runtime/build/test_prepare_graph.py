"""The graph prepared for TensorRT: constant slots, one branch of the global rows, precision, and equal outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import ShapeInferencePass

from lfx.errors import ArtifactError, BuildError
from lfx.export import export
from lfx.export.pooling import Dense, LongformerForSentenceEmbedding, Normalize
from lfx.manifest import MODEL, Manifest
from lfx.parity import full_cases
from lfx.runtime import Engine
from lfx.runtime.build import convert_precision
from lfx.runtime.build import prepare_graph as freeze
from lfx.runtime.build.check_graph import check_conversion
from lfx.runtime.runner import engine_runner, model_inputs
from lfx.signature import POOLINGS
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import ONE_LAYER, tiny_model

HEAD_SIZE = 16  # of tests.models.tiny_config


def _save(model: ir.Model, folder: Path) -> Path:
    path = folder / MODEL
    ir.save(model, path, external_data=MODEL + ".data", size_threshold_bytes=1024)
    return path


def _load(bundle: Path) -> ir.Model:
    return ir.load(bundle / MODEL)


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)]


@pytest.mark.parametrize(("slots", "heads"), [(1, 1), (HEAD_SIZE - 1, 1), (HEAD_SIZE, 2), (40, 2)])
def test_freezing_keeps_the_cheaper_branch_of_the_global_rows_and_no_if(
    slots: int, heads: int, own_bundle: MakeBundle
) -> None:
    model = _load(own_bundle())
    freeze.freeze_slots(model, slots)
    assert "If" not in _ops(model)
    (topk,) = [node for node in model.graph if node.op_type == "TopK"]
    assert ir.convenience.get_const_tensor(topk.inputs[1]).numpy().tolist() == [slots]
    rows = [node for node in freeze.attention_nodes(model) if node.op_type == "GlobalAttention"]
    assert [node.attributes["num_heads"].as_int() for node in rows] == [heads] * 2  # one head of the width of all heads


@fast_if(lambda slots: slots in (4, HEAD_SIZE))
@pytest.mark.parametrize("slots", [1, 4, HEAD_SIZE, 40])
def test_a_frozen_graph_gives_the_bundle_s_outputs(slots: int, own_bundle: MakeBundle, tmp_path: Path) -> None:
    model = _load(own_bundle())
    freeze.freeze_slots(model, slots)
    freeze.name_plugins(model)
    path = _save(model, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    with Engine(own_bundle()) as original, Engine(path) as frozen:
        limit = Manifest.read(own_bundle()).validation["outputs"]["last_hidden_state"]["tolerance"]
        for case in full_cases(8, 128)[::3]:
            inputs = model_inputs(case, original.signature)
            if (
                inputs["global_attention_mask"].sum(axis=1).max() <= slots
            ):  # includes sequences with fewer tokens than slots
                ours, theirs = engine_runner(frozen)(inputs), engine_runner(original)(inputs)
                for name in theirs:
                    np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2 * limit)


@pytest.mark.parametrize("options", [{"max_global": 4}, {"global_attention": "first"}, {"global_attention": "none"}])
def test_a_graph_of_constant_slots_is_not_changed(options: dict[str, Any], own_bundle: MakeBundle) -> None:
    model = _load(own_bundle(**options))
    before = _ops(model)
    freeze.freeze_slots(model, 4)
    assert _ops(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_pooling_and_norm_stay_in_float32(precision: str, tmp_path: Path) -> None:
    modules = [Dense(32 * len(POOLINGS), 8, torch.nn.Tanh()), Normalize()]
    bundle = export(LongformerForSentenceEmbedding(tiny_model(**ONE_LAYER), POOLINGS, modules), tmp_path / "b")
    model = _load(bundle)
    freeze.freeze_slots(model, 4)
    freeze.convert(model, precision)
    path = _save(model, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    dtype = convert_precision.DTYPES[precision][0]
    for node in (node for node in model.graph if node.op_type != "Cast"):
        dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
        if str(node.name).startswith(("pooling/", "normalize_")):
            assert dtype not in dtypes, node.name
        if str(node.name).startswith("dense_"):
            assert ir.DataType.FLOAT not in dtypes, node.name
    backend = "openvino" if precision == "bf16" else "onnxruntime"
    with Engine(bundle) as original, Engine(path, backend) as converted:
        vectors = [engine.run([[5, 6, 7, 8, 9, 10]])["sentence_embedding"] for engine in (original, converted)]
        np.testing.assert_allclose(*vectors, atol=0.05)
        assert abs(np.linalg.norm(vectors[1]) - 1) < 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_converted_graph_is_strongly_typed(precision: str, own_bundle: MakeBundle, tmp_path: Path) -> None:
    model = _load(own_bundle())
    freeze.freeze_slots(model, 4)
    freeze.convert(model, precision)
    path = _save(model, tmp_path)
    onnx.checker.check_model(path, full_check=True)  # shape inference finds no conflict of types
    dtype = convert_precision.DTYPES[precision][0]
    assert all(value.dtype != ir.DataType.FLOAT for value in model.graph.initializers.values())
    assert {str(value.dtype) for value in model.graph.outputs} == {"FLOAT"}
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert norms
    for node in norms:
        assert node.outputs[0].dtype == dtype
        assert node.attributes["stash_type"].as_int() == 1  # reduces in float32


def test_a_weight_above_the_dtype_s_maximum_is_refused_by_name(own_bundle: MakeBundle) -> None:
    model = _load(own_bundle())
    weight = model.graph.initializers["encoder.layer.0.output.dense.bias"]
    array = weight.const_value.numpy().copy()
    array[3] = 1e6
    weight.const_value = ir.tensor(array)
    with pytest.raises(BuildError, match=r"encoder\.layer\.0\.output\.dense\.bias holds 1e\+06, which fp16 cannot"):
        freeze.convert(model, "fp16")
    model = _load(own_bundle())
    model.graph.initializers["encoder.layer.0.output.dense.bias"].const_value = ir.tensor(array)
    freeze.convert(model, "bf16")


class _Sinusoids(torch.nn.Module):
    """Position embeddings that are computed from the positions."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        rates = 10000.0 ** (-torch.arange(0, 16, dtype=torch.float32) / 16)
        angles = position_ids[..., None].to(torch.float32) * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(**ONE_LAYER)
    model.embeddings.position_embeddings = _Sinusoids()
    return export(model.eval(), tmp_path_factory.mktemp("long") / "sines", max_seqlen=4096)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_positions_are_computed_in_float32_at_any_length(precision: str, long_bundle: Path, tmp_path: Path) -> None:
    backend = "openvino" if precision == "bf16" else "onnxruntime"
    pytest.importorskip(backend)
    manifest = Manifest.read(long_bundle)
    signature = replace(manifest.signature, precision=precision, max_global=4)
    freeze.prepare_graph(long_bundle / MODEL, tmp_path / MODEL, manifest, signature, 4, True)
    onnx.checker.check_model(tmp_path / MODEL, full_check=True)
    checked: list[str] = []
    result = check_conversion(long_bundle, manifest, tmp_path / MODEL, signature, checked.append, checked.append)
    assert any("length 4096" in line for line in checked)
    limit = 0.01 if precision == "fp16" else 0.1  # rounded positions gave 0.7 and 3.5
    assert result["outputs"]["last_hidden_state"]["max_abs_difference"] < limit


def test_a_conversion_that_is_wrong_at_long_lengths_only_is_refused(
    long_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_precision, "nodes_from_integers", lambda model: set())  # rounds the positions
    manifest = Manifest.read(long_bundle)
    signature = replace(manifest.signature, precision="fp16", max_global=4)
    freeze.prepare_graph(long_bundle / MODEL, tmp_path / MODEL, manifest, signature, 4, True)
    with pytest.raises(BuildError, match=r"last_hidden_state differs by .* at batch 1, length 4096"):
        check_conversion(long_bundle, manifest, tmp_path / MODEL, signature, lambda _: None, lambda _: None)


@fast_if(lambda converted: converted)
@pytest.mark.parametrize("converted", [True, False], ids=["fp32 bundle", "fp16 bundle"])
def test_float_outputs_are_float16_if_the_signature_says_so(
    converted: bool, bundle: MakeBundle, tmp_path: Path
) -> None:
    source = bundle() if converted else bundle(precision="fp16")
    manifest = Manifest.read(source)
    half = tuple(replace(spec, dtype="float16") for spec in manifest.signature.outputs)
    results = {}
    for name, outputs in (("float32", manifest.signature.outputs), ("float16", half)):
        target = tmp_path / f"{name}.onnx"
        signature = replace(manifest.signature, precision="fp16", max_global=4, outputs=outputs)
        freeze.prepare_graph(source / MODEL, target, manifest, signature, 4, True)
        onnx.checker.check_model(target, full_check=True)
        with Engine(target, "onnxruntime") as engine:
            results[name] = engine.run(np.arange(40)[None] + 5)
        assert check_conversion(source, manifest, target, signature, lambda _: None, lambda _: None)["checked"]
    for name, array in results["float32"].items():
        assert results["float16"][name].dtype == np.float16
        np.testing.assert_array_equal(results["float16"][name], np.asarray(array).astype(np.float16))


def test_an_operator_without_a_half_precision_kernel_is_refused_with_the_way_out(
    own_bundle: MakeBundle, tmp_path: Path
) -> None:
    manifest = Manifest.read(own_bundle())
    signature = replace(manifest.signature, precision="fp16", max_global=4)
    freeze.prepare_graph(own_bundle() / MODEL, tmp_path / MODEL, manifest, signature, 4, True)
    model = onnx.load(tmp_path / MODEL)
    for node in model.graph.node:
        node.output[:] = ["summed" if name == "last_hidden_state" else name for name in node.output]
        node.input[:] = ["summed" if name == "last_hidden_state" else name for name in node.input]
    index = onnx.numpy_helper.from_array(np.zeros((1, 1, 1), np.int64), "index")
    update = onnx.numpy_helper.from_array(np.zeros((1, 1, 1), np.float16), "update")
    model.graph.initializer.extend([index, update])
    inputs, outputs = ["summed", "index", "update"], ["last_hidden_state"]
    model.graph.node.append(onnx.helper.make_node("ScatterElements", inputs, outputs, axis=1, reduction="add"))
    onnx.save(model, tmp_path / MODEL)
    with pytest.raises(
        BuildError, match=r"fp16 graph .* cannot be compared .*ScatterElements.*build in another precision"
    ):
        check_conversion(own_bundle(), manifest, tmp_path / MODEL, signature, lambda _: None, lambda _: None)


@pytest.mark.parametrize("measured", [{}, {"outputs": {"last_hidden_state": {"torch_max_abs_error": 10**400}}}])
def test_a_bundle_without_measured_errors_is_refused(measured: Any, own_bundle: MakeBundle, tmp_path: Path) -> None:
    manifest = replace(Manifest.read(own_bundle()), validation=measured)
    with pytest.raises(ArtifactError, match="no measured error of its output last_hidden_state; export the model"):
        check_conversion(own_bundle(), manifest, tmp_path / MODEL, manifest.signature, lambda _: None, lambda _: None)


class _FromIntegers(torch.nn.Module):
    """Integers as floats that meet weights, constants and hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = tiny_model(**ONE_LAYER), torch.nn.Parameter(torch.full((1,), 3.0))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.inner(input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.float()
        count = mask.sum(1, keepdim=True)
        filled = hidden[..., 0] + (1.0 - mask) * torch.finfo(torch.float32).min
        weighted = hidden * self.scale
        return {
            "mean": (weighted * mask[..., None]).sum(1) / count,
            "filled": filled.softmax(-1),
            "ids": (input_ids.float() * self.scale + 0.125) * 0.5,
        }


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_floats_of_integers_meet_converted_values(precision: str, tmp_path: Path) -> None:
    backend = "openvino" if precision == "bf16" else "onnxruntime"
    pytest.importorskip(backend)
    bundle = export(_FromIntegers().eval(), tmp_path / "own")
    manifest = Manifest.read(bundle)
    signature = replace(manifest.signature, precision=precision)
    freeze.prepare_graph(bundle / MODEL, tmp_path / MODEL, manifest, signature, 4, True)
    onnx.checker.check_model(tmp_path / MODEL, full_check=True)
    with Engine(bundle) as original, Engine(tmp_path / MODEL, backend) as converted:
        ids, mask = np.arange(40)[None] + 5, np.arange(40)[None] < 30
        expected, actual = (engine.run(ids, mask.astype(np.int64)) for engine in (original, converted))
    for name, array in expected.items():
        atol = 0.0 if name == "ids" else 0.05 if precision == "fp16" else 0.4
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=atol, err_msg=name)


class _Infinite(torch.nn.Module):
    """A head that masks padding with minus infinity: a row of padding alone is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(**ONE_LAYER)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.inner(input_ids, attention_mask=attention_mask)[0]
        scores = hidden[..., 0].masked_fill(attention_mask == 0, -torch.inf)
        return {"weights": scores.softmax(-1), "pooled": (scores.softmax(-1)[..., None] * hidden).sum(1)}


@pytest.mark.slow
def test_infinities_stay_infinite_in_half_precision(tmp_path: Path) -> None:
    bundle = export(_Infinite().eval(), tmp_path / "own")
    manifest = Manifest.read(bundle)
    signature = replace(manifest.signature, precision="fp16")
    freeze.prepare_graph(bundle / MODEL, tmp_path / MODEL, manifest, signature, 4, True)
    assert check_conversion(bundle, manifest, tmp_path / MODEL, signature, lambda _: None, lambda _: None)["checked"]


def test_floats_of_integers_are_cast_at_the_end_of_a_subgraph() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 9, opset_import: ["" : 17]>
        graph (int64[n] ids, float16[n] h, bool flag) => (float[n] y)
        <float[1] w = {3.0}>
        {
            x = Cast <to = 1> (h)
            position = Cast <to = 1> (ids)
            product = Mul (position, w)
            branch = If (flag) <
                then_branch = then_graph () => (float[n] a) { a = Cast <to = 1> (ids) },
                else_branch = else_graph () => (float[n] b) { b = Mul (product, x) }
            >
            y = Mul (branch, w)
        }
    """)
    ShapeInferencePass()(model)
    freeze.convert(model, "fp16")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for flag, expected in ((True, [[6.0, 9.0]]), (False, [[18.0, 27.0]])):
        inputs = {"ids": np.array([2, 3]), "h": np.ones(2, np.float16), "flag": np.array(flag)}
        np.testing.assert_array_equal(session.run(None, inputs), expected)


def test_plugins_are_named_on_nodes_and_declared_in_functions(own_bundle: MakeBundle) -> None:
    model = _load(own_bundle(max_global=4))
    freeze.name_plugins(model)
    nodes = freeze.attention_nodes(model)
    assert [node.op_type for node in nodes] == ["GlobalAttention", "BandedAttention"] * 2
    for node in nodes:
        assert node.attributes["plugin_version"].as_string() == "1"
        assert node.attributes["plugin_namespace"].as_string() == "lfx"
    for function in model.functions.values():
        assert {"plugin_version", "plugin_namespace"} <= set(function.attributes)


def test_inlined_functions_leave_standard_ops_with_unique_names(own_bundle: MakeBundle) -> None:
    model = _load(own_bundle(max_global=4))
    freeze.inline_functions(model)
    assert not freeze.attention_nodes(model)
    names = [node.name for node in ir.traversal.RecursiveGraphIterator(model.graph)]
    assert len(set(names)) == len(names)


class _Own(torch.nn.Module):
    """A user's module with a TopK or an If."""

    def __init__(self, op_type: str) -> None:
        super().__init__()
        self.inner, self.op_type = tiny_model(**ONE_LAYER), op_type

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        global_attention_mask: torch.Tensor | None = None,
    ) -> Any:
        hidden = self.inner(input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask)[0]
        if self.op_type == "TopK":
            return torch.sort(hidden[..., 0], dim=1, descending=True)[0]
        few = attention_mask.float().mean() < 0.75
        return torch.cond(few, lambda x: x * 2, lambda x: x * 3, (hidden,))


@fast_if(lambda op_type, inline: op_type == "TopK" and not inline)
@pytest.mark.parametrize(("op_type", "options"), [("TopK", {}), ("If", {"max_global": 4})])
@pytest.mark.parametrize("inline", [False, True])
def test_a_topk_and_an_if_of_the_user_are_not_changed(
    op_type: str, options: dict[str, Any], inline: bool, tmp_path: Path
) -> None:
    bundle = export(_Own(op_type).eval(), tmp_path / "own", inline_functions=inline, **options)
    model = _load(bundle)
    freeze.freeze_slots(model, 4)
    assert _ops(model).count("TopK") == (2 if op_type == "TopK" else 1)
    assert _ops(model).count("If") == (0 if op_type == "TopK" else 1)
    path = _save(model, tmp_path)
    with Engine(bundle) as original, Engine(path) as frozen:
        for length in (1, 3, 20):
            ids = np.arange(length)[None] + 5
            for mask in (np.ones_like(ids), (ids < 7).astype(np.int64)):
                np.testing.assert_allclose(
                    frozen.run(ids, mask)["output"], original.run(ids, mask)["output"], rtol=0, atol=1e-5
                )


def test_an_if_with_another_condition_is_refused(own_bundle: MakeBundle) -> None:
    model = _load(own_bundle())
    node = next(node for node in model.graph if node.op_type == "If")
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(flag)
    node.replace_input_with(0, flag)
    with pytest.raises(BuildError, match="depends on the data, and TensorRT needs a graph that does not"):
        freeze.freeze_slots(model, 4)
