"""LEDs of one graph: the encoder with a decoder that reads the same ids, alone or under a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lfx.export import export
from lfx.export.led import LED_CLASSES
from lfx.export.load import load, weights_sha256
from lfx.export.quantize import quantize
from lfx.export.validate import compare_engine
from lfx.manifest import MODEL, Manifest
from lfx.parity import full_cases, quick_cases
from lfx.runtime import Engine
from lfx.signature import TEXT_GENERATION
from tests.marks import fast_if
from tests.models import tiny_led

HEADS = {task: name for task, name in LED_CLASSES.items() if task != TEXT_GENERATION}
OUTPUTS = {
    "feature-extraction": ["last_hidden_state", "encoder_last_hidden_state"],
    "text-classification": ["logits", "encoder_last_hidden_state"],
    "question-answering": ["start_logits", "end_logits", "encoder_last_hidden_state"],
}


@pytest.fixture(scope="module", params=HEADS)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A task, a checkpoint for it, and the bundle that was exported from it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_led(HEADS[request.param]).save_pretrained(folder / "checkpoint")
    return request.param, folder / "checkpoint", export(folder / "checkpoint", folder / "bundle")


@fast_if(lambda head: head == "text-classification")
def test_the_task_is_that_of_the_class(head: tuple[str, Path, Path]) -> None:
    task, checkpoint, bundle = head
    model, loaded_task = load(str(checkpoint))
    assert loaded_task == task
    assert weights_sha256(model) == weights_sha256(tiny_led(HEADS[task]))
    with Engine(bundle, threads=1) as engine:
        signature = engine.signature
    assert (signature.architecture, signature.task) == (HEADS[task], task)
    assert [spec.name for spec in signature.outputs] == OUTPUTS[task]
    assert signature.default_global == ("first" if task == "text-classification" else "none")
    assert signature.max_seqlen == 40  # the decoder's positions
    assert signature.decoder is None


@fast_if(lambda head: head == "text-classification")
def test_the_graph_has_no_second_path_for_the_decoder(head: tuple[str, Path, Path]) -> None:
    graph = onnx.load(head[2] / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "BandedAttention" for node in graph.node) == 2
    # Of each layer of the encoder, by the number of global tokens.
    assert sum(node.op_type == "If" for node in graph.node) == 2


@fast_if(lambda head: head == "text-classification")
def test_every_case_agrees_with_pytorch(head: tuple[str, Path, Path]) -> None:
    with Engine(head[2], threads=1) as engine:
        report = compare_engine(engine, tiny_led(HEADS[head[0]]), full_cases, lambda step: None)
    assert not report.failures()


@fast_if(lambda head: head == "text-classification")
def test_padding_after_a_sequence_does_not_change_its_outputs(head: tuple[str, Path, Path]) -> None:
    random = np.random.default_rng(0)
    rows = [[*random.integers(4, 99, length).tolist(), 2] for length in (3, 17, 30)]
    with Engine(head[2], threads=1) as engine:
        together = engine.run(rows)
        for i, row in enumerate(rows):
            for name, alone in engine.run(row).items():
                np.testing.assert_allclose(together[name][i], alone[0], atol=1e-5)


@pytest.mark.slow
def test_half_precision_is_within_the_derived_tolerance(tmp_path: Path) -> None:
    export(tiny_led("LEDForQuestionAnswering"), tmp_path / "bundle", precision="fp16", opset=21)


@pytest.mark.slow
@fast_if(lambda head: head == "text-classification")
def test_int8_is_that_of_an_encoder(head: tuple[str, Path, Path], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    text = tmp_path / "documents.jsonl"
    rows = [random.integers(3, 99, int(length)).tolist() for length in random.integers(5, 40, 16)]
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    folder = quantize(head[2], tmp_path / "int8", calibration=text)
    manifest = Manifest.read(folder)
    quantization = manifest.quantization
    assert manifest.model_file == MODEL
    assert "texts" not in quantization["accuracy"]
    for part in ("encoder.layers.1.fc1", "decoder.layers.0.encoder_attn.k_proj", "decoder.layers.1.self_attn.v_proj"):
        assert any(name.endswith(part) for name in quantization["layers"])
    for backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend)
        with Engine(folder, backend, threads=1) as engine:
            model = tiny_led(HEADS[head[0]])
            report = compare_engine(engine, model, quick_cases, lambda step: None, quantization=quantization)
        assert report.precision == "int8"
        assert not report.failures()
        assert all(result.cosine() > 0.95 for result in report.outputs.values())


@pytest.mark.parametrize("ends", [[5], [2, 9], [9]], ids=str)
def test_a_sequence_is_classified_by_its_last_eos_token(ends: list[int]) -> None:
    """As transformers 4 did: the states where the ids are eos, and of those the last."""
    model: Any = tiny_led("LEDForSequenceClassification")
    ids = torch.randint(4, 99, (2, 10), generator=torch.Generator().manual_seed(0))
    ids[:, ends] = model.config.eos_token_id
    with torch.no_grad():
        states = model.led(ids).last_hidden_state
        pooled = states[ids == model.config.eos_token_id, :].view(2, -1, states.shape[-1])[:, -1, :]
        torch.testing.assert_close(model(ids).logits, model.classification_head(pooled))


def test_padding_of_eos_tokens_is_no_end_of_a_sequence() -> None:
    model: Any = tiny_led("LEDForSequenceClassification", pad_token_id=2, eos_token_id=2)
    row = [5, 6, 7, 2]
    padded, mask = torch.tensor([[*row, 2, 2, 2]]), torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask).logits, model(torch.tensor([row])).logits)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["LEDModel", "LEDForConditionalGeneration"])
def test_an_export_with_another_default_dtype_is_a_float32_model(architecture: str, tmp_path: Path) -> None:
    module = tiny_led(architecture)
    torch.set_default_dtype(torch.float64)
    try:
        folder = export(module, tmp_path / "bundle")
    finally:
        torch.set_default_dtype(torch.float32)
    with Engine(folder, threads=1) as engine:
        assert not compare_engine(engine, module, quick_cases, lambda step: None).failures()
