"""The layout hf of a model that writes texts: its files and names, in Engine and in other runtimes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lfx.errors import ArtifactError, BuildError, ExportError, ParityError
from lfx.export import export, relayout
from lfx.export.merged_decoder import merge_cross_attention
from lfx.export.quantize import quantize
from lfx.export.validate import compare_engine
from lfx.manifest import MANIFEST, Manifest
from lfx.parity import quick_cases
from lfx.runtime import Engine, build_engine
from tests.conftest import MakeLed, MakeOnce
from tests.runtime.generation.led import tiny_led
from tests.runtime.generation.test_other_runtimes import in_onnxruntime, in_openvino

HEADS, HEAD_SIZE, LAYERS = 2, 8, 2  # of the tiny LED
IDS = np.random.default_rng(3).integers(3, 90, (3, 50))
MASK = np.ones_like(IDS)
MASK[1, 20:] = 0


@pytest.fixture(scope="module")
def bundle(led_bundle: MakeLed) -> Path:
    """The bundle of a tiny LED."""
    return led_bundle(7)[1]


@pytest.fixture(scope="module")
def layout(bundle: Path, made_once: MakeOnce) -> Path:
    """The bundle in the layout hf."""
    return made_once("led-hf", lambda new: relayout(bundle, new / "hf")) / "hf"


def test_files_and_names_are_those_of_optimum(layout: Path) -> None:
    assert sorted(path.name for path in (layout / "onnx").iterdir()) == [
        "decoder_model_merged.onnx",
        "encoder_model.onnx",
    ]
    assert {"config.json", "generation_config.json", "tokenizer.json", MANIFEST} <= {p.name for p in layout.iterdir()}
    encoder, decoder = (onnx.load(layout / "onnx" / f"{n}.onnx") for n in ("encoder_model", "decoder_model_merged"))
    for model in (encoder, decoder):
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain for entry in model.opset_import} == {""}
        assert not model.functions
        assert "If" not in {node.op_type for node in model.graph.node}
    assert [value.name for value in encoder.graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.graph.output] == ["last_hidden_state"]
    assert not [tensor.name for tensor in encoder.graph.initializer if "encoder_attn" in tensor.name]
    parts = [
        f"{i}.{part}.{name}" for i in range(LAYERS) for part in ("decoder", "encoder") for name in ("key", "value")
    ]
    inputs = ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    assert [value.name for value in decoder.graph.input] == inputs + [f"past_key_values.{part}" for part in parts]
    assert [value.name for value in decoder.graph.output] == ["logits", *(f"present.{part}" for part in parts)]
    axes = {value.type.tensor_type.shape.dim[0].dim_param for value in decoder.graph.input}
    assert axes == {"batch_size"}  # the name that transformers.js knows


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engine_writes_the_bundle_s_texts(backend: str, layout: Path, bundle: Path) -> None:
    pytest.importorskip(backend)
    sequences = [IDS[0], IDS[1, :9], IDS[2, :31]]
    with Engine(bundle) as engine, Engine(layout, backend) as other:
        for beams in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            options: dict[str, Any] = {"max_new_tokens": 14, **beams}
            for given in ((IDS, MASK), (IDS[:1],), (sequences,)):
                np.testing.assert_array_equal(other.generate(*given, **options), engine.generate(*given, **options))
        np.testing.assert_allclose(
            other.run(IDS, MASK)["last_hidden_state"], engine.run(IDS, MASK)["last_hidden_state"], rtol=0, atol=1e-5
        )


def test_a_folder_that_has_the_layout_already_is_taken(layout: Path, bundle: Path, tmp_path: Path) -> None:
    again = relayout(layout, tmp_path / "again")
    assert sorted(path.name for path in (again / "onnx").iterdir()) == sorted(
        p.name for p in (layout / "onnx").iterdir()
    )
    with Engine(again) as engine, Engine(bundle) as other:
        np.testing.assert_array_equal(engine.generate(IDS[:1]), other.generate(IDS[:1]))


def test_the_file_of_the_encoder_has_the_options_and_the_tokenizer_of_its_bundle(layout: Path, tmp_path: Path) -> None:
    with Engine(layout) as engine, Engine(layout / "onnx" / "encoder_model.onnx") as other:
        assert other.manifest is None
        assert other.generation_settings() == engine.generation_settings()
        assert engine.generation_settings().eos_token_ids == (2,)
        np.testing.assert_array_equal(other.generate("the fox"), engine.generate("the fox"))
    shutil.copytree(layout / "onnx", tmp_path / "onnx")
    message = r"has neither generation_config.json nor config.json, so the token that ends a text is not known"
    with Engine(tmp_path / "onnx" / "encoder_model.onnx") as alone, pytest.raises(ArtifactError, match=message):
        alone.generate([[5, 6, 7]])


@pytest.mark.parametrize("open_file", [in_onnxruntime, in_openvino])
def test_a_client_with_optimum_s_loop_writes_the_same_texts(open_file: Any, layout: Path, bundle: Path) -> None:
    """The loop of optimum's ORTDecoderForSeq2Seq: empty caches at first, and the first call's cross-attention later."""
    encoder, decoder = (open_file(layout / "onnx" / f"{n}.onnx") for n in ("encoder_model", "decoder_model_merged"))
    rows, new_tokens = len(IDS), 12
    hidden = encoder({"input_ids": IDS, "attention_mask": MASK})["last_hidden_state"]
    empty = np.zeros((rows, HEADS, 0, HEAD_SIZE), np.float32)
    parts = [(i, part, name) for i in range(LAYERS) for part in ("decoder", "encoder") for name in ("key", "value")]
    cache = {f"past_key_values.{i}.{part}.{name}": empty for i, part, name in parts}
    tokens = np.full((rows, 1), 2)
    for step in range(new_tokens):
        inputs = {"input_ids": tokens[:, -1:], "encoder_attention_mask": MASK, "encoder_hidden_states": hidden}
        outputs = decoder({**inputs, **cache})
        for name in cache:
            if ".decoder." in name or step == 0:
                cache[name] = outputs[name.replace("past_key_values", "present")]
        logits = outputs["logits"][:, -1]
        logits[:, 2] = -np.inf  # no row ends
        tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], axis=1)
    with Engine(bundle) as engine:
        expected = engine.generate(IDS, MASK, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=2)
    np.testing.assert_array_equal(tokens, expected)


def test_parity_compares_both_graphs(layout: Path, led_bundle: MakeLed) -> None:
    with Engine(layout) as engine:
        report = compare_engine(engine, led_bundle(7)[0], quick_cases, lambda step: None)
    assert report.failures() == []
    assert {"logits", "present.1.encoder.value", "present.0.decoder.key"} <= set(report.outputs)


@pytest.mark.slow
def test_half_precision_stands_beside_float32_with_its_own_data(
    bundle: Path, led_bundle: MakeLed, tmp_path: Path
) -> None:
    made = shutil.copytree(led_bundle(7, precision="fp16")[1], tmp_path / "half")
    settings = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": LAYERS}))  # as transformers 5.3 does
    Manifest.read(made).write(made)
    folder = relayout(bundle, tmp_path / "hf", others=[made], external_data=True)
    stems = [f"{name}{ending}" for name in ("decoder_model_merged", "encoder_model") for ending in ("", "_fp16")]
    files = [f"{stem}.onnx{data}" for stem in stems for data in ("", "_data")]
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == sorted(files)
    config = json.loads((folder / "config.json").read_text())
    with_data = config["transformers.js_config"]["use_external_data_format"]
    assert with_data == {f"{stem}.onnx": 1 for stem in stems}
    with (
        Engine(folder / "onnx" / "encoder_model_fp16.onnx") as half,
        Engine(led_bundle(7, precision="fp16")[1]) as other,
    ):
        options = {"max_new_tokens": 8, "eos_token_id": 2, "decoder_start_token_id": 2}
        np.testing.assert_array_equal(half.generate(IDS, **options), other.generate(IDS, **options))


@pytest.mark.slow
def test_an_export_in_the_layout_writes_the_bundle_s_texts(bundle: Path, led_bundle: MakeLed, tmp_path: Path) -> None:
    folder = export(led_bundle(7)[0], tmp_path / "hf", layout="hf", model_type="bart")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bart"
    with Engine(folder) as engine, Engine(bundle) as other:
        assert engine.signature.global_attention == "first"
        np.testing.assert_array_equal(engine.generate(IDS, max_new_tokens=9), other.generate(IDS, max_new_tokens=9))


def test_an_input_on_which_kernels_round_apart_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """The logits of one of the cases differ by 3.4e-5 between lfx's kernels and the functions, which are inlined."""
    changes = {"d_model": 32, "encoder_attention_heads": 4, "decoder_ffn_dim": 8, "attention_window": [6, 6]}
    tokens = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"max_encoder_position_embeddings": 130, "max_decoder_position_embeddings": 16}
    bundle = export(tiny_led(21, std=0.3, **changes, **tokens, **sizes), tmp_path / "led")
    assert relayout(bundle, tmp_path / "hf").is_dir()


