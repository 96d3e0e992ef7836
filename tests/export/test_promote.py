"""Type promotion by metadata gives the graph of torch's own type promotion, which runs the program again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

from lfx.export import export, promote, trace
from lfx.runtime import Engine
from tests.export.test_decompose import graph_of
from tests.models import tiny_led, tiny_model


class Mixed(nn.Module):
    """A model whose head has ops with arguments of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(num_hidden_layers=1, attention_window=[8])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.inner(input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.bool()
        return {
            "sum": hidden + input_ids[..., None],
            "quotient": input_ids / 7,
            "product": hidden * real[..., None] * 2,
            "chosen": torch.where(real[..., None], hidden, 0),
            "joined": torch.cat([hidden, input_ids[..., None].to(torch.float16)], dim=-1),
        }


MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "several dtypes": (Mixed, {}, "model.onnx"),
    "fp16": (
        lambda: tiny_model("text-classification", num_hidden_layers=1, attention_window=[8]),
        {"precision": "fp16"},
        "model.onnx",
    ),
    "decoder": (
        lambda: tiny_led(encoder_layers=1, decoder_layers=1, attention_window=[8]),
        {},
        "decoder_model.onnx",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_one_that_torch_promotes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, file = MODELS[name]
    by_metadata = export(make().eval(), tmp_path / "by metadata", **options)
    monkeypatch.setattr(trace, "promoting_by_metadata", contextlib.nullcontext)
    by_torch = export(make().eval(), tmp_path / "by torch", **options)
    graphs = [graph_of(folder / file) for folder in (by_metadata, by_torch)]
    for model in graphs:
        # The second run gives the number of global tokens another name; it is in the shapes of inner values.
        del model.graph.value_info[:]
    assert graphs[0] == graphs[1]


@pytest.mark.slow
def test_outputs_of_several_dtypes_are_pytorchs(tmp_path: Path) -> None:
    module = Mixed().eval()
    ids = torch.arange(40)[None] % 50 + 3
    mask = torch.ones_like(ids)
    with Engine(export(module, tmp_path / "out")) as engine, torch.inference_mode():
        actual = engine.run(ids.numpy(), mask.numpy())
        for name, expected in module(ids, mask).items():
            np.testing.assert_allclose(actual[name], expected.float().numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_torch_gets_its_method_back() -> None:
    before = _TypePromotionInterpreter.run_node
    with pytest.raises(ValueError, match="stop"), promote.promoting_by_metadata():
        assert _TypePromotionInterpreter.run_node is not before
        raise ValueError("stop")
    assert _TypePromotionInterpreter.run_node is before
