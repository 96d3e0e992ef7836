"""int8 of LEDs: both graphs of a model that writes texts, with its texts beside float32's."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import external_data_helper, numpy_helper

from lfx.cli import cli
from lfx.errors import ArtifactError, ExportError, InputError, ParityError
from lfx.export import export
from lfx.export.quantize import _layers, quantize
from lfx.export.quantize.generation import compare_texts
from lfx.export.validate import compare_engine
from lfx.files import copy
from lfx.manifest import WEIGHTS, Manifest
from lfx.parity import quick_cases
from lfx.runtime import Engine
from lfx.runtime.model_card import model_card
from tests.conftest import MakeBundle, MakeLed, MakeOnce
from tests.marks import fast_if
from tests.models import VOCAB_SIZE, tiny_led

FILES = ("encoder_model.onnx", "decoder_model.onnx")
GREEDY: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False}
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "no_repeat_ngram_size": 3}
ENCODER_LAYER = ("longformer_self_attn.query", "longformer_self_attn.key", "longformer_self_attn.value", "output")
LAYERS = {
    FILES[0]: [
        *(f"led.encoder.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ENCODER_LAYER),
        *(f"led.encoder.layers.{i}.{name}" for i in (0, 1) for name in ("fc1", "fc2")),
        *(f"led.decoder.layers.{i}.encoder_attn.{name}_proj" for i in (0, 1) for name in "kv"),
    ],
    FILES[1]: [
        *(f"led.decoder.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj", "v_proj")),
        *(f"led.decoder.layers.{i}.{part}.out_proj" for i in (0, 1) for part in ("self_attn", "encoder_attn")),
        *(f"led.decoder.layers.{i}.encoder_attn.q_proj" for i in (0, 1)),
        *(f"led.decoder.layers.{i}.{name}" for i in (0, 1) for name in ("fc1", "fc2")),
        "lm_head",
    ],
}
Int8 = Callable[..., Path]


def windows_of(path: Path) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    random = np.random.default_rng(0)
    rows = [random.integers(3, VOCAB_SIZE, int(n)).tolist() for n in random.integers(5, 120, 12)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def int8(led_bundle: MakeLed, made_once: MakeOnce, text: Path) -> Int8:
    """int8(**export options) returns the quantized bundle, which tests only read; `activations` is quantize's."""

    def make(activations: str = "uint8", **options: Any) -> Path:
        def fill(folder: Path) -> None:
            source = led_bundle(7, **options)[1]
            quantize(source, folder / "int8", calibration=text, activations=activations, generate=OPTIONS)

        name = ",".join(["led-int8", activations, *(f"{key}={value}" for key, value in options.items())])
        return made_once(name, fill) / "int8"

    return make


def graph_of(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / name, load_external_data=False)


def places(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """Return the file, offset and length of each external weight."""
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    return {name: (e["location"], int(e["offset"]), int(e["length"])) for name, e in entries.items()}


def test_the_linear_layers_of_both_graphs_are_int8(int8: Int8) -> None:
    folder = int8()
    for name in FILES:
        model = graph_of(folder, name)
        onnx.checker.check_model(folder / name, full_check=True)
        weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
        assert sorted(t.name.removesuffix(".weight.T_quantized") for t in weights) == sorted(LAYERS[name])
        signature = json.loads({p.key: p.value for p in model.metadata_props}["lfx"])
        assert (signature["precision"], signature["weight_bits"]) == ("int8", 7)
    manifest = Manifest.read(folder)
    assert sorted(manifest.quantization["layers"]) == sorted(LAYERS[FILES[0]] + LAYERS[FILES[1]])
    assert manifest.quantization["generate"] == {**OPTIONS, **GREEDY}


def test_both_graphs_read_one_file_with_each_weight_once(int8: Int8, led_bundle: MakeLed) -> None:
    folder, original = int8(), led_bundle()[1]
    assert Manifest.read(folder).files.keys() == Manifest.read(original).files.keys()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in original.iterdir())
    encoder, decoder = (places(graph_of(folder, name)) for name in FILES)
    assert encoder["led.shared.weight"] == decoder["led.shared.weight"]
    stored = {*encoder.values(), *decoder.values()}
    assert {place[0] for place in stored} == {WEIGHTS}
    assert sum(length for _, _, length in stored) == (folder / WEIGHTS).stat().st_size
    readers = Counter(n.op_type for n in graph_of(folder, FILES[1]).graph.node if "led.shared.weight" in n.input)
    assert readers == {"Gather": 1}  # the embeddings stay float32; the head that is tied to them has int8 values
    head = "lm_head.weight.T_quantized"
    assert decoder[head] not in encoder.values()
    assert decoder[head][2] == encoder["led.shared.weight"][2] // 4
    graph = graph_of(folder, FILES[1]).graph
    assert {t.name for t in graph.initializer} <= {name for node in graph.node for name in node.input}
    unread = {name for node in graph.node for name in node.output} - {
        name for node in graph.node for name in node.input
    }
    assert unread <= {output.name for output in graph.output}


