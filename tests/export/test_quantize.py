"""int8: quantized layers, scales, accuracy, and a verdict that detects a wrong quantized model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper, numpy_helper

from lfx.errors import ArtifactError, DependencyError, ExportError, InputError, ParityError
from lfx.export import export, relayout
from lfx.export import quantize as quantizing
from lfx.export.quantize import quantize
from lfx.export.torch_runners import int8_runner
from lfx.export.validate import compare_engine
from lfx.machine import int8_overflows
from lfx.manifest import MODEL, Manifest
from lfx.parity import Report, full_cases
from lfx.runtime import Engine
from tests.conftest import MakeBundle, SmallDisk
from tests.marks import fast_if
from tests.models import ONE_LAYER, VOCAB_SIZE, save_tiny_checkpoint, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("remembered_references")
LAYERS = [
    f"encoder.layer.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    lengths = random.integers(10, 120, 24)
    rows = [{"input_ids": random.integers(3, VOCAB_SIZE, int(n)).tolist()} for n in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def int8(bundle: MakeBundle, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """int8(task, **options) returns the quantized bundle; made once per module."""
    cache: dict[tuple[Any, ...], Path] = {}

    def make(task: str = "feature-extraction", opset: int = 17, **options: Any) -> Path:
        key = (task, opset, *sorted(options.items()))
        if key not in cache:
            folder = tmp_path_factory.mktemp("int8") / task
            cache[key] = quantize(bundle(task, opset=opset), folder, calibration=text, **options)
        return cache[key]

    return make


def test_the_linear_layers_and_no_others_are_int8(int8: Any) -> None:
    graph = onnx.load(str(int8() / MODEL)).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    weights = {name: array for name, array in arrays.items() if array.ndim == 2}
    assert sorted(name.removesuffix(".weight.T_quantized") for name in weights) == sorted(LAYERS)
    assert max(int(np.abs(array.astype(int)).max()) for array in weights.values()) <= 64  # seven bits
    assert sorted(Manifest.read(int8()).quantization["layers"]) == sorted(LAYERS)
    assert sum(node.op_type == "BandedAttention" for node in graph.node) == 2


def test_nothing_is_written_into_the_bundle_and_modes_follow_the_umask(
    bundle: MakeBundle, text: Path, tmp_path: Path
) -> None:
    before = bundle().stat().st_mtime_ns
    umask = os.umask(0o022)
    try:
        quantized = quantize(bundle(), tmp_path / "int8", calibration=text)
    finally:
        os.umask(umask)
    assert bundle().stat().st_mtime_ns == before
    assert {stat.S_IMODE(path.stat().st_mode) for path in quantized.iterdir()} == {0o644}
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


@pytest.mark.slow
def test_files_in_folders_are_kept(text: Path, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "c", "sentence-embedding")
    tiny_tokenizer().save_pretrained(checkpoint)
    folder = export(checkpoint, tmp_path / "b")
    made = quantize(folder, tmp_path / "int8", calibration=text)
    assert Manifest.read(made).files.keys() == Manifest.read(folder).files.keys()
    assert (made / "1_Pooling" / "config.json").read_bytes() == (folder / "1_Pooling" / "config.json").read_bytes()
    with Engine(folder) as original, Engine(made) as quantized:
        assert float((original.embed("the fox") * quantized.embed("the fox")).sum()) > 0.98


def test_a_full_disk_says_what_to_do(bundle: MakeBundle, text: Path, small_disk: SmallDisk) -> None:
    folder = small_disk()
    with pytest.raises(
        ExportError, match=r"int8 cannot be written: no disk space left|no disk space: the bundle takes"
    ):
        quantize(bundle(), folder / "int8", calibration=text)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_says_what_to_do(
    bundle: MakeBundle, text: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_disk()
    monkeypatch.setattr(quantizing, "check_space", lambda output, needed: None)
    with pytest.raises(ExportError, match="int8 cannot be written: no disk space left; make room, or choose another"):
        quantize(bundle(), folder / "int8", calibration=text)
    assert list(folder.iterdir()) == []


def test_the_quantizer_s_copies_of_the_model_are_in_the_folder_that_the_next_run_removes(
    bundle: MakeBundle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the process is killed, ONNX Runtime does not remove them."""
    temporary, seen, calibration = tmp_path / "tmp", set(), quantizing._calibration
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def watched(*args: Any) -> Any:
        def feeds(inputs: Any) -> Any:
            for item in inputs:
                seen.update(path.name for path in temporary.iterdir())
                assert list(temporary.rglob("augmented_model.onnx"))
                yield item

        return {name: feeds(inputs) for name, inputs in calibration(*args).items()}

    monkeypatch.setattr(quantizing, "_calibration", watched)
    quantize(bundle(), tmp_path / "int8", calibration=text)
    assert [name[:5] for name in seen] == [".lfx-"]
    assert (tempfile.gettempdir(), list(temporary.iterdir())) == (str(temporary), [])


