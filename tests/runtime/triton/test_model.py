"""The file that `lfx triton` copies, with the module of Triton's server replaced."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lfx.runtime import Engine
from lfx.runtime.triton.repository import Settings, write_model
from tests.conftest import MakeBundle


class Tensor:
    """A tensor of the server's: a request's inputs and a response's outputs."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self.array = name, array

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        return Tensor(name, torch.utils.dlpack.from_dlpack(capsule).numpy())

    def name(self) -> str:
        return self._name

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@dataclass
class Request:
    """A request of the server's."""

    arrays: dict[str, Any]
    text: str = ""

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def parameters(self) -> str:
        return self.text

    def requested_output_names(self) -> list[str]:
        return ["logits"]


class TritonError(Exception):
    """An error of the server's."""

    INVALID_ARG, INTERNAL = range(2)

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@pytest.fixture
def counts() -> dict[str, int]:
    """Name of a counter -> what it was raised by."""
    return {}


@pytest.fixture
def server(counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `triton_python_backend_utils` of the server."""

    class MetricFamily:
        COUNTER = 0

        def __init__(self, name: str, description: str, kind: int) -> None:
            self.name = name

        def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802  # Triton's name
            assert labels == {"model": "cls", "version": "1"}

            def increment(count: int) -> None:
                counts[self.name] = counts.get(self.name, 0) + count

            return SimpleNamespace(increment=increment)

    module = ModuleType("triton_python_backend_utils")
    response = lambda tensors=(), error=None: SimpleNamespace(tensors=tensors, error=error)  # noqa: E731
    vars(module).update(MetricFamily=MetricFamily, Tensor=Tensor, TritonError=TritonError, InferenceResponse=response)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_model_answers_requests_and_counts(
    server: None, counts: dict[str, int], bundle: MakeBundle, tmp_path: Path
) -> None:
    source = bundle("text-classification")
    folder = write_model(source, tmp_path, Settings(name="cls", threads=1)).folder
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    parameters = {"model": {"string_value": "bundle"}, "threads": {"string_value": "1"}}
    model.initialize(
        {
            "model_name": "cls",
            "model_version": "1",
            "model_repository": str(folder),
            "model_config": json.dumps({"parameters": parameters}),
            "model_instance_kind": "CPU",
        }
    )
    counts.clear()
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    good, bad, broken = model.execute(
        [Request({"input_ids": ids}), Request({"input_ids": ids - 9}), Request({"input_ids": ids}, "{")]
    )
    assert good.error is None
    (logits,) = good.tensors
    with Engine(source, threads=1) as engine:
        np.testing.assert_allclose(logits.array, engine.run(ids)["logits"], rtol=0, atol=1e-5)
    assert (bad.error.code, "negative id" in str(bad.error)) == (TritonError.INVALID_ARG, True)
    assert str(broken.error).startswith("the request cannot be read: ")
    assert (counts["lfx_sequences_total"], counts["lfx_tokens_total"]) == (2, 6)
    model.finalize()