def test_only_products_read_int8_values(int8: Int8) -> None:
    for name in FILES:
        graph = graph_of(int8(), name).graph
        constants = {t.name for t in graph.initializer}
        rounded = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants}
        assert rounded
        assert {node.op_type for node in graph.node if rounded & set(node.input)} == {"MatMul"}
        assert not rounded & {output.name for output in graph.output}


def test_the_decoder_is_calibrated_on_the_texts_of_the_float32_model(
    int8: Int8, led_bundle: MakeLed, text: Path
) -> None:
    """The scales are the ranges of a layer's input in PyTorch over every second document and its text."""
    model, folder = led_bundle()
    names = ("led.decoder.layers.1.fc1", "led.decoder.layers.0.encoder_attn.q_proj")
    ranges = {name: [0.0, 0.0] for name in names}
    hooks = []
    for name in names:

        def widen(_: Any, inputs: tuple[torch.Tensor, ...], limits: list[float] = ranges[name]) -> None:
            limits[:] = [min(limits[0], float(inputs[0].min())), max(limits[1], float(inputs[0].max()))]

        hooks.append(model.get_submodule(name).register_forward_pre_hook(widen))
    with Engine(folder, threads=1) as engine, torch.no_grad():
        for ids in windows_of(text)[::2]:
            tokens = torch.from_numpy(engine.generate(ids, **OPTIONS))
            inputs = torch.tensor([ids])
            mask = torch.zeros_like(inputs)
            mask[:, 0] = 1
            model(inputs, global_attention_mask=mask, decoder_input_ids=tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    layers = Manifest.read(int8()).quantization["layers"]
    for name, (low, high) in ranges.items():
        assert layers[name]["scale"] == pytest.approx((high - low) / 255, rel=1e-4)


@fast_if(lambda backend, options: backend == "onnxruntime" and not options)
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("onnxruntime", {}),
        ("openvino", {}),
        ("onnxruntime", {"activations": "int8", "opset": 21}),
        ("openvino", {"activations": "int8", "opset": 21}),
        ("onnxruntime", {"inline_functions": True}),
    ],
    ids=str,
)
def test_both_graphs_compute_what_int8_should(
    backend: str, options: dict[str, Any], int8: Int8, led_bundle: MakeLed
) -> None:
    pytest.importorskip(backend)
    folder = int8(**options)
    with Engine(folder, backend, threads=1) as engine:
        quantization = Manifest.read(folder).quantization
        report = compare_engine(engine, led_bundle()[0], quick_cases, lambda step: None, quantization=quantization)
    assert report.precision == "int8"
    assert not report.failures()
    assert {"last_hidden_state", "first_logits", "logits", "present.1.decoder.value"} <= report.outputs.keys()
    for result in report.outputs.values():
        assert result.cosine() > 0.97
        assert result.error > 1e-4  # the int8 model differs from the float32 model


