"""OpenVINO compute precisions that override the bundle's are used or refused."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lfx.errors import DependencyError
from lfx.export import export
from lfx.export.validate import compare_engine
from lfx.parity import full_cases
from lfx.runtime import Engine
from tests.conftest import MakeBundle
from tests.models import tiny_model

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'longformer-lfx[openvino]'")


def test_precision_bf16_computes_in_bfloat16_or_is_an_error(bundle: MakeBundle) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(DependencyError, match="this CPU has no bfloat16 arithmetic"):
            Engine(bundle(), "openvino", precision="bf16")
        return
    with Engine(bundle(), "openvino", precision="bf16") as engine:
        report = compare_engine(engine, tiny_model(), full_cases, lambda step: None)
    assert (engine.precision, report.precision) == ("bf16", "bf16")
    assert not report.failures()
    assert max(result.error for result in report.outputs.values()) > 1e-4  # the outputs are not those of float32


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="OpenVINO fuses attention on x86 alone")
def test_attention_is_one_fused_layer(bundle: MakeBundle) -> None:
    with Engine(bundle(), "openvino") as engine:
        layers = engine._backend._compiled.get_runtime_model().get_ops()  # type: ignore[attr-defined]
    kinds = Counter(layer.get_rt_info()["layerType"].astype(str) for layer in layers)
    assert kinds["Subgraph"] == tiny_model().config.num_hidden_layers
    assert not {"MatMul", "Softmax"} & set(kinds)  # all of attention is in the fused layer


class QuantizedWeight(nn.Module):
    """A base model with a head whose weight is stored in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(hidden_size=64)
        self.register_buffer("weight", torch.randint(-127, 128, (64, 64), dtype=torch.int8))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(input_ids, attention_mask=attention_mask)[0]
        return torch.matmul(hidden, self.weight.to(hidden.dtype) * 0.01)


@pytest.mark.slow
def test_activations_in_front_of_int8_weights_stay_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = export(QuantizedWeight().eval(), tmp_path / "out")
    ids = np.arange(3, 80)
    with Engine(bundle, "openvino") as engine, Engine(bundle, "onnxruntime") as other:
        actual, expected = engine.run(ids)["output"], other.run(ids)["output"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_kernels_of_past_shapes_are_limited(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    compile_model = openvino.Core.compile_model

    def record(core: Any, model: Any, device: str, config: dict[str, Any]) -> Any:
        given.append(config)
        return compile_model(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", record)
    Engine(bundle(), "openvino").close()
    assert [config["CPU_RUNTIME_CACHE_CAPACITY"] for config in given] == [100]


def test_a_cpu_without_bfloat16_refuses_it(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(DependencyError, match="leave precision out"):
        Engine(bundle(), "openvino", precision="bf16")


def test_precision_fp32_computes_a_bf16_bundle_in_float32(bundle: MakeBundle) -> None:
    ids = np.arange(3, 40)
    with Engine(bundle(precision="bf16"), "openvino", precision="fp32") as upcast, Engine(bundle()) as original:
        assert upcast.precision == "fp32"
        actual, expected = upcast.run(ids)["last_hidden_state"], original.run(ids)["last_hidden_state"]
    assert np.allclose(actual, expected, atol=0.1)


@pytest.mark.parametrize(
    ("backend", "precision", "message"),
    [
        ("onnxruntime", "bf16", "is an option of OpenVINO"),
        ("auto", "fp8", "choose one of: fp32, bf16"),
        ("reference", "fp32", "is an option of OpenVINO"),
        ("openvino", "fp8", "choose one of: fp32, bf16"),
    ],
)
def test_an_unsupported_precision_is_refused(bundle: MakeBundle, backend: str, precision: str, message: str) -> None:
    with pytest.raises(DependencyError, match=message):
        Engine(bundle(), backend, precision=precision)
