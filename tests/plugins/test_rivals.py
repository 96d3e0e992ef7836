"""The other attentions that the kernels' benchmark races, as far as a CPU goes.

Torch's band with its log-sum-exp stands in for the bands of FlashAttention and cuDNN: what is merged with it, and how,
is the benchmark's own code.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from scripts.bench import gpu_kernels as bench
from scripts.bench import rivals, timing
from scripts.bench.band_cases import Case, band_or_global
from tests.plugins.test_benchmarks import CASES, SMALL, dense, drawn

MANY = replace(SMALL, globals=20, window=3)  # queries that see global keys inside the band, outside, and both


def torch_band(case: Case) -> rivals.Band:
    """The pure band, with FlexAttention on the CPU."""
    mask = create_block_mask(band_or_global(case.window, 0), None, None, case.seqlen, case.seqlen, device="cpu")

    def run(s: Any) -> tuple[Any, Any]:
        context, lse = flex_attention(s.q4, s.k4, s.v4, block_mask=mask, return_lse=True)
        return context.transpose(1, 2), lse

    return run


@pytest.mark.parametrize("case", [*CASES, MANY], ids=str)
def test_a_band_merged_with_the_global_keys_outside_it_gives_the_references_rows(case: Case) -> None:
    s = drawn(case)
    actual = rivals.with_global_keys(case, torch_band(case), compiled=False)(s)
    assert actual.shape == s.q.shape
    assert (actual[:, case.globals :] - dense(case, s)).abs().max() < 1e-5


def test_a_global_key_inside_the_band_is_not_counted_twice() -> None:
    s = drawn(MANY)
    queries, keys, values = rivals.by_token(MANY, s)
    context, lse = rivals.global_pass(MANY, queries, keys, values)
    visible = (torch.arange(MANY.seqlen)[:, None] - torch.arange(MANY.globals)).abs() > MANY.window
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys[:, : MANY.globals]) * MANY.head_size**-0.5
    expected = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    nothing = ~visible.any(1)
    assert (context[:, nothing] == 0).all()
    assert lse[:, :, nothing].isneginf().all()


def test_merging_ignores_the_side_that_has_no_key() -> None:
    torch.manual_seed(0)
    context, other = torch.randn(2, 1, 3, 1, 4)
    other[:, 1:] = torch.nan
    lse = torch.tensor([[[0.5, 200.0, -torch.inf]]])
    other_lse = torch.tensor([[[0.5, -torch.inf, -torch.inf]]])
    context[:, 2] = torch.nan
    merged = rivals.merge(context, lse, other, other_lse)
    torch.testing.assert_close(merged[:, 0], (context[:, 0] + other[:, 0]) / 2)
    torch.testing.assert_close(merged[:, 1], context[:, 1])
    assert (merged[:, 2] == 0).all()


def test_merging_keeps_the_dtype_and_adds_in_float32() -> None:
    context = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    merged = rivals.merge(context, torch.full((1, 1, 1), -300.0), 3 * context, torch.full((1, 1, 1), -300.0))
    assert merged.dtype == torch.bfloat16
    assert (merged == 2).all()


@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_flash_attention_is_called_with_both_sides_of_the_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    s, band = drawn(SMALL), torch_band(SMALL)

    def flash_attn_func(q: Any, k: Any, v: Any, window_size: Any, return_attn_probs: bool = False) -> Any:
        given.update(shape=q.shape, window_size=window_size, return_attn_probs=return_attn_probs)
        context, lse = band(s)
        return (context, lse, None) if name == "flash2" else (context, lse)

    module = ModuleType(rivals.MODULES[name])
    vars(module)["flash_attn_func"] = flash_attn_func
    monkeypatch.setitem(sys.modules, rivals.MODULES[name], module)
    actual = rivals.maker(name, SMALL, "cpu", bench.flex)(s)
    assert given == {"shape": (2, 64, 2, 16), "window_size": (8, 8), "return_attn_probs": True}
    assert (actual[:, SMALL.globals :] - dense(SMALL, s)).abs().max() < 1e-5


def test_cudnn_is_called_with_a_band_whose_left_bound_counts_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    s, band = drawn(SMALL), torch_band(SMALL)

    class Tensor:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: self

    class Graph:
        def tensor(self, **_: Any) -> Tensor:
            return Tensor()

        def sdpa(self, **arguments: Any) -> tuple[Tensor, Tensor]:
            given.update(arguments)
            self.outputs = Tensor(), Tensor()
            return self.outputs

        def build(self, modes: Any) -> None:
            pass

        def get_workspace_size(self) -> int:
            return 0

        def execute(self, tensors: dict[Any, Any], workspace: Any, handle: Any) -> None:
            context, lse = band(s)
            tensors[self.outputs[0]].copy_(context)
            tensors[self.outputs[1]].copy_(lse[..., None])

    module = SimpleNamespace(
        create_handle=lambda: None,
        set_stream=lambda **_: None,
        pygraph=lambda **_: Graph(),
        data_type=SimpleNamespace(HALF=0, BFLOAT16=1, FLOAT=2),
        heur_mode=SimpleNamespace(A=0),
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    actual = rivals.maker("cudnn", SMALL, "cpu", bench.flex)(s)
    assert given["diagonal_band_left_bound"] == 9
    assert given["diagonal_band_right_bound"] == 8
    assert given["attn_scale"] == 0.25
    assert (actual[:, SMALL.globals :] - dense(SMALL, s)).abs().max() < 1e-5


def test_flex_attention_is_asked_for_its_flash_backend() -> None:
    given: dict[str, Any] = {}

    def flex(case: Case, device: str, options: dict[str, Any]) -> Any:
        given.update(options)
        return lambda s: s

    rivals.maker("flex-flash", SMALL, "cpu", flex)
    assert given == {"BACKEND": "FLASH"}


def test_rivals_that_are_not_there_are_named_with_the_reason() -> None:
    reasons = rivals.missing(SMALL)
    assert set(reasons) <= set(rivals.NAMES)
    assert all("not installed" in reason for reason in reasons.values())
    assert "flash2" in reasons or rivals._installed("flash_attn")


def test_onnxruntime_leaves_out_cases_that_its_op_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "providers", lambda: ["CUDAExecutionProvider"])
    assert "bfloat16" in rivals.missing(replace(SMALL, precision="bf16"))["onnxruntime"]
    assert "multiple of twice the window" in rivals.missing(replace(SMALL, seqlen=60))["onnxruntime"]
    assert "onnxruntime" not in rivals.missing(replace(SMALL, precision="fp16"))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_onnxruntime_knows_the_op_and_its_attributes(precision: str) -> None:
    """It has a kernel of LongformerAttention for CUDA only; on a CPU it gets as far as looking for one."""
    ort = pytest.importorskip("onnxruntime")
    weight = np.random.default_rng(0).standard_normal((32, 96))
    model = rivals.onnxruntime_model(replace(SMALL, precision=precision), weight)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.NotImplemented, match="LongformerAttention"):
        ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_contenders_that_disagree_are_reported() -> None:
    results = {"lfx": {"max_error": 9.0}, "flex": {"max_error": 1.9}, "cudnn": {"max_error": 2.1}, "sdpa": {}}
    results["onnxruntime"] = {"max_error": 5.0, "witness_error": 2.6}
    assert bench.disagreeing({"witness_error": 1.0, "contenders": results}) == ["cudnn"]