@pytest.mark.parametrize("layer", ["layers.1.fc1", "layers.0.self_attn.v_proj"])
def test_a_decoders_layer_with_half_its_weights_is_found(
    layer: str, int8: Int8, led_bundle: MakeLed, tmp_path: Path
) -> None:
    folder = shutil.copytree(int8(), tmp_path / "half")
    model = graph_of(folder, FILES[1])
    (scale,) = (t for t in model.graph.initializer if t.name == f"led.decoder.{layer}.weight.T_scale")
    if scale.external_data:
        external_data_helper.load_external_data_for_tensor(scale, str(folder))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 2, scale.name))
    onnx.save(model, folder / FILES[1])
    quantization = Manifest.read(folder).quantization
    (folder / "lfx.json").unlink()  # which would refuse the changed file
    with Engine(folder / FILES[0], threads=1) as engine:
        report = compare_engine(engine, led_bundle()[0], quick_cases, lambda step: None, quantization=quantization)
    with pytest.raises(ParityError, match="root mean square"):
        report.require()


def test_the_texts_are_compared_on_documents_that_did_not_calibrate(
    int8: Int8, led_bundle: MakeLed, text: Path
) -> None:
    written = []
    for folder in (led_bundle()[1], int8()):
        with Engine(folder) as engine:
            written.append([engine.generate(ids, **OPTIONS) for ids in windows_of(text)[1::2]])
    expected = compare_texts(*written)
    accuracy = Manifest.read(int8()).quantization["accuracy"]
    assert accuracy["texts"] == expected
    assert (expected["texts"], expected["tokens"] > 12) == (6, True)
    outputs = accuracy["outputs"]
    assert {"last_hidden_state", "present.0.encoder.key", "first_logits", "logits"} <= outputs.keys()
    assert 0 < outputs["logits"]["label_agreement"] <= 1  # of the next tokens after those of the float32 model
    assert outputs["logits"]["max_abs_error"] > 0


def test_tokens_agree_until_the_first_difference() -> None:
    expected = [np.array([row]) for row in ([2, 5, 6, 7, 2], [2, 5, 2], [2, 8, 9])]
    actual = [np.array([row]) for row in ([2, 5, 9, 7, 2], [2, 5, 2], [2, 7, 9, 2])]
    assert compare_texts(expected, actual) == {
        "texts": 3,
        "text_agreement": pytest.approx(1 / 3),
        "tokens": 8,
        "token_agreement": pytest.approx(3 / 8),
    }
    shorter = [np.array([[2, 5, 6, 2]])], [np.array([[2, 5, 2]])]
    assert compare_texts(*shorter)["token_agreement"] == pytest.approx(1 / 3)


@fast_if(lambda pattern: pattern == "led.decoder.*")
@pytest.mark.parametrize(
    ("pattern", "kept", "float_file"),
    [
        ("led.encoder.*", [n for n in LAYERS[FILES[0]] if ".encoder.layers." in n], None),
        ("led.decoder.*", ["lm_head", *(n for ns in LAYERS.values() for n in ns if ".decoder." in n)], FILES[1]),
        ("lm_head", ["lm_head"], None),
        ("*.encoder_attn.[kv]_proj", [n for n in LAYERS[FILES[0]] if "encoder_attn" in n], None),
    ],
)
def test_layers_are_kept_by_graph(
    pattern: str, kept: list[str], float_file: str | None, led_bundle: MakeLed, text: Path, tmp_path: Path
) -> None:
    folder = quantize(
        led_bundle()[1],
        tmp_path / "int8",
        calibration=text,
        samples=2,
        keep_float=[pattern],
        generate={"max_new_tokens": 2},
    )
    layers = Manifest.read(folder).quantization["layers"]
    assert sorted(layers) == sorted({*LAYERS[FILES[0]], *LAYERS[FILES[1]]} - {*kept})
    for name in FILES:
        graph = graph_of(folder, name).graph
        assert any(node.op_type == "QuantizeLinear" for node in graph.node) == (name != float_file)
    with Engine(folder) as engine:
        assert engine.generate(windows_of(text)[0], **OPTIONS).shape[0] == 1


def test_a_tied_head_is_kept_by_the_name_of_its_embedding(led_bundle: MakeLed) -> None:
    folder = led_bundle()[1]
    layers = _layers(folder, Manifest.read(folder), ["led.decoder.embed_tokens"])
    assert sorted(layers[FILES[1]].values()) == sorted({*LAYERS[FILES[1]]} - {"lm_head"})