class Both(torch.nn.Module):
    """A module with a tensor that is both an output and the input of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(**ONE_LAYER)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"hidden": hidden, "logits": self.head(hidden)}


@pytest.mark.slow
def test_only_what_a_product_reads_is_rounded(int8: Any, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = quantize(export(Both().eval(), tmp_path / "fp32"), tmp_path / "int8", calibration=text)
    for folder in (int8(), both):
        graph = onnx.load(str(folder / MODEL)).graph
        constants = {t.name for t in graph.initializer}
        rounded = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants}
        readers = {node.op_type for node in graph.node if rounded & set(node.input)}
        assert rounded
        assert readers == {"MatMul"}
        assert not rounded & {output.name for output in graph.output}
    with Engine(both) as engine:
        outputs = engine.run(np.arange(3, 80))
    assert len(np.unique(outputs["hidden"])) > 2000  # eight bits would be 256 values
    assert "head" in Manifest.read(both).quantization["layers"]


def test_full_range_is_refused_on_cpus_that_overflow(
    bundle: MakeBundle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not int8_overflows():
        quantized = quantize(bundle(), tmp_path / "made", calibration=text, full_range=True)
        arrays = [numpy_helper.to_array(t) for t in onnx.load(str(quantized / MODEL)).graph.initializer]
        assert max(int(np.abs(a.astype(int)).max()) for a in arrays if a.dtype == np.int8 and a.ndim == 2) == 127
    monkeypatch.setattr("lfx.export.quantize.int8_overflows", lambda: True)
    with pytest.raises(ExportError, match="no VNNI"):
        quantize(bundle(), tmp_path / "refused", calibration=text, full_range=True)


@pytest.mark.parametrize("lone", [False, True], ids=["bundle", "lone file"])
def test_weights_of_eight_bits_are_not_run_where_they_overflow(
    lone: bool, int8: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(int8(), tmp_path / "eight")
    manifest = Manifest.read(folder)
    signature = dataclasses.replace(manifest.signature, weight_bits=8)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"lfx": json.dumps(signature.to_dict())})
    onnx.save(model, str(folder / MODEL))
    dataclasses.replace(manifest, signature=signature).write(folder)
    if lone:
        (folder / "lfx.json").unlink()
    path = folder / MODEL if lone else folder
    monkeypatch.setattr("lfx.runtime.loading.int8_overflows", lambda: True)
    with pytest.raises(DependencyError, match="without --full-range"):
        Engine(path)
    Engine(int8()).close()  # of 7 bits
    monkeypatch.setattr("lfx.runtime.loading.int8_overflows", lambda: False)
    Engine(path).close()


@fast_if(lambda task, opset: (task, opset) == ("feature-extraction", 17))
@pytest.mark.parametrize(
    ("task", "opset", "activations"),
    [
        ("feature-extraction", 17, "uint8"),
        ("feature-extraction", 21, "int8"),
        ("text-classification", 17, "int8"),
        ("text-classification", 23, "uint8"),
        ("token-classification", 17, "uint8"),
        ("fill-mask", 17, "uint8"),
    ],
)
def test_it_computes_what_int8_should(int8: Any, task: str, opset: int, activations: str) -> None:
    folder = int8(task, opset, activations=activations)
    with Engine(folder) as engine:
        quantization = Manifest.read(folder).quantization
        report = compare_engine(engine, tiny_model(task), full_cases, lambda step: None, quantization=quantization)
    assert report.precision == "int8"
    assert not report.failures()
    for result in report.outputs.values():
        assert result.cosine() > 0.98
        assert result.error > 1e-4  # the int8 model differs from the float32 model


def test_the_witness_rounds_to_the_steps_of_the_file(int8: Any) -> None:
    """A layer of PyTorch's witness has the dequantized weight and the scale of the file."""
    folder = int8()
    graph = onnx.load(str(folder / MODEL)).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    name = "encoder.layer.0.attention.self.query"
    steps = values[f"{name}.weight.T_scale"]
    stored = values[f"{name}.weight.T_quantized"].astype(np.float32) * steps
    model = tiny_model()
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, _, __: seen.append(module.weight))
    int8_runner(model, Manifest.read(folder).quantization)({"input_ids": np.arange(3, 20)[None]})
    assert np.abs(seen[0].detach().numpy().T - stored).max() <= 1e-6
    assert np.abs(layer.weight.detach().numpy().T - stored).max() > 1e-4  # the caller's model is not changed


