"""The base shape, 12 layers and 4,096 tokens, against Hugging Face and the dense reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LongformerConfig, LongformerModel

from lfx.export import export
from lfx.export.torch_runners import reference_runner, torch_runner
from lfx.parity import Case, compare, inputs_of
from lfx.runtime import Engine
from lfx.runtime.runner import engine_runner

pytestmark = [pytest.mark.full_size, pytest.mark.slow]

CASES = [Case(1, 4096, "scattered", "none"), Case(1, 4095, "none", "left"), Case(2, 700, "ragged", "right")]


@pytest.fixture(scope="module")
def base_model() -> Any:
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=50265,
        max_position_embeddings=4098,
        type_vocab_size=1,
        attention_window=512,
        layer_norm_eps=1e-5,
    )
    return LongformerModel(config).eval()


@pytest.fixture(scope="module")
def base_bundle(base_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(base_model, tmp_path_factory.mktemp("base") / "out")


def test_the_base_shape_agrees_with_pytorch_at_4096_tokens(base_model: Any, base_bundle: Path) -> None:
    with Engine(base_bundle) as engine:
        report = compare(
            CASES,
            lambda case: inputs_of(case, vocab_size=50265, pad_token_id=1),
            reference=reference_runner(base_model),
            witness=torch_runner(base_model),
            candidate=engine_runner(engine),
            precision="fp32",
            layers=12,
        )
    report.require()
    assert max(result.error for result in report.outputs.values()) <= 1e-4


def test_the_base_shape_has_about_forty_nodes_a_layer(base_bundle: Path) -> None:
    import onnx

    graph = onnx.load(base_bundle / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "BandedAttention" for node in graph.node) == 12
    assert len(graph.node) <= 40 * 12 + 40


def test_batches_of_documents_keep_their_rows(base_bundle: Path) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(3, 50000, size).tolist() for size in (1000, 300)]
    with Engine(base_bundle) as engine:
        together = engine.run(rows)["last_hidden_state"]
        for row, actual in zip(rows, together, strict=True):
            np.testing.assert_allclose(actual, engine.run(row)["last_hidden_state"][0], atol=2e-5)
