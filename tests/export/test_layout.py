"""`relayout` and `export(layout="hf")`: from ids and attention_mask alone, runtimes give the numbers of Engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lfx.cli import cli
from lfx.errors import ArtifactError, ExportError, InputError, ParityError
from lfx.export import export, relayout
from lfx.export.load import load
from lfx.export.quantize import quantize
from lfx.export.validate import compare_engine
from lfx.manifest import MANIFEST, Manifest
from lfx.parity import Case
from lfx.runtime import Engine
from lfx.signature import SENTENCE_EMBEDDING
from tests.conftest import MakeBundle, MakeOnce
from tests.marks import fast_if
from tests.models import make_sentence_folder, save_tiny_checkpoint, tiny_model, tiny_tokenizer

IDS = np.random.default_rng(0).integers(3, 50, (2, 37))
MASK = np.ones_like(IDS)
MASK[1, 20:] = 0
FEEDS = {"input_ids": IDS, "attention_mask": MASK}


def by_onnxruntime(path: Path) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, FEEDS), strict=True))


def by_openvino(path: Path) -> dict[str, np.ndarray]:
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {output.any_name: value for output, value in compiled(FEEDS).items()}


def by_engine(path: Path) -> dict[str, Any]:
    with Engine(path) as engine:
        return engine.run(IDS, MASK)


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, Any], bundle: Path) -> None:
    """Every output of `expected` is within the tolerance that the bundle was held to."""
    for name, measured in Manifest.read(bundle).validation["outputs"].items():
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=measured["tolerance"])


@fast_if(lambda task: task == "text-classification")
@pytest.mark.parametrize("run", [by_onnxruntime, by_openvino, by_engine], ids=lambda run: run.__name__)
@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "token-classification", "fill-mask"])
def test_a_bundle_in_the_layout_of_the_hub_gives_the_engines_numbers(
    run: Any, task: str, bundle: MakeBundle, made_once: MakeOnce
) -> None:
    folder = made_once(f"hf-{task}", lambda new: relayout(bundle(task), new / "hf")) / "hf"
    source = bundle(task)
    assert_same(run(folder if run is by_engine else folder / "onnx" / "model.onnx"), by_engine(source), source)


@pytest.mark.parametrize("run", [by_onnxruntime, by_openvino, by_engine], ids=lambda run: run.__name__)
def test_an_export_in_the_layout_of_the_hub_gives_pytorchs_numbers(
    run: Any, bundle: MakeBundle, made_once: MakeOnce
) -> None:
    def make(new: Path) -> None:
        export(tiny_model("text-classification"), new / "hf", layout="hf", tokenizer=tiny_tokenizer())

    folder, source = made_once("export-hf", make) / "hf", bundle("text-classification")
    assert_same(run(folder if run is by_engine else folder / "onnx" / "model.onnx"), by_engine(source), source)


class _Positive(nn.Module):
    """A module whose output is Boolean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(num_hidden_layers=1, attention_window=[8])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.as_tensor(self.inner(input_ids, attention_mask=attention_mask)[0] > 0)


@pytest.mark.slow
def test_outputs_that_are_no_floats_are_compared_too(tmp_path: Path) -> None:
    bundle = export(_Positive().eval(), tmp_path / "own")
    ids = [5, 6, 7, 8, 9]
    with Engine(bundle) as engine, Engine(relayout(bundle, tmp_path / "hf")) as other:
        for name, array in engine.run(ids).items():
            assert array.dtype == bool
            np.testing.assert_array_equal(other.run(ids)[name], array)


def test_the_files_are_those_of_the_layout(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = relayout(bundle("text-classification"), tmp_path / "hf", model_type="roberta", external_data=True)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "config.json", "tokenizer.json", MANIFEST} <= names
    assert not {"model.onnx", "model.onnx.data", "bundle"} & names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "roberta"
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    model = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions
    assert {entry.value for tensor in model.graph.initializer for entry in tensor.external_data} >= {"model.onnx_data"}
    assert_same(by_engine(folder), by_engine(bundle("text-classification")), bundle("text-classification"))


