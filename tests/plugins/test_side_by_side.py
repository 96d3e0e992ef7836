"""The paper's three implementations side by side, on the same cases, each against the dense definition.

- loop: `lfx.export.LoopSelfAttention` in PyTorch.
- chunks: the function body of BandedAttention in ONNX Runtime and OpenVINO, and Hugging Face's LongformerSelfAttention
  where it has the feature.
- cuda: the kernel, on the emulated device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx import reference
from lfx.export import LoopSelfAttention
from lfx.parity import Case, inputs_of
from scripts.bench.launch import Kernels
from tests.export.test_functions import _model
from tests.export.test_loop_attention import VARIABLE_GLOBALS
from tests.marks import fast_where
from tests.models import tiny_config
from tests.plugins.problems import Banded, rounding
from tests.plugins.test_custom_ops import session

WINDOW, HEADS, SIZE = 6, 2, 8
PATTERNS = fast_where(product((1, 2, 3), (0, 1)), lambda pattern: pattern[0] != 2)  # dilation, causal
Array = NDArray[Any]


def masks(dilation: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and mask (B, S) of each case: below 0 masked, above 0 global; lengths lie around the window's boundaries."""
    reach = WINDOW * dilation
    lengths = (1, 2, reach - 1, reach, reach + 1, 2 * reach, 2 * reach + 1, 130 * dilation)
    patterns = (("none", "none"), ("first", "left"), ("scattered", "holes"), ("ragged", "right"), ("all", "empty_row"))
    for length, (globals_, padding) in product(lengths, patterns):
        case = Case(2 if padding == "empty_row" else 3, length, globals_, padding)
        arrays = inputs_of(case, vocab_size=9, pad_token_id=1)
        mask = arrays["attention_mask"] * (arrays["global_attention_mask"] + 1) - 1
        yield str(case), torch.from_numpy(mask).float()
    yield from VARIABLE_GLOBALS.items()


class Problem:
    """Self-attention of one layer for a mask: what the op gets, and each implementation's context."""

    def __init__(self, mask: torch.Tensor, dilation: int, causal: int) -> None:
        torch.manual_seed(mask.numel())
        config = tiny_config(
            hidden_size=HEADS * SIZE,
            attention_window=[2 * WINDOW] * 2,
            attention_dilation=dilation,
            autoregressive=bool(causal),
        )
        self.mask, self.dilation, self.causal = mask, dilation, causal
        self.loop_attention = LoopSelfAttention(config, 0).eval()
        self.chunk_attention = LongformerSelfAttention(config, 0).eval()
        for parameter in self.loop_attention.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        self.chunk_attention.load_state_dict(self.loop_attention.state_dict())
        self.hidden = torch.randn(*mask.shape, HEADS * SIZE)
        self.inputs = self._inputs()

    @torch.inference_mode()
    def _inputs(self) -> dict[str, Array]:
        module, is_global = self.loop_attention, (self.mask > 0).numpy()
        index = np.full((len(is_global), max(1, int(is_global.sum(axis=1).max()))), -1, np.int32)
        for row, flags in enumerate(is_global):
            positions = np.flatnonzero(flags)
            index[row, : len(positions)] = positions
        key_mask = (self.mask >= 0).int().numpy()
        at_globals = self.hidden[torch.arange(len(index))[:, None], torch.from_numpy(index).clamp(min=0).long()]
        queries, keys, values = (
            module.query_global(at_globals),
            module.key_global(self.hidden),
            module.value_global(self.hidden),
        )
        finished = reference.global_attention(*(x.numpy() for x in (queries, keys, values)), key_mask, num_heads=HEADS)
        projected = {name: getattr(module, name)(self.hidden).numpy() for name in ("query", "key", "value")}
        return {
            **projected,
            "key_mask": key_mask,
            "global_index": index,
            "global_context": finished.astype(np.float32),
        }

    @property
    def attributes(self) -> dict[str, int]:
        """Of the op's node."""
        return {"num_heads": HEADS, "window": WINDOW, "dilation": self.dilation, "causal": self.causal}

    def dense(self) -> Array:
        """The definition, in float64."""
        wide = [np.asarray(x, np.float64) if x.dtype == np.float32 else x for x in self.inputs.values()]
        return reference.banded_attention(*wide, **{**self.attributes, "causal": bool(self.causal)})

    def tolerance(self) -> float:
        """The largest error that rounding explains: of the op, and of the context of the global tokens in float32."""
        return 2 * rounding(self.inputs, HEADS, self.mask.shape[1] + self.inputs["global_index"].shape[1], "fp32")

    @torch.inference_mode()
    def loop(self) -> Array:
        """LoopSelfAttention."""
        return self.loop_attention(self.hidden, self.mask)[0].numpy()

    def onnxruntime(self, opset: int) -> Array:
        """The function body in ONNX Runtime."""
        return np.asarray(in_onnxruntime(opset, **self.attributes).run(None, self.inputs)[0])

    def openvino(self) -> Array:
        """The function body in OpenVINO, which wants it inlined; the inliner fills in no default of an attribute."""
        return np.array(in_openvino(**self.attributes)(list(self.inputs.values()))[0])

    @torch.inference_mode()
    def hugging_face(self) -> Array:
        """LongformerSelfAttention, which takes a multiple of the window."""
        seqlen = self.mask.shape[1]
        padding = -seqlen % (2 * WINDOW)
        hidden = torch.nn.functional.pad(self.hidden, (0, 0, 0, padding))
        mask = torch.nn.functional.pad(self.mask, (0, padding), value=-1.0)
        context = self.chunk_attention(hidden, mask, mask < 0, mask > 0, bool((mask > 0).any()))[0]
        return context[:, :seqlen].numpy()

    def emulated(self, kernels: Kernels) -> Array:
        """The kernel on the emulated device."""
        return Banded(self.inputs, **self.attributes).run(kernels.banded, None)


