"""Every form that the weights and parts of a layer may have: a layer for each, exported and compared in float64.

Weights: views of one storage, transposed, strided, expanded, tied, of other dtypes, extreme values, buffers. Parts:
parametrized, hooked, subclassed, replaced, without a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lfx.export import export
from lfx.runtime import Engine
from tests.marks import fast_if
from tests.models import tiny_model

Form = Callable[[Any, Any], Any]  # changes a layer, given its self-attention
PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")


class _Low(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(4, columns) / 4), nn.Parameter(torch.randn(rows, 4) / 4)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


class _Shifted(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + hidden.roll(1, -1)


def _each(change: Callable[[nn.Parameter], Any], dims: tuple[int, ...] = (1, 2)) -> Form:
    def form(layer: Any, _: Any) -> None:
        for parameter in layer.parameters():
            if parameter.dim() in dims:
                parameter.data = change(parameter.data)

    return form


def _linear(change: Callable[[Any], Any]) -> Form:
    def form(layer: Any, _: Any) -> None:
        for part in [part for part in layer.modules() if isinstance(part, nn.Linear)]:
            change(part)

    return form


def _replaced(make: Callable[[], nn.Module]) -> Form:
    return lambda _, attention: [setattr(attention, name, make()) for name in PROJECTIONS]


def _views(_: Any, attention: Any) -> None:
    """Matrices and a vector that begin at one address, in every form."""
    data = torch.randn(64, 64) / 5
    forms = (data[:32, :32], data[:32, ::2], data[::2, :32], data[:32, :32].T, data.view(-1)[:1024].view(32, 32))
    for name, view in zip(PROJECTIONS, (*forms, data.as_strided((32, 32), (1, 1))), strict=True):
        getattr(attention, name).weight.data = view
    attention.query.bias.data, attention.key.bias.data = data[0, :32], data[:32, 0]


def _tied(_: Any, attention: Any) -> None:
    attention.key.weight = attention.query.weight
    attention.key_global.weight = nn.Parameter(attention.query.weight.data.T)
    attention.value_global = attention.value


def _as_buffer(part: Any) -> None:
    weight = part.weight.data
    del part.weight
    part.register_buffer("weight", weight, persistent=False)


def _doubled(part: Any, *arguments: Any) -> Any:
    return 2 * type(part).forward(part, *arguments)


FORMS: dict[str, Form] = {
    "views": _views,
    "tied": _tied,
    "column major": _each(lambda data: data.T.contiguous().T, (2,)),
    "strided": _each(lambda data: data.repeat_interleave(2, -1)[..., ::2]),
    "expanded rows": _each(lambda data: data[:1].expand(data.shape)),
    "float16": lambda _, attention: attention.half(),
    "bfloat16": lambda layer, _: layer.output.LayerNorm.bfloat16(),
    "zeros": _each(torch.zeros_like, (2,)),
    "denormal": _each(lambda data: data * 1e-40, (2,)),
    "large": _each(lambda data: data * 1e3, (2,)),
    "buffer": _linear(_as_buffer),
    "low rank": _linear(lambda part: parametrize.register_parametrization(part, "weight", _Low(*part.weight.shape))),
    "weight norm": _linear(parametrizations.weight_norm),
    "spectral norm": lambda _, attention: parametrizations.spectral_norm(attention.key_global),
    "pruned": _linear(lambda part: prune.l1_unstructured(part, "weight", 0.5)),
    "hook": _linear(lambda part: part.register_forward_hook(lambda _, inputs, output: output * 1.5)),
    "pre-hook": _linear(lambda part: part.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5,))),
    "forward": _linear(lambda part: setattr(part, "forward", MethodType(_doubled, part))),
    "subclass": _replaced(lambda: _Shifted(32, 32)),
    "no bias": _replaced(lambda: nn.Linear(32, 32, bias=False)),
    "sequential": _replaced(lambda: nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 32))),
    "RMS norm": lambda layer, _: setattr(layer.output, "LayerNorm", nn.RMSNorm(32)),
    "no dropout": lambda layer, _: setattr(layer.output, "dropout", nn.Identity()),
}
NAMES = list(FORMS)


@fast_if(lambda first: first == 0)
@pytest.mark.parametrize("first", range(0, len(NAMES), 12), ids=lambda first: ", ".join(NAMES[first : first + 12]))
def test_a_model_with_layers_of_every_form_is_exported(first: int, tmp_path: Path) -> None:
    names = NAMES[first : first + 12]
    model = tiny_model(num_hidden_layers=len(names), attention_window=[8] * len(names), max_position_embeddings=40)
    torch.manual_seed(1)
    for name, layer in zip(names, model.encoder.layer, strict=True):
        FORMS[name](layer, layer.attention.self)
    model.eval()
    folder = export(model, tmp_path / "out")
    ids, marks = torch.arange(19)[None] + 3, (torch.arange(19)[None] % 7 == 2).long()
    with torch.inference_mode():
        expected = model.double()(ids, global_attention_mask=marks).last_hidden_state.numpy()
    for backend in ("onnxruntime", "openvino"):
        with Engine(folder, backend) as engine:
            actual = engine.run(ids.numpy(), global_attention_mask=marks.numpy())["last_hidden_state"]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4, err_msg=backend)