def test_wrong_scales_are_found(int8: Any, tmp_path: Path) -> None:
    """A layer whose scale is a third of the correct one clips large values."""
    folder = shutil.copytree(int8(), tmp_path / "wrong")
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    for tensor in model.graph.initializer:
        if tensor.name == node.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 3, tensor.name))
    with pytest.raises(ParityError, match="above the tolerance"):
        _compare_changed(model, folder).require()


@fast_if(lambda name: name == "1.intermediate.dense")
@pytest.mark.parametrize("name", ["0.attention.self.query", "1.attention.self.key", "1.intermediate.dense"])
def test_a_layer_with_half_its_weights_is_found(int8: Any, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(int8(), tmp_path / "half")
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    (scale,) = (t for t in model.graph.initializer if t.name == f"encoder.layer.{name}.weight.T_scale")
    if scale.external_data:
        external_data_helper.load_external_data_for_tensor(scale, str(folder))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 2, scale.name))
    with pytest.raises(ParityError, match="root mean square"):
        _compare_changed(model, folder).require()


def _compare_changed(model: onnx.ModelProto, folder: Path) -> Report:
    """Write a changed graph into a copy of a bundle, and compare it with the model."""
    onnx.save(model, str(folder / MODEL))
    quantization = Manifest.read(folder).quantization
    with Engine(_alone(folder)) as engine:
        return compare_engine(engine, tiny_model(), full_cases, lambda step: None, quantization=quantization)


def _alone(folder: Path) -> Path:
    """Open the ONNX file without the manifest, which would refuse the changed file."""
    (folder / "lfx.json").unlink()
    return folder / MODEL


def test_layers_that_are_kept_stay_float32(int8: Any) -> None:
    layers = Manifest.read(int8(keep_float=("encoder.layer.0.*", "*.key"))).quantization["layers"]
    assert sorted(layers) == sorted(n for n in LAYERS if "layer.1" in n and not n.endswith(".key"))


