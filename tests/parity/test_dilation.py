"""Whole models with dilation by head and causal windows: the exported file against the dense reference and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lfx.export import LoopSelfAttention, export, use_loop_attention
from lfx.export.expose_layers import expose_layers
from lfx.export.validate import compare_engine
from lfx.parity import Case, Report, full_cases, quick_cases
from lfx.runtime import Engine
from tests.export.test_loop_attention import VARIABLE_GLOBALS
from tests.marks import fast_if
from tests.models import tiny_config, tiny_model
from tests.parity.test_tasks import LARGEST_FP32_ERROR

pytestmark = pytest.mark.usefixtures("remembered_references")
BY_HEAD = [[1, 2, 2, 4], [3, 1, 3, 1]]  # heads that lie together, and heads that alternate
PATTERNS: dict[str, dict[str, Any]] = {
    "by-layer": {"attention_dilation": [1, 3]},
    "by-head": {"attention_dilation": BY_HEAD},
    "causal": {"autoregressive": True},
    "by-head-causal": {"attention_dilation": BY_HEAD, "autoregressive": True},
}
EACH = pytest.mark.parametrize("pattern", PATTERNS)


def model(pattern: str, task: str = "feature-extraction") -> Any:
    """A tiny model of four heads; windows 4 and 8, one-sided."""
    return use_loop_attention(tiny_model(task, num_attention_heads=4, **PATTERNS[pattern]))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """bundles(pattern, **options) -> the folder of an exported model; made once."""
    made: dict[Any, Path] = {}

    def make(pattern: str, **options: Any) -> Path:
        key = (pattern, *sorted(options.items()))
        if key not in made:
            made[key] = export(model(pattern), tmp_path_factory.mktemp("bundle") / pattern, **options)
        return made[key]

    return make


def nodes(folder: Path) -> list[dict[str, int]]:
    """The attributes of the nodes of BandedAttention."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    banded = [node for node in graph.node if node.op_type == "BandedAttention"]
    return [{a.name: a.i for a in node.attribute if a.name != "scale"} for node in banded]


def check(folder: Path, pattern: str, step: int, backend: str = "auto") -> Report:
    """Compare a bundle over every `step`-th case around the reach of the layers and around an undilated window of 4."""

    def cases(window: int, max_seqlen: int | None, multiple_of: int) -> list[Case]:
        return [case for w in (window, 4) for case in full_cases(w, max_seqlen, multiple_of)][::step]

    with Engine(folder, backend) as engine:
        report = compare_engine(engine, model(pattern), cases, lambda step: None)
    assert not report.failures()
    return report


@fast_if(lambda pattern, opset: (pattern, opset) == ("by-head-causal", 21))
@EACH
@pytest.mark.parametrize(("opset", "step"), [(17, 1), (21, 5)])
def test_lengths_and_global_patterns_are_the_reference(bundles: Any, pattern: str, opset: int, step: int) -> None:
    report = check(bundles(pattern, opset=opset), pattern, step)
    assert len(report.rows) >= 120 // step
    assert max(result.error for result in report.outputs.values()) <= LARGEST_FP32_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_global": 5}, {"global_attention": "first"}, {"global_attention": "none"}])
def test_modes_of_export_are_the_reference(bundles: Any, options: dict[str, Any]) -> None:
    check(bundles("by-head-causal", **options), "by-head-causal", 5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "backend"), [("fp16", "onnxruntime"), ("bf16", "openvino")])
def test_half_precision_is_within_the_derived_tolerance(bundles: Any, precision: str, backend: str) -> None:
    check(bundles("by-head-causal", precision=precision), "by-head-causal", 5, backend)


@pytest.mark.slow
def test_heads_of_one_dilation_are_one_node(bundles: Any) -> None:
    assert nodes(bundles("by-head-causal", opset=17)) == [
        {"num_heads": heads, "window": window, "dilation": dilation, "causal": 1}
        for heads, window, dilation in [(1, 4, 1), (2, 4, 2), (1, 4, 4), (2, 8, 3), (2, 8, 1)]
    ]
    assert nodes(bundles("causal", opset=17)) == [
        {"num_heads": 4, "window": window, "dilation": 1, "causal": 1} for window in (4, 8)
    ]


@pytest.mark.slow
def test_the_signature_says_how_far_a_layer_sees(bundles: Any) -> None:
    for pattern, reach, causal in (("by-layer", (4, 24), False), ("by-head-causal", (16, 24), True)):
        with Engine(bundles(pattern, opset=17)) as engine:
            assert (engine.signature.attention_windows, engine.signature.causal) == (reach, causal)


@fast_if(lambda pattern: pattern == "by-head-causal")
@EACH
def test_each_layer_is_compared_whole(bundles: Any, pattern: str, tmp_path: Path) -> None:
    """`--by-layer` joins the nodes of a layer."""
    bundle = bundles(pattern, opset=17)
    with Engine(bundle) as engine:
        signature = engine.signature
    with Engine(expose_layers(bundle, signature, tmp_path)) as engine:
        report = compare_engine(engine, model(pattern), quick_cases, lambda step: None, by_layer=True)
    assert not report.failures()
    assert {"attention_0", "attention_1"} <= report.outputs.keys()
    assert "attention_2" not in report.outputs


class Siamese(nn.Module):
    """Two self-attention layers whose contexts the module itself joins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = tiny_config(attention_dilation=[[1, 2], 3], attention_window=[8, 8])
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList([LoopSelfAttention(config, i) for i in range(2)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states, mask = self.embedding(input_ids), attention_mask - 1.0
        return torch.cat([layer(states, attention_mask=mask)[0] for layer in self.layers], dim=-1)


def test_layers_that_a_module_joins_are_compared_each(tmp_path: Path) -> None:
    module = Siamese().eval()
    bundle = export(module, tmp_path / "bundle")
    with Engine(bundle) as engine:
        signature = engine.signature
    (tmp_path / "exposed").mkdir()
    with Engine(expose_layers(bundle, signature, tmp_path / "exposed")) as engine:
        report = compare_engine(engine, module, quick_cases, lambda step: None, by_layer=True)
    assert not report.failures()
    assert list(report.outputs) == ["attention_0", "attention_1", "output"]


@fast_if(lambda pattern: pattern == "by-head-causal")
@EACH
@pytest.mark.parametrize("mask", VARIABLE_GLOBALS.values(), ids=VARIABLE_GLOBALS)
def test_a_batch_is_its_rows_one_by_one(bundles: Any, pattern: str, mask: Any) -> None:
    """The cases of allenai's tests/test_var_global_attn.py."""
    ids = np.random.default_rng(0).integers(3, 99, mask.shape)
    attention, globals_ = (mask >= 0).long().numpy(), (mask > 0).long().numpy()
    with Engine(bundles(pattern, opset=17)) as engine:
        together = engine.run(ids, attention, globals_)
        for row in range(3):
            rows = slice(row, row + 1)
            alone = engine.run(ids[rows], attention[rows], globals_[rows])
            for name, expected in alone.items():
                np.testing.assert_allclose(together[name][rows], expected, rtol=0, atol=1e-5, err_msg=name)
