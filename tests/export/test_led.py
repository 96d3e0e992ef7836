"""LEDForConditionalGeneration as a bundle: its two graphs, their weights, and their numbers against Hugging Face's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers.models.led import modeling_led as led

from lfx.errors import ArtifactError, ExportError, ParityError
from lfx.export import export, generation
from lfx.export.companions import check_generation_config
from lfx.export.led import cache_names
from lfx.export.load import load
from lfx.export.teacher_forcing import empty_cache, load_decoder
from lfx.export.validate import compare_engine
from lfx.manifest import WEIGHTS, Manifest
from lfx.parity import Arrays, quick_cases
from lfx.runtime import Engine
from lfx.runtime.artifact import open_artifact
from lfx.signature import PAST, PRESENT, TEXT_GENERATION, Decoder, TensorSpec
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import VOCAB_SIZE, save_tiny_checkpoint, tiny_led
from tests.runtime.generation.led import random_inputs, torch_generate
from tests.runtime.generation.ties import check_same

FILES = ("encoder_model.onnx", "decoder_model.onnx")


def _graph(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / name, load_external_data=False)


def _places(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """Return where each external weight of a model is stored."""
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Any:
    with Engine(bundle(TEXT_GENERATION), threads=1) as opened:
        yield opened


def test_the_bundle_has_two_graphs_and_one_file_of_weights(bundle: MakeBundle) -> None:
    folder = bundle(TEXT_GENERATION)
    manifest = Manifest.read(folder)
    others = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert manifest.files.keys() == {*FILES, WEIGHTS, *others}
    assert manifest.model_file == FILES[0]
    for name in FILES:
        model = _graph(folder, name)
        onnx.checker.check_model(folder / name, full_check=True)
        assert json.loads({p.key: p.value for p in model.metadata_props}["lfx"])["task"] == TEXT_GENERATION
        assert {place["location"] for place in _places(model).values()} == {WEIGHTS}


def test_the_signature_describes_both_graphs(bundle: MakeBundle) -> None:
    signature = Manifest.read(bundle(TEXT_GENERATION)).signature
    assert signature.architecture == "LEDForConditionalGeneration"
    assert (signature.default_global, signature.max_seqlen, signature.vocab_size) == ("first", 128, VOCAB_SIZE)
    assert signature.attention_windows == (4, 8)
    cross = tuple(
        TensorSpec(name, "float32", ("batch", 4, "sequence", 8)) for name in cache_names(PRESENT, 2, "encoder")
    )
    states = TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 32))
    assert signature.outputs == (states, *cross)
    decoder = signature.decoder
    assert decoder is not None
    assert (decoder.model_file, decoder.max_tokens, decoder.decoder_start_token_id) == (FILES[1], 40, 2)
    assert [spec.name for spec in decoder.inputs] == [
        "input_ids",
        "encoder_attention_mask",
        *cache_names(PAST, 2, "decoder"),
        *cache_names(PAST, 2, "encoder"),
    ]
    assert decoder.outputs[0] == TensorSpec("logits", "float32", ("batch", "tokens", VOCAB_SIZE))
    assert [spec.name for spec in decoder.outputs[1:]] == cache_names(PRESENT, 2, "decoder")
    assert Decoder.from_dict(json.loads(json.dumps(signature.to_dict()["decoder"]))) == decoder
    for name, value in (("max_tokens", 0), ("decoder_start_token_id", -1)):
        with pytest.raises(ValueError, match=rf"the decoder's {name} {value} is out of range"):
            Decoder.from_dict({**signature.to_dict()["decoder"], name: value})


def test_the_graphs_have_the_inputs_and_outputs_of_the_signature(bundle: MakeBundle) -> None:
    folder = bundle(TEXT_GENERATION)
    signature = Manifest.read(folder).signature
    assert signature.decoder is not None
    for name, part in zip(FILES, (signature, signature.decoder), strict=True):
        graph = _graph(folder, name).graph
        for values, specs in ((graph.input, part.inputs), (graph.output, part.outputs)):
            assert [value.name for value in values] == [spec.name for spec in specs]
            for value, spec in zip(values, specs, strict=True):
                axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                assert axes == [0 if axis == "past + tokens" else axis for axis in spec.shape]
                assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == spec.dtype


def test_the_decoder_is_one_path_of_standard_ops(bundle: MakeBundle) -> None:
    model = _graph(bundle(TEXT_GENERATION), FILES[1])
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert len(model.graph.node) <= 160
    names = {node.name for node in model.graph.node}
    assert "led.decoder.layers.1.encoder_attn.q_proj/MatMul" in names


def test_the_encoder_has_an_attention_node_for_each_layer(bundle: MakeBundle) -> None:
    nodes = [n for n in _graph(bundle(TEXT_GENERATION), FILES[0]).graph.node if n.op_type == "BandedAttention"]
    windows = [next(a.i for a in node.attribute if a.name == "window") for node in nodes]
    assert windows == [4, 8]


def test_shared_weights_are_stored_once(bundle: MakeBundle) -> None:
    folder = bundle(TEXT_GENERATION)
    encoder, decoder = (_places(_graph(folder, name)) for name in FILES)
    assert encoder["led.shared.weight"] == decoder["led.shared.weight"]
    stored = sum(int(place["length"]) for place in encoder.values())
    stored += sum(int(place["length"]) for name, place in decoder.items() if name != "led.shared.weight")
    assert (folder / WEIGHTS).stat().st_size == stored
    assert stored <= sum(p.numel() * 4 for p in tiny_led().parameters())  # each parameter at most once
    heads = [node for node in _graph(folder, FILES[1]).graph.node if "led.shared.weight" in node.input]
    assert sorted(node.op_type for node in heads) == ["Gather", "Gemm"]


@pytest.mark.slow
def test_the_options_of_generation_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "checkpoint", TEXT_GENERATION)
    options = {"num_beams": 3, "no_repeat_ngram_size": 2, "decoder_start_token_id": 2}
    text = json.dumps({**options, "custom_generate": "someone/code"})
    (folder / "generation_config.json").write_text(text)
    made = export(folder, tmp_path / "bundle")
    written = json.loads((made / "generation_config.json").read_text())
    assert written.items() >= options.items()
    assert "custom_generate" not in written


def test_options_of_generation_in_the_config_of_a_module_are_refused(tmp_path: Path) -> None:
    """Hugging Face refuses to generate with them; without a word their absence would give other texts."""
    model = tiny_led()
    model.config.num_beams, model.config.max_length, model.config.do_sample = 4, 30, False
    model.generation_config.max_length = 30
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ExportError, match=r"config sets num_beams, which .* set them in model.generation_config"):
        export(model, tmp_path / "bundle")
    model.generation_config.num_beams = 4
    check_generation_config(model)
    check_generation_config(tiny_led())


def _torch_logits(model: Any, inputs: Arrays, ids: Any) -> Any:
    """Return Hugging Face's logits for decoder ids, each token with the cache of those before it."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    logits, cache, states = [], None, None
    with torch.no_grad():
        for i in range(ids.shape[1]):
            step = torch.from_numpy(ids[:, i : i + 1])
            out = model(
                **tensors, encoder_outputs=states, decoder_input_ids=step, past_key_values=cache, use_cache=True
            )
            cache, states = out.past_key_values, led.LEDEncoderBaseModelOutput(out.encoder_last_hidden_state)
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("steps", [[1] * 10, [10], [1, 9], [4, 1, 5], [9, 1]], ids=str)
@pytest.mark.parametrize("length", [1, 7, 17, 100])
def test_tokens_may_come_in_calls_of_any_length(engine: Engine, length: int, steps: list[int]) -> None:
    """The logits are Hugging Face's, which get one token a call, whatever the number of tokens of each call."""
    random = np.random.default_rng(length)
    inputs = {
        "input_ids": random.integers(4, VOCAB_SIZE, (3, length)),
        "attention_mask": np.ones((3, length), np.int64),
        "global_attention_mask": (random.random((3, length)) < 0.1).astype(np.int64),
    }
    inputs["attention_mask"][1, length // 2 + 1 :] = 0
    ids = np.concatenate([np.full((3, 1), 2), random.integers(4, VOCAB_SIZE, (3, 9))], axis=1)
    expected = _torch_logits(tiny_led(), inputs, ids)
    encoded = engine.run(*inputs.values())
    decoder, spec = load_decoder(engine), engine.signature.decoder
    assert spec is not None
    cache: Arrays = empty_cache(spec, 3)
    cache |= {n.replace(PRESENT, PAST): np.asarray(encoded[n]) for n in cache_names(PRESENT, 2, "encoder")}
    logits, start = [], 0
    for size in steps:
        feeds = {"input_ids": ids[:, start : start + size], "encoder_attention_mask": inputs["attention_mask"]}
        outputs = decoder.infer({**feeds, **cache})
        logits.append(outputs.pop("logits"))
        assert all(array.shape == (3, 4, start + size, 8) for array in outputs.values())
        cache |= {name.replace(PRESENT, PAST): array for name, array in outputs.items()}
        start += size
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "decoder_layers": 1},
        {"activation_function": "relu", "encoder_layers": 1, "decoder_layers": 3, "attention_window": [4]},
        {"encoder_attention_heads": 4, "decoder_attention_heads": 1, "attention_window": [12, 4]},
        {"max_encoder_position_embeddings": 37, "max_decoder_position_embeddings": 1},
        {"pad_token_id": 7, "decoder_start_token_id": 0},
    ],
    ids=str,
)
def test_models_of_other_settings_are_right(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_led(seed=1, **changes)
    with Engine(export(model, tmp_path / "bundle"), threads=1) as engine:
        report = compare_engine(engine, model, quick_cases, lambda step: None)
        assert not report.failures()
        longest = engine.signature.max_seqlen
        positions, windows = model.config.max_encoder_position_embeddings, model.config.attention_window
        assert longest == positions // max(windows) * max(windows)
        assert max(case.seqlen for case, _ in report.rows) <= longest
        if model.config.max_decoder_position_embeddings > 1:  # the beams of one text share its keys and values
            feeds = random_inputs(np.random.default_rng(0), 1, 20, "first")
            options = {"num_beams": 3, "max_new_tokens": 6}
            ours = engine.generate(feeds["input_ids"], **options)
            theirs = torch_generate(model, feeds, **options)
            check_same(ours, theirs, model, feeds, engine.generation_settings(**options))


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(("precision", "backend"), [("fp16", "onnxruntime"), ("bf16", "openvino")])
def test_half_precisions_are_within_the_derived_tolerance(
    precision: str, backend: str, opset: int, bundle: MakeBundle
) -> None:
    with Engine(bundle(TEXT_GENERATION, precision=precision, opset=opset), backend, threads=1) as engine:
        report = compare_engine(engine, tiny_led(), quick_cases, lambda step: None)
        assert not report.failures()
        decoder = engine.signature.decoder
        assert decoder is not None
        caches = {spec.dtype for spec in (*decoder.inputs, *decoder.outputs) if "key" in spec.name}
        assert caches == {"float16" if precision == "fp16" else "float32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"max_global": 5}, {"global_attention": "first"}, {"global_attention": "none"}], ids=str
)
def test_every_mode_of_global_attention_agrees_with_pytorch(options: dict[str, Any], bundle: MakeBundle) -> None:
    with Engine(bundle(TEXT_GENERATION, **options), threads=1) as engine:
        assert not compare_engine(engine, tiny_led(), quick_cases, lambda step: None).failures()


@pytest.mark.slow
def test_a_wrong_decoder_is_out_of_tolerance_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(module: Any, *arguments: Any) -> Any:
        layer = module.model.led.decoder.layers[1]
        layer.fc1.bias = nn.Parameter(layer.fc1.bias + 1e-2)
        return original(module, *arguments)

    original = generation._trace_decoder
    monkeypatch.setattr(generation, "_trace_decoder", spoiled)
    with pytest.raises(ParityError, match=r"first_logits: error .* is above the tolerance"):
        export(tiny_led(), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*FILES, WEIGHTS])
