"""OpenVINO compute precisions that override the bundle's are used or refused."""

from __future__ import annotations

import platform
import weakref
from collections import Counter
from collections.abc import Callable
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
from tests.conftest import MakeBundle, MakeLed
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


class Interrupted:
    """A compiled model; a signal handler runs at the end of each request."""

    def __init__(self, compiled: Any, handler: Callable[[], None]) -> None:
        self._compiled, self._handler = compiled, handler

    def create_infer_request(self) -> Any:
        self._request = self._compiled.create_infer_request()
        return self

    def infer(self) -> None:
        self._request.infer()
        self._handler()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def encode(graph: Any, length: int, alive: list[Any]) -> Any:
    """The hidden states of an LED's encoder; `alive` gets a weak reference to the memory of each input."""
    arrays = {name: np.full((1, length), 1, np.int64) for name in graph.input_names}
    alive += [weakref.ref(array) for array in arrays.values()]
    outputs = graph.infer_tensors({name: graph.tensor(array) for name, array in arrays.items()})
    return graph.array(outputs[graph.output_names[0]]).copy()


def test_the_inputs_of_an_interrupted_request_stay_until_the_next_one(
    led_bundle: MakeLed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with Engine(led_bundle()[1], "openvino", threads=1) as engine:
        assert engine._graphs is not None
        graph: Any = engine._graphs[0]
        last: list[Any] = []
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(graph, "_compiled", Interrupted(graph._compiled, interrupt))
            encode(graph, 40, last)
        assert all(reference() is not None for reference in last)  # OpenVINO has their addresses
        encode(graph, 41, [])
        assert all(reference() is None for reference in last)


def test_a_signal_handler_may_run_requests_while_one_runs(led_bundle: MakeLed, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(led_bundle()[1], "openvino", threads=1) as engine:
        assert engine._graphs is not None
        graph: Any = engine._graphs[0]
        compiled, expected = graph._compiled, [encode(graph, length, []) for length in (40, 30)]
        inner: list[Any] = []
        last: list[Any] = []

        def handler() -> None:
            graph._compiled = compiled
            inner.append(encode(graph, 30, last))

        with monkeypatch.context() as patched:
            patched.setattr(graph, "_compiled", Interrupted(compiled, handler))
            outer = encode(graph, 40, [])
        assert np.array_equal(outer, expected[0])
        assert np.array_equal(inner[0], expected[1])
        assert all(reference() is not None for reference in last)


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