@pytest.mark.slow
def test_a_graph_without_int8_layers_is_that_of_the_float32_bundle(
    led_bundle: MakeLed, text: Path, tmp_path: Path
) -> None:
    source = led_bundle()[1]
    options = {"calibration": text, "samples": 2, "keep_float": ["led.decoder.*"], "generate": {"max_new_tokens": 2}}
    folder = quantize(source, tmp_path / "int8", **options)
    before, after = (onnx.load(path / FILES[1]) for path in (source, folder))
    assert [node.SerializeToString() for node in before.graph.node] == [
        node.SerializeToString() for node in after.graph.node
    ]
    weights = [{t.name: numpy_helper.to_array(t) for t in model.graph.initializer} for model in (before, after)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_head_of_its_own_is_int8_and_compared_by_layer(text: Path, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": False, "encoder_layers": 1, "decoder_layers": 1, "attention_window": [8]}
    tiny_led(**changes).save_pretrained(tmp_path / "checkpoint")
    source = export(tmp_path / "checkpoint", tmp_path / "fp32")
    folder = quantize(source, tmp_path / "int8", calibration=text, samples=8, generate={"max_new_tokens": 8})
    assert "lm_head" in Manifest.read(folder).quantization["layers"]
    done = lfx("parity", folder, "--by-layer")
    assert done.exit_code == 0, done.output
    assert "int8: in tolerance" in done.stdout


def lfx(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command_prints_the_agreement(led_bundle: MakeLed, text: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", text, "--samples", 4, "--generate", "max_new_tokens=5", "--min-agreement", "0.01")
    done = lfx("quantize", led_bundle()[1], "--output", tmp_path / "int8", *arguments)
    assert done.exit_code == 0, done.output
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()[2:]]
    assert lines[:3] == ["last_hidden_state", "present.0 to 1.encoder.key", "present.0 to 1.encoder.value"]
    assert {"first_logits", "logits"} < {*lines}
    assert "texts of greedy search: " in done.stdout
    assert " of 2 are equal, and " in done.stdout
    assert "tokens come before the first difference" in done.stdout


def test_the_commands_take_the_int8_bundle(int8: Int8, led_bundle: MakeLed, text: Path, tmp_path: Path) -> None:
    folder = int8()
    assert lfx("verify", folder).exit_code == 0
    shown = lfx("inspect", folder)
    assert "texts equal to float32" in shown.stdout
    assert "present.0 to 1.encoder.key: cosine" in shown.stdout
    assert "texts of greedy search" in model_card(Manifest.read(folder), "someone/led")
    checkpoint = led_bundle()[1].parent / "checkpoint"
    for arguments in (
        ("parity", folder, "--source", checkpoint),
        ("bench", folder, "--length", 40, "--rounds", 1, "--new-tokens", 4),
        ("run", folder, "--input", text, "--output", tmp_path / "out.jsonl", "--generate", "max_new_tokens=4"),
    ):
        done = lfx(*arguments)
        assert done.exit_code == 0, done.output
    with Engine(folder) as engine:
        expected = [engine.generate(ids, max_new_tokens=4)[0].tolist() for ids in windows_of(text)]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["new_tokens"] for row in rows] == [len(tokens) - 1 for tokens in expected]


@pytest.mark.slow
def test_openvino_writes_texts_with_the_int8_bundle(int8: Int8, led_bundle: MakeLed, text: Path) -> None:
    pytest.importorskip("openvino")
    ids = windows_of(text)
    with Engine(int8(), "openvino", threads=1) as engine, Engine(led_bundle()[1], threads=1) as original:
        pairs = [(engine.generate(row, **OPTIONS), original.generate(row, **OPTIONS)) for row in ids]
    assert compare_texts([b for _, b in pairs], [a for a, _ in pairs])["token_agreement"] > 0.3


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an empty text": ({"calibration": "empty.txt"}, InputError, "empty"),
    "an empty file of documents": ({"calibration": "empty.jsonl"}, ExportError, "give a text of 2 or more"),
    "a short text": ({"calibration": "short.txt"}, ExportError, "give a text of 2 or more"),
    "a document that is too long": ({"calibration": "long.jsonl"}, InputError, r"long\.jsonl:2: .* above"),
    "beams": ({"generate": {"num_beams": 2}}, ExportError, "num_beams 2: int8 is calibrated and judged by greedy"),
    "sampling": ({"generate": {"do_sample": True}}, ExportError, "do_sample True: int8 is calibrated"),
    "an unknown option": ({"generate": {"beams": 2}}, InputError, "beams is no option of generate"),
    "too many tokens": ({"generate": {"max_new_tokens": 65}}, InputError, "max_new_tokens 65 is above"),
    "no dict": ({"generate": ["max_new_tokens"]}, ExportError, "generate is list; give a dict"),
    "a value that is not JSON": ({"generate": {"eos_token_id": {1}}}, ExportError, "a value that JSON does not have"),
    "an agreement out of range": ({"min_agreement": 1.5}, ExportError, "min_agreement 1.5 is out of range"),
    "an agreement of another type": ({"min_agreement": "1"}, ExportError, "min_agreement is '1'"),
    "a layer that is not there": ({"keep_float": ["led.decoder.layers.9.*"]}, ExportError, "matches no linear layer"),
    "all layers": ({"keep_float": ["*"]}, ExportError, "no linear layer to quantize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_leave_nothing(
    case: str, led_bundle: MakeLed, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("empty.jsonl").write_text("")
    Path("short.txt").write_text("the fox")
    Path("long.jsonl").write_text("".join(json.dumps({"input_ids": [5] * n}) + "\n" for n in (9, 1601)))
    files = {path.name for path in tmp_path.iterdir()}
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        quantize(led_bundle()[1], "made", **{"calibration": text, **options})
    assert {path.name for path in tmp_path.iterdir()} == files


def test_too_little_agreement_is_an_error_and_leaves_nothing(
    led_bundle: MakeLed, bundle: MakeBundle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"texts": 2, "text_agreement": 0.0, "tokens": 9, "token_agreement": 1 / 3}
    monkeypatch.setattr("lfx.export.quantize.compare_texts", lambda expected, actual: counts)
    options = {"calibration": text, "samples": 2}
    with pytest.raises(ParityError, match=r"33\.3% of the tokens of greedy search agree .* below the 40\.0%"):
        quantize(led_bundle()[1], tmp_path / "int8", min_agreement=0.4, generate={"max_new_tokens": 2}, **options)
    with pytest.raises(ExportError, match="min_agreement is for models with labels or texts"):
        quantize(bundle(), tmp_path / "int8", min_agreement=0.4, **options)
    with pytest.raises(ExportError, match=r"options of generation \(top_k\) are for models that write texts"):
        quantize(bundle(), tmp_path / "int8", generate={"top_k": 5}, **options)
    assert list(tmp_path.iterdir()) == []


def test_labels_may_be_asked_to_agree(bundle: MakeBundle, text: Path, tmp_path: Path) -> None:
    options = {"calibration": text, "samples": 4}
    folder = quantize(bundle("token-classification"), tmp_path / "int8", min_agreement=0.1, **options)
    share = Manifest.read(folder).quantization["accuracy"]["outputs"]["logits"]["label_agreement"]
    assert 0.1 <= share < 1
    with pytest.raises(ParityError, match=r"of the labels of logits agree .* below the 100\.0% of min_agreement"):
        quantize(bundle("token-classification"), tmp_path / "refused", min_agreement=1, **options)


@pytest.mark.parametrize("name", [*FILES, WEIGHTS])
def test_a_bundle_with_a_file_missing_or_changed_is_refused(
    name: str, led_bundle: MakeLed, text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(led_bundle()[1], tmp_path / "bundle")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} was changed after the export"):
        quantize(folder, tmp_path / "int8", calibration=text)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        quantize(folder, tmp_path / "int8", calibration=text)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_a_bundle_of_links_is_quantized_and_a_text_is_cut_into_windows(led_bundle: MakeLed, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "linked").mkdir()
    for path in led_bundle()[1].iterdir():
        copy(path, tmp_path / "own" / path.name)
        (tmp_path / "linked" / path.name).symlink_to(tmp_path / "own" / path.name)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    folder = quantize(
        tmp_path / "linked", calibration=tmp_path / "text.txt", output=tmp_path / "int8", samples=4, generate=OPTIONS
    )
    quantization = Manifest.read(folder).quantization
    assert quantization["calibration"]["windows"] >= 4
    assert len(quantization["layers"]) == sum(map(len, LAYERS.values()))