def test_a_bundle_with_a_file_missing_or_changed_is_refused(name: str, bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle(TEXT_GENERATION), tmp_path / "bundle")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} was changed after the export"):
        open_artifact(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_artifact(folder)


def test_a_decoder_of_another_model_is_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle(TEXT_GENERATION), tmp_path / "bundle")
    shutil.copyfile(bundle(TEXT_GENERATION, max_global=5) / FILES[1], folder / FILES[1])
    Manifest.read(folder).write(folder)
    with pytest.raises(ArtifactError, match=r"lfx.json says max_global None where decoder_model.onnx says 5"):
        open_artifact(folder)
    (folder / FILES[1]).unlink()
    Manifest.read(folder).write(folder)
    with pytest.raises(ArtifactError, match=r"lists no decoder_model.onnx"):
        open_artifact(folder)


@pytest.mark.slow
def test_a_subclass_of_the_self_attention_keeps_its_own_code(tmp_path: Path) -> None:
    class Doubled(led.LEDEncoderSelfAttention):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            context, *rest = super().forward(*arguments, **options)
            return (2.0 * context, *rest)

    model = tiny_led(encoder_layers=1, decoder_layers=1, attention_window=[8])
    model.led.encoder.layers[0].self_attn.longformer_self_attn.__class__ = Doubled
    with Engine(export(model, tmp_path / "bundle"), threads=1) as engine:
        assert not compare_engine(engine, model, quick_cases, lambda step: None).failures()


