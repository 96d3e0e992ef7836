"""Attention probabilities as outputs, against Hugging Face's `output_attentions=True` and the definition."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lfx.errors import BuildError, ExportError, InputError, ParityError
from lfx.export import export, use_loop_attention
from lfx.export.quantize import quantize
from lfx.manifest import MODEL, Manifest
from lfx.parity import GLOBALS, PADDINGS, Arrays, Case
from lfx.reference import banded_probabilities, global_probabilities
from lfx.runtime import Batcher, Engine
from lfx.runtime.build import build_engine
from lfx.runtime.documents import run_documents
from lfx.runtime.runner import engine_runner, model_inputs
from lfx.signature import Signature, grouped
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import WINDOW, tiny_config, tiny_model

BACKENDS = ["onnxruntime", "openvino"]
# A chosen bound for probabilities, not derived; the measured differences are about ten times smaller.
LARGEST_DIFFERENCE = 2e-6


@pytest.fixture(scope="module")
def with_attentions(bundle: MakeBundle) -> Path:
    """A bundle of the bare model, whose two layers have windows of 4 and 8 on each side."""
    return bundle(output_attentions=True)


@pytest.fixture(scope="module")
def hugging_faces(with_attentions: Path) -> list[tuple[Case, Arrays, Any]]:
    """Each case with its inputs and what Hugging Face's model returns."""
    model, results = tiny_model(), []
    for case, inputs in cases(Manifest.read(with_attentions).signature):
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            results.append((case, inputs, model(**tensors, output_attentions=True)))
    return results


def cases(signature: Signature) -> list[tuple[Case, Arrays]]:
    """Lengths around the windows' boundaries, each with every pattern of global tokens and of padding."""
    total = 2 * WINDOW
    lengths = (1, WINDOW - 1, WINDOW, WINDOW + 1, total - 1, total, total + 1, 2 * total + 1, 128)
    patterns = itertools.cycle(itertools.product(GLOBALS, PADDINGS))
    made = [Case(3, length, *next(patterns)) for length in lengths for _ in range(6)]
    return [(case, model_inputs(case, signature)) for case in made]


@fast_if(lambda backend: backend == "onnxruntime")
@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_are_hugging_faces_in_all_layers(
    with_attentions: Path, hugging_faces: list[tuple[Case, Arrays, Any]], backend: str
) -> None:
    with Engine(with_attentions, backend) as engine:
        for case, inputs, theirs in hugging_faces:
            ours = engine_runner(engine)(inputs)
            counts = (inputs["global_attention_mask"] * inputs["attention_mask"]).sum(axis=1)
            for layer, expected in enumerate(theirs.attentions):
                actual = ours[f"attentions.{layer}"]
                assert actual.shape == expected.shape, case
                np.testing.assert_allclose(actual, expected, atol=LARGEST_DIFFERENCE, err_msg=str(case))
                actual = ours[f"global_attentions.{layer}"]
                assert actual.shape == (3, 2, case.seqlen, counts.max()), case
                if theirs.global_attentions is None:
                    continue
                # Hugging Face's also has the padding to a multiple of the window, with probability 0.
                rows = theirs.global_attentions[layer][:, :, : case.seqlen].numpy()
                for row, count in enumerate(counts):
                    np.testing.assert_allclose(
                        actual[row, ..., :count], rows[row, ..., :count], atol=LARGEST_DIFFERENCE, err_msg=str(case)
                    )
                    assert not actual[row, ..., count:].any(), case  # theirs are uniform filler


@fast_if(lambda backend: backend == "onnxruntime")
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_outputs_are_bitwise_those_of_a_bundle_without(
    bundle: MakeBundle, with_attentions: Path, backend: str
) -> None:
    with Engine(bundle(), backend) as plain, Engine(with_attentions, backend) as engine:
        for case, inputs in cases(plain.signature):
            ours = engine_runner(engine)(inputs)
            for name, expected in engine_runner(plain)(inputs).items():
                np.testing.assert_array_equal(ours[name], expected, err_msg=f"{name}, {case}")