def test_weights_below_two_gigabytes_are_in_the_model_file(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = relayout(bundle(), tmp_path / "hf")
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"]
    assert "transformers.js_config" not in json.loads((folder / "config.json").read_text())


def test_without_global_tokens_the_weights_of_global_attention_are_left_out(bundle: MakeBundle, tmp_path: Path) -> None:
    model = onnx.load(relayout(bundle(), tmp_path / "hf") / "onnx" / "model.onnx")
    assert not [tensor.name for tensor in model.graph.initializer if "_global" in tensor.name]


@pytest.mark.slow
def test_int8_and_fp16_stand_beside_fp32_with_their_own_data(bundle: MakeBundle, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    fp32, fp16 = bundle(), bundle(precision="fp16")
    int8 = quantize(fp32, tmp_path / "int8", calibration=text, samples=4)
    folder = relayout(fp32, tmp_path / "hf", others=[int8, fp16], external_data=True)
    for name, source in (("model_quantized", int8), ("model_fp16", fp16)):
        path = folder / "onnx" / f"{name}.onnx"
        model = onnx.load(path, load_external_data=False)
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert locations == {f"{name}.onnx_data"}
        expected = by_engine(source)["last_hidden_state"]
        manifest = Manifest.read(source)
        measured = manifest.quantization["accuracy"] if manifest.quantization else manifest.validation
        limit = measured["outputs"]["last_hidden_state"]["tolerance"]
        np.testing.assert_allclose(by_onnxruntime(path)["last_hidden_state"], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["model.onnx", "model_fp16.onnx"])
def test_one_file_of_the_layout_is_compared_with_its_digest(name: str, bundle: MakeBundle, tmp_path: Path) -> None:
    fp16 = bundle("text-classification", precision="fp16")
    folder = relayout(bundle("text-classification"), tmp_path / "hf", others=[fp16], external_data=True)
    expected = by_engine(folder / "onnx" / name)
    weights = folder / "onnx" / f"{name}_data"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")  # as in the hub's cache
    np.testing.assert_equal(by_engine(folder / "onnx" / name), expected)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}_data was changed after the export"):
        Engine(folder / "onnx" / name)


def test_a_file_of_the_layout_is_compared_with_its_digest_by_any_path(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = relayout(bundle("text-classification"), tmp_path / "hf")
    model = folder / "onnx" / "model.onnx"
    (model.parent / "inner").mkdir()
    (tmp_path / "link").symlink_to(model.parent)
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    for path in (model.parent / "inner" / ".." / model.name, tmp_path / "link" / model.name):
        with pytest.raises(ArtifactError, match="was changed after the export"):
            Engine(path)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("nowhere")  # as git-annex has a file that was not fetched
    with pytest.raises(ArtifactError, match=f"has no {MANIFEST}"):
        Engine(model)


def test_question_answering_is_refused_with_the_reason(bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="question-answering has its global tokens on the question, which differ"):
        relayout(bundle("question-answering"), tmp_path / "hf")
    with pytest.raises(ExportError, match="global_attention_mask; use the layout lfx"):
        export(tiny_model("question-answering"), tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "hub"}, "layout 'hub' is not known; choose one of: lfx, hf"),
        ({"model_type": "roberta"}, "model_type 'roberta' is for the layout hf"),
        ({"layout": "hf", "model_type": "bert"}, "model_type 'bert' is not known"),
        ({"layout": "hf", "precision": "bf16"}, "precision bf16 is not for the layout hf"),
        ({"layout": "hf", "output_attentions": True}, "output_attentions is not for the layout hf"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_export_refuses_options_that_the_layout_excludes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(tiny_model(), tmp_path / "out", **options)


@pytest.mark.slow
def test_relayout_refuses_bundles_that_do_not_belong_together(bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="two bundles are fp32"):
        relayout(bundle(), tmp_path / "hf", others=[bundle()])
    with pytest.raises(ExportError, match="from another checkpoint, or for another task"):
        relayout(bundle(), tmp_path / "hf", others=[bundle("text-classification", precision="fp16")])
    for options, other in (({}, {"global_attention": "first"}), ({"pooling": "mean"}, {"pooling": "cls"})):
        with pytest.raises(ExportError, match="with another --global-attention or --pooling than"):
            relayout(bundle(**options), tmp_path / "hf", others=[bundle(**other, precision="fp16")])
    edited = save_tiny_checkpoint(tmp_path / "edited", attention_window=[4, 8])  # whose weights are the same
    other = export(edited, tmp_path / "other", precision="fp16")
    with pytest.raises(ExportError, match=r"with another config\.json: attention_window than"):
        relayout(bundle(), tmp_path / "hf", others=[other])
    in_memory = tiny_model()  # with the same weights and config
    in_memory.encoder.layer[0].attention.self.one_sided_attn_window_size = 2
    other = export(in_memory, tmp_path / "in-memory", precision="fp16")
    with pytest.raises(ExportError, match="computes another last_hidden_state than"):
        relayout(bundle(), tmp_path / "hf", others=[other])
    with pytest.raises(ExportError, match="others is str; give a list"):
        relayout(bundle(), tmp_path / "hf", others="other")
    with pytest.raises(ExportError, match="is a bundle that is read"):
        own = shutil.copytree(bundle(), tmp_path / "own")
        relayout(own, own)


def test_settings_of_sentence_transformers_that_change_the_outputs_are_found(tmp_path: Path) -> None:
    source = save_tiny_checkpoint(tmp_path / "source", SENTENCE_EMBEDDING)
    fp32 = export(source, tmp_path / "fp32")
    (source / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}, "truncate_dim": 8}))
    fp16 = export(source, tmp_path / "fp16", precision="fp16")
    with pytest.raises(ExportError, match="computes another sentence_embedding than"):
        relayout(fp32, tmp_path / "hf", others=[fp16])