class Scaled(nn.Linear):
    """A head with a forward of its own."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(0.5 * states)


@fast_if(lambda head: head is Scaled)
@pytest.mark.parametrize("head", [Scaled, nn.Linear])
def test_modules_of_the_user_s_own_in_the_decoder_are_traced(head: type[nn.Linear], tmp_path: Path) -> None:
    """A LayerNorm without weights, and a head that has the embeddings' weight and a bias."""
    model = tiny_led(encoder_layers=1, decoder_layers=1, attention_window=[8])
    model.led.decoder.layers[0].final_layer_norm = nn.LayerNorm(32, elementwise_affine=False)
    model.lm_head = head(32, VOCAB_SIZE)
    model.lm_head.weight = model.led.shared.weight
    nn.init.normal_(model.lm_head.bias)
    export(model, tmp_path / "bundle")  # compares it with the model


@pytest.mark.parametrize(("ends", "refused"), [("", True), ("start = -2", True), ("start = -1", False)])
def test_sizes_that_are_read_with_the_batch_are_refused(ends: str, refused: bool) -> None:
    """The batch is that of the ids, and the rows of one text may share the other tensors."""
    graph = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 18]>
        decoder (int64[batch, tokens] input_ids, float[batch, sequence] mask) => (int64[1] size, int64[n] sizes)
        {{ size = Shape <start = 0, end = 1> (mask)  sizes = Shape {f"<{ends}>" if ends else ""} (mask) }}"""
    )
    if refused:
        with pytest.raises(ExportError, match=r"reads the batch together with other sizes .*; read each size on its"):
            generation._read_batch_from_ids(graph)
        return
    generation._read_batch_from_ids(graph)
    assert [node.inputs[0].name for node in graph.graph if node.inputs[0]] == ["input_ids", "mask"]


@fast_if(lambda options: "max_global" not in options)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output_attentions": True},
            "output_attentions is for models of one graph, and a LEDForConditionalGeneration has two",
        ),
        ({"task": "feature-extraction"}, "task feature-extraction is not the task of a LEDForConditionalGeneration"),
        ({"max_seqlen": 129}, "max_seqlen 129 is out of range; the position embeddings allow 1 to 128"),
        ({"max_global": 200}, "max_global 200 is above the longest sequence, 128 tokens"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(tiny_led(), tmp_path / "bundle", **options)


def test_a_task_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "led", TEXT_GENERATION)
    with pytest.raises(ExportError, match="is an LED, which has no fill-mask; choose --task from: feature-extraction"):
        load(str(checkpoint), "fill-mask")
    checkpoint = save_tiny_checkpoint(tmp_path / "longformer")
    with pytest.raises(ExportError, match="is a longformer, which has no decoder"):
        load(str(checkpoint), TEXT_GENERATION)


WRONG: list[tuple[str, list[Any]]] = [
    ("autoregressive", ["false", 1, []]),
    ("attention_dilation", [0, "x", True, [1], 10**12]),
    ("vocab_size", [0, "x", None, 10**12]),
    ("d_model", [0, 33, "x", 10**9]),
    ("pad_token_id", [-1, 99, None, "x"]),
    ("decoder_start_token_id", [-1, 99, None, [2]]),
    ("encoder_attention_heads", [0, 3]),
    ("decoder_attention_heads", [0, 3]),
    ("encoder_layers", [0, 10**9]),
    ("decoder_layers", [0, 10**9, "x"]),
    ("decoder_ffn_dim", [0, 10**12]),
    ("attention_window", [7, 0, [8], "x", None, 256, 10**12]),
    ("max_encoder_position_embeddings", [0, 15, 10**12]),
    ("max_decoder_position_embeddings", [0, 10**12]),
    ("activation_function", ["x", None]),
    ("architectures", [5, ["LEDForNothing"]]),
    ("save_pretrained", ["x"]),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG for value in values], ids=str)
def test_a_wrong_setting_is_refused_in_one_line(key: str, value: Any, made_once: Any, tmp_path: Path) -> None:
    saved = made_once("led-checkpoint", lambda folder: save_tiny_checkpoint(folder, TEXT_GENERATION))
    folder = shutil.copytree(saved, tmp_path / "checkpoint")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ExportError) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