@pytest.mark.slow
def test_the_scaling_of_a_query_stays_fused_with_its_projection(tmp_path: Path) -> None:
    model = tiny_model(hidden_size=40)  # a head size of 20: scaling by 1 / √20 rounds
    plain, ours = export(model, tmp_path / "plain"), export(model, tmp_path / "ours", output_attentions=True)
    for backend in BACKENDS:
        with Engine(plain, backend) as without, Engine(ours, backend) as engine:
            inputs = model_inputs(Case(2, 40, "ragged", "right"), without.signature)
            actual = engine_runner(engine)(inputs)
            for name, expected in engine_runner(without)(inputs).items():
                np.testing.assert_array_equal(actual[name], expected, err_msg=f"{name}, {backend}")


@pytest.mark.slow
def test_the_probabilities_of_one_head_are_the_same_in_both_backends(tmp_path: Path) -> None:
    """Where key_global's weight is read as it is and transposed, OpenVINO has taken one for the other."""
    folder = export(tiny_model(num_attention_heads=1), tmp_path / "b", output_attentions=True, global_attention="first")
    with Engine(folder, BACKENDS[0]) as one, Engine(folder, BACKENDS[1]) as other:
        ids = np.arange(4, 34)[None]
        expected, actual = one.run(ids), other.run(ids)
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_model_whose_config_asks_for_them_is_exported_with_them(tmp_path: Path) -> None:
    folder = export(tiny_model(output_attentions=True), tmp_path / "b", output_attentions=True)
    assert Manifest.read(folder).signature.output_attentions


def test_the_default_graph_has_no_trace_of_them_and_the_attention_nodes_stay(
    bundle: MakeBundle, with_attentions: Path
) -> None:
    plain, ours = (onnx.load(str(folder / MODEL), load_external_data=False) for folder in (bundle(), with_attentions))
    assert {function.name for function in plain.functions} == {"BandedAttention", "GlobalAttention"}
    assert {output.name for output in plain.graph.output} == {"last_hidden_state", "pooler_output"}
    nodes = [[n for n in model.graph.node if n.op_type == "BandedAttention"] for model in (plain, ours)]
    assert nodes[0] == nodes[1]
    added = [n.op_type for n in ours.graph.node if n.op_type.endswith("Probabilities")]
    assert sorted(added) == ["BandedAttentionProbabilities"] * 2 + ["GlobalAttentionProbabilities"] * 2
    weights = [{t.name: t.dims for t in m.graph.initializer if "constant" not in t.name} for m in (plain, ours)]
    assert {name: weights[1].get(name) for name in weights[0]} == weights[0]


@fast_if(lambda task: task == "question-answering")
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("fill-mask", {"opset": 21}),
        ("text-classification", {"global_attention": "first"}),
        ("token-classification", {"precision": "fp16"}),
        ("question-answering", {"max_global": 3}),
        ("multiple-choice", {"opset": 21, "inline_functions": True}),
        ("sentence-embedding", {"global_attention": "none"}),
    ],
)
def test_every_task_and_option_is_validated_against_pytorch(
    bundle: MakeBundle, task: str, options: dict[str, Any]
) -> None:
    manifest = Manifest.read(bundle(task, output_attentions=True, **options))
    expected = {"attentions.0", "attentions.1"}
    if options.get("global_attention") != "none":
        expected |= {"global_attentions.0", "global_attentions.1"}
    assert manifest.signature.attention_outputs == expected
    measured = manifest.validation["outputs"]
    assert expected < set(measured)
    for name in expected:  # the export fails if an error is above its tolerance
        assert 0.1 < measured[name]["max_abs_value"] <= 1.0
        assert measured[name]["max_abs_error"] < (1e-5 if manifest.signature.precision == "fp32" else 1e-2)


def test_the_manifest_says_so(bundle: MakeBundle, with_attentions: Path) -> None:
    assert Manifest.read(with_attentions).signature.output_attentions
    signature = Manifest.read(bundle()).signature
    assert not signature.output_attentions
    assert signature.attention_outputs == frozenset()


def test_the_layers_of_a_kind_are_shown_together() -> None:
    names = ["logits", "attentions.0", "attentions.1", "global_attentions.0", "attentions.x", "a.0", "a.1"]
    assert grouped(names) == {
        "logits": ["logits"],
        "attentions.0 to 1": ["attentions.0", "attentions.1"],
        "global_attentions.0": ["global_attentions.0"],
        "attentions.x": ["attentions.x"],
        "a.0": ["a.0"],
        "a.1": ["a.1"],
    }


