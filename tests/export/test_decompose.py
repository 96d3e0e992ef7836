"""Decomposing in place gives the graph that torch itself decomposes; other programs are left to torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from lfx.errors import ExportError
from lfx.export import decompose, export, trace
from lfx.runtime import Engine
from tests.marks import fast_if
from tests.models import ONE_LAYER, tiny_led, tiny_model

# Names of torch's own nodes, which it records in the file.
RECORDS = (
    "pkg.onnxscript.optimizer.folded_from",
    "pkg.torch.export.ExportedProgram.graph_signature",
    "pkg.torch.export.graph_signature.OutputSpec.kind",
)


def graph_of(path: Path) -> onnx.ModelProto:
    """Return the graph of a file and its weights, without torch's records."""
    model = onnx.load(path)
    for message in (model.graph, *model.graph.value_info, *model.graph.output):
        kept = [entry for entry in message.metadata_props if entry.key not in RECORDS]
        del message.metadata_props[:]
        message.metadata_props.extend(kept)
    return model


@fast_if(lambda case: case == "slots")
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("question-answering", {}),
        ("multiple-choice", {"max_global": 3}),
        ("sentence-embedding", {"precision": "fp16"}),
        ("fill-mask", {"global_attention": "first"}),
    ],
    ids=["question answering", "slots", "fp16 embeddings", "fixed global token"],
)
def test_the_graph_is_the_one_that_torch_decomposes(
    task: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    original = decompose.decompose
    monkeypatch.setattr(decompose, "decompose", lambda *graph: results.append(original(*graph)) or results[-1])
    in_place = export(tiny_model(task, **ONE_LAYER), tmp_path / "in place", **options)
    assert results == [True]
    monkeypatch.setattr(trace, "decomposing_in_place", contextlib.nullcontext)
    by_torch = export(tiny_model(task, **ONE_LAYER), tmp_path / "by torch", **options)
    assert results == [True]
    assert graph_of(in_place / "model.onnx") == graph_of(by_torch / "model.onnx")


@pytest.mark.slow
def test_both_graphs_of_an_led_are_decomposed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    original = decompose.decompose
    monkeypatch.setattr(decompose, "decompose", lambda *graph: results.append(original(*graph)) or results[-1])
    settings: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "attention_window": [8]}
    in_place = export(tiny_led(**settings), tmp_path / "in place")
    assert results == [True, True]
    monkeypatch.setattr(trace, "decomposing_in_place", contextlib.nullcontext)
    by_torch = export(tiny_led(**settings), tmp_path / "by torch")
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        assert graph_of(in_place / name) == graph_of(by_torch / name)


class Decomposed(nn.Module):
    """A model whose head is more than one op after its decomposition."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.inner, self.head = tiny_model(**ONE_LAYER), head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.inner(input_ids).last_hidden_state)
        return output


def _in_place(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden + 1
    hidden.select(2, 0).mul_(2)  # writes through a view
    return hidden


@fast_if(lambda case: case == "in place")
@pytest.mark.parametrize(
    "head",
    [_in_place, lambda x: x.std(dim=2), lambda x: x.flatten(2).unflatten(2, (2, 16)) * torch.tensor([2.0])],
    ids=["in place", "std", "constant"],
)
def test_other_programs_are_left_to_torch(head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    original = decompose.decompose
    monkeypatch.setattr(decompose, "decompose", lambda *graph: results.append(original(*graph)) or results[-1])
    module = Decomposed(head).eval()
    folder = export(module, tmp_path / "out")
    assert results == [False]
    ids = torch.arange(40)[None] % 50 + 3
    with Engine(folder) as engine, torch.inference_mode():
        np.testing.assert_allclose(engine.run(ids.numpy())["output"], module(ids).numpy(), rtol=0, atol=1e-5)


def test_one_tensor_under_two_names_is_still_refused(tmp_path: Path) -> None:
    """A conversion to the same dtype gives the same tensor."""
    module = Decomposed(lambda x: {"a": x, "b": x.float()}).eval()
    with pytest.raises(ExportError, match="outputs 'a' and 'b' are one tensor"):
        export(module, tmp_path / "out")


def test_torch_gets_its_method_back(tmp_path: Path) -> None:
    before = ExportedProgram.run_decompositions
    with pytest.raises(ValueError, match="stop"), decompose.decomposing_in_place():
        assert ExportedProgram.run_decompositions is not before
        raise ValueError("stop")
    assert ExportedProgram.run_decompositions is before
