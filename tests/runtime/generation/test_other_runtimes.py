"""Both ONNX files in other runtimes, without lfx: a loop of greedy search over their names gives the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.runtime import Engine
from tests.conftest import MakeLed
from tests.runtime.generation.led import random_inputs

Infer = Callable[[dict[str, Any]], dict[str, Any]]
HEADS, HEAD_SIZE, LAYERS = 2, 8, 2


def greedy(encoder: Infer, decoder: Infer, feeds: dict[str, Any], tokens: int) -> Any:
    """Greedy search for a batch of one, as a client with no knowledge of lfx writes it."""
    encoded = encoder(feeds)
    empty = np.zeros((1, HEADS, 0, HEAD_SIZE), np.float32)
    cache = {f"past_key_values.{i}.decoder.{name}": empty for i in range(LAYERS) for name in ("key", "value")}
    cross = {name.replace("present", "past_key_values"): v for name, v in encoded.items() if name.startswith("present")}
    ids = [2]
    while len(ids) <= tokens and (len(ids) == 1 or ids[-1] != 2):
        inputs = {"input_ids": np.array([[ids[-1]]]), "encoder_attention_mask": feeds["attention_mask"]}
        outputs = decoder({**inputs, **cache, **cross})
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        ids.append(int(outputs["logits"][0, -1].argmax()))
    return ids


def in_onnxruntime(file: Path) -> Infer:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file))
    names = [item.name for item in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def in_openvino(file: Path) -> Infer:
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.get_any_name() for output in model.outputs]

    def infer(feeds: dict[str, Any]) -> dict[str, Any]:
        outputs = model(feeds)
        return {name: np.array(outputs[i]) for i, name in enumerate(names)}

    return infer


@pytest.mark.parametrize(
    ("open_file", "options"),
    [(in_onnxruntime, {}), (in_onnxruntime, {"inline_functions": True}), (in_openvino, {"inline_functions": True})],
    ids=["onnxruntime", "onnxruntime-inlined", "openvino-inlined"],
)
def test_other_runtimes_open_both_files(open_file: Any, options: dict[str, Any], led_bundle: MakeLed) -> None:
    folder = led_bundle(7, **options)[1]
    feeds = random_inputs(np.random.default_rng(3), 1, 50, "first")
    with Engine(led_bundle()[1]) as engine:
        expected = engine.generate(feeds["input_ids"], max_new_tokens=15)[0].tolist()
    encoder, decoder = (open_file(folder / name) for name in ("encoder_model.onnx", "decoder_model.onnx"))
    tokens = greedy(encoder, decoder, feeds, 15)
    assert tokens == expected[: len(tokens)]
