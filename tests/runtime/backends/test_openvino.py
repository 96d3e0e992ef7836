"""OpenVINO compute precisions that override the bundle's are used or refused."""

from __future__ import annotations

import platform
from collections import Counter

import numpy as np
import pytest

from lfx.errors import DependencyError
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
