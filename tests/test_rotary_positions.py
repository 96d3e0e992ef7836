"""examples/rotary_positions.py: xPos as a table and as a rotation, exported with PyTorch's numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LongformerModel

from lfx.errors import ExportError
from lfx.export import export

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "rotary_positions.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("rotary_positions", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_both_models_are_exported_with_the_numbers_of_pytorch(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--lengths", "1,200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "longest sequence" in line] == [
        "table: longest sequence not limited",
        "rotated: longest sequence not limited",
    ]
    assert sum("tokens: largest difference from PyTorch" in line for line in lines) == 4
    assert lines[-1] == "the outputs agree with PyTorch's"


def test_rotated_scores_depend_on_the_distance_alone(example: Any) -> None:
    torch.manual_seed(0)
    attention = example.rotated_model().encoder.layer[0].attention.self
    same_token = torch.randn(example.HIDDEN).expand(1, 50, -1)
    with torch.inference_mode():
        query, key = (
            layer(same_token).unflatten(-1, (example.HEADS, -1)) for layer in (attention.query, attention.key)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key)[0]
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=0, atol=1e-4)
    assert (scores[:, 0] - scores[:, 0, :1]).abs().max() > 0.01  # other distances have other scores


def test_rotation_in_hugging_faces_attention_is_refused(example: Any, tmp_path: Path) -> None:
    """It calls its projections with (seqlen, batch, hidden)."""
    model = LongformerModel(example.config()).eval()
    rotary = example.RotaryEmbedding(dim=example.HIDDEN // example.HEADS, use_xpos=True, cache_if_possible=False)
    for layer in model.encoder.layer:
        layer.attention.self.query = example.Rotated(layer.attention.self.query, rotary, 1)
    with pytest.raises(ExportError, match="depends on the other sequences of its batch"):
        export(model, tmp_path / "bundle")
