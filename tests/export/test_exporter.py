"""`export`: the written file for all opsets, modes and precisions, and the refused arguments."""

from __future__ import annotations

import copy
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lfx.errors import ExportError, ParityError
from lfx.export import export, exporter
from lfx.manifest import Manifest
from lfx.parity import inputs_of, quick_cases
from lfx.runtime import Engine
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import ONE_LAYER, VOCAB_SIZE, WINDOW, tiny_model


def _graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return all nodes, with those in subgraphs."""
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                nodes += _nodes(attribute.g)
    return nodes


def _answers(
    folder: Path, backend: str = "onnxruntime", kernels: str = "auto", **unused: Any
) -> list[dict[str, np.ndarray]]:
    with Engine(folder, backend, kernels=kernels) as engine:
        signature = engine.signature
        names = {spec.name for spec in signature.inputs}
        out = []
        for case in quick_cases(WINDOW, signature.max_seqlen):
            inputs = inputs_of(case, vocab_size=VOCAB_SIZE, pad_token_id=1, max_global=signature.max_global)
            masks = {k: v for k, v in inputs.items() if k in names and k != "input_ids"}
            out.append({k: np.asarray(v) for k, v in engine.run(inputs["input_ids"], **masks).items()})
        return out


@fast_if(lambda opset: opset == 23)
@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_each_opset_is_what_was_asked_for_and_gives_the_same_numbers(own_bundle: MakeBundle, opset: int) -> None:
    model = _graph(own_bundle(opset=opset))
    assert _opsets(model) == {"": opset, "lfx": 1}
    assert all({e.domain: e.version for e in f.opset_import}[""] == opset for f in model.functions)
    onnx.checker.check_model(own_bundle(opset=opset) / "model.onnx", full_check=True)
    for mine, at_17 in zip(_answers(own_bundle(opset=opset)), _answers(own_bundle(opset=17)), strict=True):
        for name in at_17:
            np.testing.assert_array_equal(mine[name], at_17[name])


def test_attention_is_one_node_a_layer_with_a_function_as_its_body(bundle: MakeBundle) -> None:
    model = _graph(bundle(opset=17))
    assert _opsets(model) == {"": 17, "lfx": 1}
    nodes = _nodes(model.graph)
    banded = [node for node in nodes if node.op_type == "BandedAttention"]
    assert [node.domain for node in banded] == ["lfx", "lfx"]
    attributes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in banded]
    assert [a["window"] for a in attributes] == [4, 8]
    assert all(a["num_heads"] == 2 and a["dilation"] == 1 and a["causal"] == 0 for a in attributes)
    assert all(a["scale"] == pytest.approx(0.25) for a in attributes)
    assert {f.name for f in model.functions} == {"BandedAttention", "GlobalAttention"}
    assert {node.domain for node in nodes} == {"", "lfx"}
    assert not {node.op_type for node in nodes} & {"Loop", "Scan", "ScatterND", "Sequence"}


def test_global_tokens_are_found_once_for_all_layers(bundle: MakeBundle) -> None:
    kinds = Counter(node.op_type for node in _nodes(_graph(bundle(opset=17)).graph))
    assert kinds["TopK"] == 1
    banded = [n for n in _graph(bundle(opset=17)).graph.node if n.op_type == "BandedAttention"]
    assert len({node.input[3] for node in banded}) == 1
    assert len({node.input[4] for node in banded}) == 1


def test_the_graph_is_small_and_named_after_the_modules(bundle: MakeBundle) -> None:
    graph = _graph(bundle(opset=17)).graph
    for layer in range(2):
        prefix = f"encoder.layer.{layer}."
        assert sum(node.name.startswith(prefix) for node in graph.node) <= 50
    second = [node for node in graph.node if node.name.startswith("encoder.layer.1.")]
    assert len(second) <= 40
    names = [node.name for node in _nodes(graph)]
    assert len(set(names)) == len(names)
    by_name = {node.name: node for node in graph.node}
    query = by_name["encoder.layer.1.attention.self.query/MatMul"]
    assert query.input[1] == "encoder.layer.1.attention.self.query.weight.T"
    assert by_name["encoder.layer.1.attention.self/BandedAttention"].op_type == "BandedAttention"
    made_up = [n for n in (*names, *(o for node in graph.node for o in node.output)) if n.startswith(("val_", "node_"))]
    assert not made_up


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "heads"), [(2, 1), (3, 3), (4, 2), (8, 4), (16, 2), (32, 1)])
def test_the_layout_of_weights_does_not_depend_on_their_size(hidden: int, heads: int, tmp_path: Path) -> None:
    model = tiny_model(hidden_size=hidden, num_attention_heads=heads, intermediate_size=2 * hidden)
    constants = {tensor.name for tensor in _graph(export(model, tmp_path / "out")).graph.initializer}
    assert {name for name, _ in model.named_parameters()} == {
        name.removesuffix(".T") for name in constants if not name.startswith("constant/")
    }
    assert not any("x" in name for name in constants if name.startswith("constant/"))


def test_weights_are_the_largest_constants_and_lie_outside_the_file(bundle: MakeBundle) -> None:
    folder = bundle(opset=17)
    parameters = {name for name, _ in tiny_model().named_parameters()}
    weights = {}
    for tensor in _graph(folder).graph.initializer:
        name = tensor.name.removesuffix(".T")
        if name in parameters:
            weights[name] = tensor
        else:
            assert np.prod(tensor.dims) <= 8, f"{tensor.name} {list(tensor.dims)} is a baked constant"
    big = [t for t in weights.values() if np.prod(t.dims) * 4 > 1024]
    assert big and all(t.data_location == onnx.TensorProto.EXTERNAL for t in big)
    assert set(weights) == parameters


def test_tied_weights_are_stored_once(bundle: MakeBundle) -> None:
    graph = _graph(bundle("fill-mask", opset=17)).graph
    shapes = [sorted(tensor.dims) for tensor in graph.initializer]
    assert shapes.count(sorted([VOCAB_SIZE, 32])) == 1


def test_inlined_functions_leave_standard_ops_only(bundle: MakeBundle) -> None:
    folder = bundle(opset=17, inline_functions=True)
    model = _graph(folder)
    assert _opsets(model) == {"": 17}
    assert not model.functions
    assert {node.domain for node in _nodes(model.graph)} == {""}
    kept_functions = _answers(bundle(opset=17), kernels="function")
    for mine, kept in zip(_answers(folder), kept_functions, strict=True):
        for name in kept:
            np.testing.assert_allclose(mine[name], kept[name], atol=1e-6)


def test_axes_are_dynamic_and_named(bundle: MakeBundle) -> None:
    graph = _graph(bundle(opset=17)).graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes == {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask", "global_attention_mask")}
    assert all(v.type.tensor_type.elem_type == onnx.TensorProto.INT64 for v in graph.input)
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output}
    assert axes == {"last_hidden_state": ["batch", "sequence", 32], "pooler_output": ["batch", 32]}


def test_the_callers_model_is_not_touched(tmp_path: Path) -> None:
    model = tiny_model(**ONE_LAYER)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    export(model, tmp_path / "out", precision="fp16")
    assert model.training
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.data_ptr() == pointers[name]
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("mode", ["first", "none"])
def test_fixed_global_attention_drops_the_input_and_matches_pytorch(bundle: MakeBundle, mode: str) -> None:
    folder = bundle(global_attention=mode)
    graph = _graph(folder).graph
    assert [v.name for v in graph.input] == ["input_ids", "attention_mask"]
    kinds = Counter(node.op_type for node in _nodes(graph))
    assert kinds["If"] == 0 and kinds["TopK"] == 0
    assert kinds["GlobalAttention"] == (2 if mode == "first" else 0)
    ids = torch.arange(3, 43).reshape(2, 20)
    marks = torch.zeros_like(ids)
    marks[:, 0] = int(mode == "first")
    with torch.inference_mode():
        theirs = tiny_model()(ids, global_attention_mask=marks).last_hidden_state.numpy()
    with Engine(folder) as engine:
        np.testing.assert_allclose(engine.run(ids)["last_hidden_state"], theirs, atol=1e-5)


@fast_if(lambda slots: slots == 3)
@pytest.mark.parametrize("slots", [3, 20])
def test_max_global_freezes_the_slots_in_the_cheaper_form(bundle: MakeBundle, slots: int) -> None:
    """Head size 16: three slots are folded (a head of size `hidden`), twenty are projected."""
    folder = bundle(max_global=slots)
    graph = _graph(folder).graph
    rows = [node for node in graph.node if node.op_type == "GlobalAttention"]
    heads = [onnx.helper.get_attribute_value(a) for node in rows for a in node.attribute if a.name == "num_heads"]
    assert heads == ([1, 1] if slots < 16 else [2, 2])
    constants = {tensor.name: tensor for tensor in graph.initializer}
    top = next(node for node in graph.node if node.op_type == "TopK")
    assert onnx.numpy_helper.to_array(constants[top.input[1]]).tolist() == [slots]
    with Engine(folder) as engine, Engine(bundle(opset=17)) as free:
        for seqlen in (1, 2, 5, 40):  # shorter and longer than the slots
            ids, marks = np.full((1, seqlen), 7), np.zeros((1, seqlen), dtype=int)
            marks[0, : min(slots, seqlen)] = 1
            mine = engine.run(ids, global_attention_mask=marks)["last_hidden_state"]
            theirs = free.run(ids, global_attention_mask=marks)["last_hidden_state"]
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@fast_if(lambda precision: precision == "fp16")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_strongly_typed_with_float32_sums(bundle: MakeBundle, precision: str) -> None:
    model = _graph(bundle(precision=precision))
    data_type = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    weights = [t for t in inferred.graph.initializer if t.name.endswith((".weight", ".weight.T", ".bias"))]
    assert weights and all(t.data_type == data_type for t in weights)
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            stash = [a.i for a in node.attribute if a.name == "stash_type"]
            assert stash in ([], [onnx.TensorProto.FLOAT])
    for function in model.functions:
        producers = {output: node for node in function.node for output in node.output}
        softmax = next(node for node in function.node if node.op_type == "Softmax")
        casts = [producers[i] for i in producers[softmax.input[0]].input if i in producers]
        assert any(c.op_type == "Cast" and c.attribute[0].i == onnx.TensorProto.FLOAT for c in casts)
    assert all(v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for v in model.graph.output)


def test_the_manifest_says_what_was_done_and_measured(bundle: MakeBundle) -> None:
    folder = bundle("text-classification", opset=17)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    assert manifest.opset == 17
    assert manifest.signature.task == "text-classification"
    assert manifest.signature.default_global == "first"
    assert manifest.signature.max_seqlen == 128
    assert manifest.signature.attention_windows == (4, 8)
    assert set(manifest.files) >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"}
    validation = manifest.validation
    assert validation["passed"] is True
    assert len({case["seqlen"] for case in validation["cases"]}) >= 4
    assert {case["globals"] for case in validation["cases"]} >= {
        "none",
        "first",
        "all",
        "ragged",
        "scattered",
    }
    result = validation["outputs"]["logits"]
    assert 0 < result["max_abs_error"] <= result["tolerance"] < 1e-4
    data = json.loads((folder / "lfx.json").read_text())
    assert data["source"]["sha256"] and data["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_same_model_same_digest(bundle: MakeBundle) -> None:
    digests = {Manifest.read(bundle(opset=opset)).source["sha256"] for opset in (17, 18)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 16}, "opset 16 is out of range; give a whole number from 17 to 23"),
        ({"opset": 24}, "opset 24 is out of range"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"task": "translation"}, "task 'translation'"),
        ({"global_attention": "last"}, "global_attention 'last'"),
        ({"max_global": 0}, "max_global 0"),
        ({"max_global": 4, "global_attention": "none"}, "max_global 4"),
        ({"max_seqlen": 500}, "max_seqlen 500 is out of range"),
        ({"task": None}, "task None"),
        ({"opset": "17"}, "opset is '17'"),
        ({"opset": True}, "opset is True"),
        ({"precision": None}, "precision None"),
        ({"global_attention": ["mask"]}, "global_attention "),
        ({"max_global": 1.5}, "max_global is 1.5"),
        ({"max_seqlen": "x"}, "max_seqlen is 'x'"),
        ({"max_seqlen": 0}, "max_seqlen 0"),
        ({"inline_functions": "no"}, "inline_functions is str"),
        ({"progress": None}, "progress is NoneType"),
        ({"tokenizer": 5}, "tokenizer is int"),
        ({"output": 5}, "output is 5"),
        ({"output": "a\0b"}, "output .* cannot be opened"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(tiny_model(), **{"output": tmp_path / "out", **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [5, None, [], b"x", "", "x" * 5000, Path("x" * 5000), "a\0b", nn.Linear])
def test_a_model_of_another_type_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ExportError, match=r"^model "):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _spoil(model: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[:3] = value
    return model


BIAS = "encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(("value", "value_name"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float, value_name: str) -> None:
    with pytest.raises(ExportError, match=f"{BIAS} holds {value_name} in 3 of 32 values"):
        export(_spoil(tiny_model(), BIAS, value), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_buffer_may_be_infinite_and_not_nan(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.inner = tiny_model()
            self.register_buffer("fill", torch.tensor([value, 0.0]))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids).last_hidden_state[..., :2] + self.fill

    export(Masked(float("-inf")), tmp_path / "out")
    with pytest.raises(ExportError, match="fill holds NaN in 1 of 2 values"):
        export(Masked(float("nan")), tmp_path / "other")


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="on the device meta, without values"):
        export(tiny_model().to("meta"), tmp_path / "out")


def test_a_sparse_weight_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    model.extra = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    with pytest.raises(ExportError, match="extra is a sparse tensor; give it as a dense one"):
        export(model, tmp_path / "out")


@pytest.mark.slow
def test_concurrent_exports_in_threads_are_correct(tmp_path: Path) -> None:
    models = [tiny_model(seed=seed) for seed in range(3)]
    with ThreadPoolExecutor() as threads:
        folders = list(threads.map(lambda i: export(models[i], tmp_path / str(i)), range(3)))
    ids = np.arange(20)[None] + 3
    for model, folder in zip(models, folders, strict=True):
        with Engine(folder) as engine, torch.inference_mode():
            expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
            np.testing.assert_allclose(engine.run(ids)["last_hidden_state"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_overflows_is_refused_with_the_output_and_the_case(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        for weight in model.encoder.layer[0].attention.self.parameters():
            weight.mul_(1e30)
    with pytest.raises(ParityError, match=r"last_hidden_state of PyTorch in fp32 is NaN in .* at batch 1, length 1,"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@fast_if(lambda name, value: (name, value) == ("sep_token_id", -1))
@pytest.mark.parametrize("name", ["pad_token_id", "sep_token_id"])
@pytest.mark.parametrize("value", [10**30, -1])
def test_a_special_token_id_out_of_range_is_refused(tmp_path: Path, name: str, value: int) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = tiny_model()
            self.config = SimpleNamespace(pad_token_id=1, sep_token_id=2)
            setattr(self.config, name, value)
            self.embed, self.attend = inner.embeddings.word_embeddings, inner.encoder.layer[0].attention.self

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.attend(self.embed(input_ids), attention_mask=(attention_mask - 1).float())[0]

    with pytest.raises(ExportError, match=f"{name} .* is out of range"):
        export(Own(), tmp_path / "out")


def test_a_model_without_a_padding_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has no pad_token_id"):
        export(tiny_model(pad_token_id=None), tmp_path / "out")


def test_a_module_that_is_no_longformer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="contains no Longformer self-attention"):
        export(nn.Linear(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_inaccurate_graph_leaves_no_bundle_and_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation detects a weight that differs in the file."""
    original = exporter.finalize_graph

    def spoil(model: Any, **options: Any) -> Any:
        finalized = original(model, **options)
        weight = finalized.graph.initializers["encoder.layer.1.output.dense.bias"]
        array = weight.const_value.numpy().copy()
        array[3] += 1e-3
        weight.const_value = exporter.ir.tensor(array, name=weight.name)
        return finalized

    monkeypatch.setattr(exporter, "finalize_graph", spoil)
    with pytest.raises(ParityError, match=r"last_hidden_state: error .* above the tolerance .* batch \d, length \d"):
        export(tiny_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