class Scorer(nn.Module):
    """Scores each token; those of padding are `fill`, None = the smallest number."""

    def __init__(self, factor: float, fill: float | None, *, gives_first: bool = False) -> None:
        super().__init__()
        self.encoder, self.head = tiny_model(), nn.Linear(32, 1)
        nn.init.constant_(self.head.bias, 10.0)
        self.factor, self.fill, self.gives_first = factor, fill, gives_first

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.head(self.encoder(input_ids, attention_mask).last_hidden_state)[..., 0] * self.factor
        fill = torch.finfo(scores.dtype).min if self.fill is None else self.fill
        outputs = {"scores": scores.masked_fill(attention_mask == 0, fill)}
        return outputs | ({"first": scores[:, 0]} if self.gives_first else {})


@pytest.mark.parametrize(("factor", "fill"), [(1.0, None), (1.0, -np.inf), (1e3, 0.0)], ids=["min", "inf", "large"])
def test_fill_values_and_large_numbers_are_compared_as_validation_does(
    factor: float, fill: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    scorer = Scorer(factor, fill).eval()
    fp32, fp16 = (export(scorer, tmp_path / p, precision=p) for p in ("fp32", "fp16"))
    for first, other in ((fp32, fp16), (fp16, fp32)):
        relayout(first, tmp_path / f"from-{first.name}", others=[other])


@pytest.mark.slow
def test_every_bundle_is_compared_in_all_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = Scorer(1.0, 0.0, gives_first=True).eval()
    fp32 = export(scorer, tmp_path / "fp32")
    (tmp_path / "ids.jsonl").write_text((json.dumps({"input_ids": list(range(3, 40))}) + "\n") * 4)
    int8 = quantize(fp32, calibration=tmp_path / "ids.jsonl", output=tmp_path / "int8")
    scorer.factor = 2.0
    doubled = export(scorer, tmp_path / "doubled", precision="fp16")
    with pytest.raises(ExportError, match=r"doubled computes another first than .*fp32;"):
        relayout(int8, tmp_path / "hf", others=[doubled, fp32])
    scorer.factor, scorer.gives_first = 1.0, False
    fewer = export(scorer, tmp_path / "fewer", precision="fp16")
    with pytest.raises(ExportError, match="fewer computes another first than"):
        relayout(fp32, tmp_path / "hf", others=[fewer])


@pytest.mark.parametrize("task", [SENTENCE_EMBEDDING, "text-classification"])
def test_a_folder_that_has_the_layout_already_is_taken(task: str, tmp_path: Path) -> None:
    source = save_tiny_checkpoint(tmp_path / "source", task)
    folder = export(source, tmp_path / "hf", layout="hf")
    fp16 = export(source, tmp_path / "fp16", precision="fp16")
    again = relayout(folder, tmp_path / "again", others=[fp16])
    assert sorted(path.name for path in (again / "onnx").iterdir()) == ["model.onnx", "model_fp16.onnx"]
    np.testing.assert_equal(by_engine(again), by_engine(folder))


def test_a_wrong_model_is_not_written(bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.export.layout_models.fix_globals", lambda model, mode, adds_globals: _negate(model))
    with pytest.raises(ParityError, match=r"model\.onnx: logits differs from the bundle's by"):
        relayout(bundle("text-classification", global_attention="first"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def _negate(model: Any) -> bool:
    (output,) = model.graph.outputs
    node = output.producer()
    weight = next(v for v in node.inputs if v is not None and v.const_value is not None)
    import onnx_ir as ir

    weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)
    return False


def test_a_folder_of_the_layout_is_replaced_by_a_new_one(bundle: MakeBundle, tmp_path: Path) -> None:
    first = relayout(bundle(), tmp_path / "hf", external_data=True)
    second = relayout(bundle(), tmp_path / "hf")
    assert first == second
    assert not (second / "onnx" / "model.onnx_data").exists()


def test_quantize_refuses_the_layout(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = relayout(bundle(), tmp_path / "hf")
    with pytest.raises(ExportError, match="quantize the bundle that it was made from"):
        quantize(folder, tmp_path / "int8", calibration=tmp_path / "text.txt")


@pytest.fixture(scope="module")
def sentence_layout(made_once: MakeOnce) -> Path:
    """A model of sentence-transformers with a Dense, exported in the layout of the hub; and its checkpoint."""

    def make(new: Path) -> None:
        checkpoint = save_tiny_checkpoint(new / "checkpoint")
        tiny_tokenizer().save_pretrained(checkpoint)
        dense = {"in_features": 32, "out_features": 16, "bias": True, "activation_function": "torch.nn.Tanh"}
        make_sentence_folder(checkpoint, {"pooling_mode": "mean"}, Dense=dense, Normalize={})
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        weights = {"linear.weight": torch.randn(16, 32, generator=generator), "linear.bias": torch.zeros(16)}
        save_file(weights, checkpoint / "2_Dense" / "model.safetensors")
        export(checkpoint, new / "hf", layout="hf")

    return made_once("sentence-hf", make)


def test_sentence_embeddings_in_the_layout_are_compared_with_pytorch(sentence_layout: Path) -> None:
    model, _ = load(str(sentence_layout / "checkpoint"))
    with Engine(sentence_layout / "hf") as engine:
        report = compare_engine(engine, model, lambda *_: [Case(2, 37, "first")], lambda step: None)
    report.require()
    assert list(report.outputs) == ["last_hidden_state", "sentence_embedding"]


def test_sentence_embeddings_have_the_hidden_states_and_all_files_of_the_modules(sentence_layout: Path) -> None:
    folder = sentence_layout / "hf"
    outputs = by_onnxruntime(folder / "onnx" / "model.onnx")
    assert list(outputs) == ["last_hidden_state", "sentence_embedding"]
    assert outputs["last_hidden_state"].shape == (2, 37, 32)
    mean = (outputs["last_hidden_state"] * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
    assert mean.shape == (2, 32)
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= set(
        Manifest.read(folder).files
    )
    texts = ["the quick brown fox", "the lazy dog jumps over the fox"]
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(sentence_layout / "checkpoint"), device="cpu").encode(texts)
    with Engine(folder) as engine:
        np.testing.assert_allclose(engine.embed(texts), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_relayout_needs_the_checkpoint_for_modules_with_weights(sentence_layout: Path, tmp_path: Path) -> None:
    bundle = export(sentence_layout / "checkpoint", tmp_path / "bundle")
    with pytest.raises(ExportError, match="does not have the weights of 2_Dense"):
        relayout(bundle, tmp_path / "hf")


@pytest.mark.slow
def test_relayout_of_a_sentence_embedding_adds_the_hidden_states(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = relayout(bundle(SENTENCE_EMBEDDING, precision="fp16"), tmp_path / "hf")
    assert list(by_onnxruntime(folder / "onnx" / "model_fp16.onnx")) == ["last_hidden_state", "sentence_embedding"]


def test_the_command_exports_in_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "classifier", "text-classification")
    monkeypatch.chdir(tmp_path)
    command = ["export", "--model", str(checkpoint), "--layout", "hf", "--model-type", "roberta"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("classifier-hf: text-classification")
    assert (tmp_path / "classifier-hf" / "onnx" / "model.onnx").is_file()
    with Engine(tmp_path / "classifier-hf") as engine, pytest.raises(InputError, match="global_attention_mask"):
        engine.run(IDS, MASK, MASK)