@pytest.mark.slow
def test_a_wrong_probability_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        return banded_probabilities(*arguments, **options) * 1.01

    monkeypatch.setattr("lfx.reference.banded_probabilities", wrong)
    with pytest.raises(ParityError, match=r"attentions\.0"):
        export(tiny_model(), tmp_path / "bundle", output_attentions=True)
    assert not (tmp_path / "bundle").exists()


def test_dilation_and_causal_windows_are_refused(tmp_path: Path) -> None:
    from transformers import LongformerModel

    for change in ({"attention_dilation": 2}, {"autoregressive": True}):
        model = use_loop_attention(LongformerModel(tiny_config(**change)).eval())
        with pytest.raises(ExportError, match="dilation or causal windows"):
            export(model, tmp_path / "bundle", output_attentions=True)


@pytest.mark.slow
def test_an_output_of_that_name_is_refused(tmp_path: Path) -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.longformer = tiny_model()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"attentions.0": self.longformer(input_ids, attention_mask=attention_mask).pooler_output}

    with pytest.raises(ExportError, match=r"an output 'attentions\.0' of its own"):
        export(Named().eval(), tmp_path / "bundle", output_attentions=True)
    with pytest.raises(ExportError, match="output_attentions is 1; give True or False"):
        export(tiny_model(), tmp_path / "bundle", output_attentions=1)  # type: ignore[arg-type]


def test_what_needs_rows_or_constant_sizes_refuses_the_bundle(with_attentions: Path, tmp_path: Path) -> None:
    with Engine(with_attentions) as engine:
        width = engine.run([[5, 6, 7], [8, 9, 10]])["attentions.0"]
        assert isinstance(width, np.ndarray)
        assert width.shape == (2, 2, 3, 9)
        for refused in (
            lambda: engine.run([[5, 6, 7], [8, 9]]),
            lambda: list(engine.stream([[5, 6, 7]])),
            lambda: Batcher(engine),
            lambda: run_documents(engine, None, tmp_path / "x.jsonl", tmp_path / "y.jsonl"),
        ):
            with pytest.raises(InputError, match="without --output-attentions"):
                refused()
    with pytest.raises(BuildError, match="without --output-attentions"):
        build_engine(with_attentions, tmp_path / "x.plan")
    with pytest.raises(ExportError, match="without --output-attentions"):
        quantize(with_attentions, calibration=tmp_path / "calibration.jsonl")


def test_the_reference_equals_the_definition_one_pair_at_a_time() -> None:
    random = np.random.default_rng(0)
    q, k = random.standard_normal((2, 2, 13, 8))
    mask = np.ones((2, 13), dtype=int)
    mask[0, 10:] = 0
    index = np.array([[4, 7, -1], [-1, -1, -1]])
    window, heads, size, scale = 3, 2, 4, 0.3
    local = banded_probabilities(q, k, mask, index, num_heads=heads, window=window, scale=scale)
    rows = global_probabilities(q[:, :3], k, mask, index, num_heads=heads, scale=scale)
    assert local.shape == (2, heads, 13, 2 + 2 * window + 1)
    assert rows.shape == (2, heads, 13, 2)
    expected, expected_rows = np.zeros_like(local), np.zeros_like(rows)
    for b, h in np.ndindex(2, heads):
        part = slice(h * size, (h + 1) * size)
        tokens = [int(p) for p in index[b] if p >= 0]

        def weight(x: np.ndarray, j: int, b: int = b, part: slice = part) -> float:
            return math.exp(float(x[part] @ k[b, j, part]) * scale)

        for i in range(13):
            if not mask[b, i] or i in tokens:
                continue
            keys = [j for j in range(13) if abs(i - j) <= window and mask[b, j] and j not in tokens]
            total = sum(weight(q[b, i], j) for j in [*tokens, *keys])
            for slot, j in enumerate(tokens):
                expected[b, h, i, slot] = weight(q[b, i], j) / total
            for j in keys:
                expected[b, h, i, 2 + j - i + window] = weight(q[b, i], j) / total
        for slot in range(len(tokens)):
            total = sum(weight(q[b, slot], j) for j in range(13) if mask[b, j])
            for j in range(13):
                expected_rows[b, h, j, slot] = weight(q[b, slot], j) / total if mask[b, j] else 0.0
    np.testing.assert_allclose(local, expected, atol=1e-13)
    np.testing.assert_allclose(rows, expected_rows, atol=1e-13)