def test_a_decoder_that_is_wrong_is_not_written(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(encoder: Any, *arguments: Any) -> Any:
        outputs = {value.name: value for value in encoder.graph.outputs}
        key, value = outputs["present.0.encoder.key"], outputs["present.0.encoder.value"]
        key.name, value.name = value.name, key.name
        return merge_cross_attention(encoder, *arguments)

    monkeypatch.setattr("lfx.export.layout_models.merge_cross_attention", swapped)
    with pytest.raises(ParityError, match=r"encoder_model\.onnx: first_logits differs from the bundle's by"):
        relayout(bundle, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_commands_that_need_the_bundle_refuse_the_layout(layout: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="quantize the bundle that it was made from"):
        quantize(layout, tmp_path / "int8", calibration=tmp_path / "text.txt")
    with pytest.raises(BuildError, match="is in the layout hf; build from the bundle that it was made from"):
        build_engine(layout, tmp_path / "one.plan", flavor="tensorrt-rtx", target="sm89")


def test_a_fixed_global_token_is_in_the_manifest(layout: Path) -> None:
    signature = Manifest.read(layout).signature
    assert (signature.global_attention, [spec.name for spec in signature.inputs]) == (
        "first",
        ["input_ids", "attention_mask"],
    )
    assert signature.decoder is not None
    assert signature.decoder.model_file == "decoder_model_merged.onnx"