# A model has no sizes, and a test runs it at many.


def function_body(opset: int, **attributes: Any) -> bytes:
    """A model of the function body."""
    some_inputs = Problem(torch.zeros(1, 2), attributes["dilation"], attributes["causal"]).inputs
    return _model("BandedAttention", some_inputs, opset, **attributes)


@functools.lru_cache(2)
def in_onnxruntime(opset: int, **attributes: int) -> onnxruntime.InferenceSession:
    return session(function_body(opset, **attributes), None)


@functools.lru_cache(1)
def in_openvino(**attributes: int) -> Any:
    openvino = pytest.importorskip("openvino")
    model = onnx.load_from_string(function_body(17, scale=SIZE**-0.5, **attributes))
    inlined = onnx.inliner.inline_local_functions(model)
    core = openvino.Core()
    return core.compile_model(core.read_model(inlined.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize(("dilation", "causal"), PATTERNS, ids=str)
def test_all_implementations_are_the_dense_definition(emulated: Kernels, dilation: int, causal: int) -> None:
    for name, mask in masks(dilation):
        problem = Problem(mask, dilation, causal)
        contexts = {
            "loop": problem.loop(),
            "ONNX Runtime, opset 17": problem.onnxruntime(17),
            "ONNX Runtime, opset 21": problem.onnxruntime(21),
            "emulated kernel": problem.emulated(emulated),
        }
        if dilation == 1 and not causal:
            contexts["Hugging Face"] = problem.hugging_face()
        expected, limit = problem.dense(), problem.tolerance()
        for implementation, context in contexts.items():
            error = np.abs(context - expected).max()
            assert error <= limit, f"{implementation}, {name}"


@pytest.mark.parametrize(("dilation", "causal"), PATTERNS, ids=str)
def test_openvino_is_the_dense_definition(dilation: int, causal: int) -> None:
    """Fewer cases: OpenVINO compiles each shape for about a second."""
    for name, mask in list(masks(dilation))[2::7]:
        problem = Problem(mask, dilation, causal)
        assert np.abs(problem.openvino() - problem.dense()).max() <= problem.tolerance(), name