class Shared(torch.nn.Module):
    """A Longformer with a projection that is called twice, and a matrix product outside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.twice = torch.nn.Linear(32, 32)
        self.matrix = torch.nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 0.1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.twice(torch.tanh(self.twice(hidden))) @ self.matrix


@pytest.mark.slow
def test_shared_projections_and_other_matrix_products_stay_float32(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    folder = quantize(export(model, tmp_path / "fp32"), tmp_path / "int8", calibration=text)
    quantization = Manifest.read(folder).quantization
    assert sorted(quantization["layers"]) == sorted(f"model.{name}" for name in LAYERS)
    with Engine(folder) as engine:
        assert not compare_engine(engine, model, full_cases, lambda step: None, quantization=quantization).failures()


def test_accuracy_is_measured_on_text_that_did_not_calibrate(int8: Any, text: Path) -> None:
    manifest = Manifest.read(int8("text-classification", samples=10))
    assert manifest.quantization["calibration"]["windows"] == 10
    result = manifest.quantization["accuracy"]["outputs"]["logits"]
    assert result["cosine"] > 0.9
    assert 0.0 <= result["label_agreement"] <= 1.0
    assert manifest.signature.precision == "int8"
    assert manifest.validation  # of the float32 export


def test_a_text_file_is_cut_into_windows(bundle: MakeBundle, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 40)
    quantized = quantize(bundle(), tmp_path / "int8", calibration=path, samples=6)
    calibration = Manifest.read(quantized).quantization["calibration"]
    assert calibration["windows"] >= 6
    with Engine(quantized, "openvino") as engine, Engine(bundle()) as original:
        ids = np.arange(3, 40)
        a, b = engine.run(ids)["last_hidden_state"], original.run(ids)["last_hidden_state"]
    assert np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


@fast_if(lambda link: link is os.symlink)
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_bundle_of_links_is_quantized_too(bundle: MakeBundle, text: Path, tmp_path: Path, link: Any) -> None:
    own, folder = shutil.copytree(bundle(), tmp_path / "own"), tmp_path / "linked"
    folder.mkdir()
    for path in own.iterdir():
        link(path, folder / path.name)
    quantized = quantize(folder, tmp_path / "int8", calibration=text)
    assert len(Manifest.read(quantized).quantization["layers"]) == len(LAYERS)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no file": ({"calibration": "none.txt"}, InputError, "does not exist"),
    "a bad line": ({"calibration": "bad.jsonl"}, InputError, r"bad\.jsonl:2: broken JSON"),
    "one document": ({"calibration": "one.jsonl"}, ExportError, "give a text of 2 or more"),
    "activations": ({"activations": "int4"}, ExportError, "uint8, int8"),
    "samples": ({"samples": 1}, ExportError, "2 or more"),
    "a layer that is not there": ({"keep_float": ("encoder.layer.9.*",)}, ExportError, "matches no linear layer"),
    "samples of another type": ({"samples": "32"}, ExportError, "samples is '32'"),
    "half a sample": ({"samples": 2.5}, ExportError, "samples is 2.5"),
    "activations of another type": ({"activations": None}, ExportError, "activations None"),
    "a calibration of another type": ({"calibration": 5}, ExportError, "calibration is 5"),
    "a calibration with a NUL": ({"calibration": "a\0b"}, ExportError, "calibration .* cannot be opened"),
    "a text for a list": ({"keep_float": "*"}, ExportError, "keep_float is str; give a list of patterns"),
    "a number for a pattern": ({"keep_float": [5]}, ExportError, "a pattern that is no text"),
    "a number for a list": ({"keep_float": 5}, ExportError, "keep_float is int"),
    "full_range": ({"full_range": 1}, ExportError, "full_range is int"),
    "tokenizer": ({"tokenizer": 5}, ExportError, "tokenizer is 5"),
    "progress": ({"progress": None}, ExportError, "progress is NoneType"),
    "nothing": ({"keep_float": ("*",)}, ExportError, "no linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_leave_nothing(
    bundle: MakeBundle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"input_ids": [3, 4]}\n{"input\n')
    Path("one.jsonl").write_text('{"input_ids": [3, 4]}\n')
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        quantize(bundle(), "made", **{"calibration": text, **options})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "one.jsonl"]


def test_the_bundle_itself_is_refused_as_the_output(
    bundle: MakeBundle, text: Path, tmp_path: Path, mount: Callable[..., None]
) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    folder = shutil.copytree(bundle(), tmp_path / "in" / "bundle")
    mount("--bind", tmp_path / "in", tmp_path / "out")
    for output in (folder, tmp_path / "out" / "bundle"):
        with pytest.raises(ExportError, match="would be lost"):
            quantize(folder, output, calibration=text)
        with pytest.raises(ExportError, match="would be lost"):
            relayout(folder, output)
    assert Manifest.read(folder).signature.precision == "fp32"


def test_only_float32_bundles_are_taken(bundle: MakeBundle, int8: Any, text: Path, tmp_path: Path) -> None:
    for folder in (bundle(precision="fp16"), int8()):
        with pytest.raises(ExportError, match="int8 is made from an fp32 bundle"):
            quantize(folder, tmp_path / "made", calibration=text)
    with pytest.raises(ArtifactError, match="does not exist"):
        quantize(tmp_path / "none", tmp_path / "made", calibration=text)


def test_a_multiple_choice_bundle_is_refused(bundle: MakeBundle, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="multiple-choice cannot be calibrated"):
        quantize(bundle("multiple-choice"), tmp_path / "made", calibration=text)
    assert not (tmp_path / "made").exists()


def test_another_models_bundle_is_refused_by_name(int8: Any) -> None:
    quantization = Manifest.read(int8()).quantization
    wrong = {**quantization, "layers": {"encoder.layer.9.output.dense": {"scale": 1.0, "zero_point": 0}}}
    with pytest.raises(ArtifactError, match=r"encoder\.layer\.9\.output\.dense"):
        int8_runner(tiny_model(), wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 5},
        {"layers": {"encoder.layer.0.output.dense": {}}},
        {"layers": {"encoder.layer.0.output.dense": {"scale": "x", "zero_point": 0}}},
        {"layers": {"encoder.layer.0.output.dense": {"scale": 0.0, "zero_point": 0}}},
        {"layers": {"encoder.layer.0.output.dense": {"scale": 1e400, "zero_point": 0}}},
        {"layers": {"encoder.layer.0.output.dense": {"scale": 1.0, "zero_point": 10**30}}},
    ],
)
def test_broken_steps_of_a_manifest_are_refused(int8: Any, change: dict[str, Any]) -> None:
    quantization = Manifest.read(int8()).quantization
    with pytest.raises(ArtifactError, match="quantize the model again"):
        int8_runner(tiny_model(), {**quantization, **change})
    with pytest.raises(ArtifactError, match="quantize the model again"):
        int8_runner(tiny_model(), {})


def test_more_samples_than_windows_take_them_all(bundle: MakeBundle, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [5 + i, 6, 7]}) + "\n" for i in range(4)))
    quantized = quantize(bundle(), tmp_path / "int8", calibration=path, samples=10**12)
    assert Manifest.read(quantized).quantization["calibration"]["windows"] == 4


def test_it_is_quantized_in_its_own_folder(
    bundle: MakeBundle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle())
    quantize(".", tmp_path / "made", calibration=text, samples=4)
    quantize(bundle(), tmp_path / "other", calibration=text, samples=4)
    assert Manifest.read(tmp_path / "made") == Manifest.read(tmp_path / "other")


def test_a_named_tokenizer_folder_is_read_as_it_is(bundle: MakeBundle, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle(), tmp_path / "with a tokenizer put beside it")
    manifest = Manifest.read(folder)
    files = {name: entry for name, entry in manifest.files.items() if "token" not in name}
    data = dataclasses.replace(manifest, files=files).to_dict()
    (folder / "lfx.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"is not listed in lfx\.json"):
        quantize(folder, tmp_path / "refused", calibration=text)
    quantized = quantize(bundle(), tmp_path / "made", calibration=text, tokenizer=folder)
    assert Manifest.read(quantized).quantization["calibration"]["windows"] > 1
