"""Choosing outputs: only those asked for, in float16, and on the device that computes them."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import numpy as np
import pytest
import torch

from lfx.errors import InputError
from lfx.runtime import Batcher, Engine
from lfx.runtime.backends.onnxruntime import run_on_device
from lfx.runtime.dlpack import CPU, DeviceArray
from lfx.runtime.outputs import output_bytes, request_outputs
from lfx.signature import TensorSpec
from tests.conftest import MakeBundle

pytestmark = pytest.mark.usefixtures("few_objects")
IDS = [[5, 6, 7, 8], [9, 8, 7, 6]]
RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(params=["onnxruntime", "openvino", "reference"])
def engine(bundle: MakeBundle, request: pytest.FixtureRequest) -> Any:
    """An Engine of each backend on the CPU, of a model with two outputs."""
    with Engine(bundle(), backend=request.param) as engine:
        yield engine


def test_only_the_outputs_asked_for_are_returned_in_the_order_asked_for(engine: Engine) -> None:
    both = engine.run(IDS)
    pooled = engine.run(IDS, outputs=["pooler_output"])
    assert list(pooled) == ["pooler_output"]
    np.testing.assert_array_equal(pooled["pooler_output"], both["pooler_output"])
    swapped = engine.run(IDS, outputs=("pooler_output", "last_hidden_state", "pooler_output"))
    assert list(swapped) == ["pooler_output", "last_hidden_state"]
    np.testing.assert_array_equal(swapped["last_hidden_state"], both["last_hidden_state"])


def test_the_backend_is_asked_for_these_outputs_only(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(bundle()) as engine:
        asked: list[Any] = []
        infer = engine._backend.infer  # type: ignore[union-attr]

        def recorded(feeds: Any, names: Any, **options: Any) -> Any:
            asked.append(names)
            return infer(feeds, names, **options)

        monkeypatch.setattr(engine._backend, "infer", recorded)
        engine.run(RAGGED, outputs=["pooler_output"])
        list(engine.stream(RAGGED, outputs=["pooler_output"]))
        assert set(asked) == {("pooler_output",)}
        asked.clear()
        with Batcher(engine, max_delay_ms=200) as batcher:
            first = batcher.submit([5, 6], outputs=["pooler_output"])
            second = batcher.submit([7, 8], outputs=["pooler_output"])
            assert list(first.result()) == list(second.result()) == ["pooler_output"]
            assert asked == [("pooler_output",)]
            asked.clear()
            first, second = batcher.submit([5, 6], outputs=["pooler_output"]), batcher.submit([7, 8])
            assert (list(first.result()), len(second.result())) == (["pooler_output"], 2)
            assert asked == [None]


def test_stream_and_ragged_runs_return_these_outputs_only(engine: Engine) -> None:
    expected = engine.run(RAGGED)
    ragged = engine.run(RAGGED, outputs=["pooler_output"])
    assert list(ragged) == ["pooler_output"]
    np.testing.assert_array_equal(ragged["pooler_output"], expected["pooler_output"])
    rows = list(engine.stream(RAGGED, outputs=["pooler_output"], output_dtype="float16"))
    assert [list(row) for row in rows] == [["pooler_output"]] * 3
    assert {row["pooler_output"].dtype for row in rows} == {np.dtype("float16")}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["pooled"], "the model has no output 'pooled'; its outputs are last_hidden_state, pooler_output"),
        ([3], "the model has no output 3; its outputs are last_hidden_state, pooler_output"),
        ("pooler_output", r"outputs is 'pooler_output'; give a list of names, such as outputs=\['pooler_output'\]"),
        ([], "outputs is an empty list; give at least one of last_hidden_state, pooler_output"),
        (7, "outputs is 7; give a list of names"),
        (range(10**12), "the model has no output 0"),
        (np.array("pooler_output"), "outputs is array.*; give a list of names"),
    ],
)
def test_unknown_outputs_are_refused_with_the_list(bundle: MakeBundle, outputs: Any, message: str) -> None:
    with Engine(bundle()) as engine, Batcher(engine) as batcher:
        for run in (engine.run, batcher.submit):
            with pytest.raises(InputError, match=message):
                run(IDS[:1], outputs=outputs)
        with pytest.raises(InputError, match=message):
            engine.stream(IDS, outputs=outputs)


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16")])
def test_float16_outputs_are_the_float32_outputs_rounded(engine: Engine, dtype: Any) -> None:
    for ids in (IDS, RAGGED):
        wide, half = engine.run(ids), engine.run(ids, output_dtype=dtype)
        for name in wide:
            for one, other in zip(wide[name], half[name], strict=True):
                assert other.dtype == np.float16
                np.testing.assert_array_equal(other, one.astype(np.float16))
    assert engine.run(IDS, output_dtype="float32")["pooler_output"].dtype == np.float32


def test_numbers_that_float16_cannot_hold_become_infinite_and_integers_stay(bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine:
        request = request_outputs(engine.signature, output_dtype="float16")
    converted = request.convert({"a": np.float32([1e9, -1e9, 1.0]), "ids": np.int64([1 << 40])})
    assert converted["a"].tolist() == [np.inf, -np.inf, 1.0]
    assert converted["ids"].dtype == np.int64


def test_options_that_do_not_fit_are_refused(bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine:
        for options, message in (
            ({"output_dtype": "int8"}, "output_dtype 'int8' is not known; choose one of: float32, float16"),
            ({"output_dtype": object()}, "output_dtype"),
            ({"output_dtype": "\ud800"}, r"output_dtype '\\ud800' is not known"),
            ({"device_outputs": 1}, "device_outputs is 1; give True or False"),
            ({"device_outputs": True, "output_dtype": "float16"}, "output_dtype converts on the host"),
            ({"device_outputs": True, "on_error": "return"}, "device_outputs is for sequences of one length"),
        ):
            with pytest.raises(InputError, match=message):
                engine.run(IDS, **options)
        with pytest.raises(InputError, match="the sequences have different lengths; run each length on its own"):
            engine.run(RAGGED, device_outputs=True)


def test_attention_outputs_that_are_not_asked_for_do_not_stop_a_ragged_run(bundle: MakeBundle) -> None:
    with Engine(bundle(output_attentions=True)) as engine:
        with pytest.raises(InputError, match="width of this model's attention outputs"):
            engine.run(RAGGED)
        rows = engine.run(RAGGED, outputs=["last_hidden_state"])["last_hidden_state"]
        assert [len(row) for row in rows] == [3, 1, 5]
        with pytest.raises(InputError, match="width of this model's attention outputs"):
            engine.run(RAGGED, outputs=["attentions.0"])


def test_on_the_cpu_device_outputs_are_arrays_that_torch_takes(engine: Engine) -> None:
    outputs = engine.run(IDS, device_outputs=True)
    for name, expected in engine.run(IDS).items():
        np.testing.assert_array_equal(torch.from_dlpack(outputs[name]).numpy(), expected)


def test_outputs_that_onnx_runtime_keeps_on_its_device_are_taken_by_torch(bundle: MakeBundle) -> None:
    with Engine(bundle()) as engine:
        ids = np.array(IDS)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "global_attention_mask": np.zeros_like(ids)}
        session = engine._backend._session  # type: ignore[union-attr]
        hidden, pooled = run_on_device(session, feeds, ["last_hidden_state", "pooler_output"], "cpu")
        assert (hidden.shape[:2], len(pooled.shape)) == ((2, 4), 2)
        tensor = torch.from_dlpack(hidden)
        del hidden, session
        np.testing.assert_array_equal(tensor.numpy(), engine.run(IDS)["last_hidden_state"])


class Owner:
    """Owner of the memory of a DeviceArray."""

    alive = 0

    def __init__(self, array: Any) -> None:
        self.array = array
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1


def device_array(array: Any) -> DeviceArray:
    """A DeviceArray in host memory."""
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, (CPU, 0), Owner(array))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
def test_a_device_array_shares_its_memory_until_the_last_reference_ends(dtype: str) -> None:
    expected = np.arange(24).reshape(2, 3, 4).astype(dtype)
    array = device_array(expected.copy())
    first, second = torch.from_dlpack(array), torch.from_dlpack(array)
    del array
    np.testing.assert_array_equal(first.numpy(), expected)
    first[0, 0, 0] = 1
    assert second[0, 0, 0] == 1
    del first
    assert Owner.alive == 1
    del second
    gc.collect()
    assert Owner.alive == 0


def test_a_capsule_that_nobody_takes_frees_the_memory() -> None:
    array = device_array(np.zeros(3, np.float32))
    capsule = array.__dlpack__()
    del array
    assert Owner.alive == 1
    del capsule
    assert Owner.alive == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (("batch", 5), 0),
        (("batch", "sequence", 5), 4 * 5 * 7 * 3),
        (("batch", "choices", "sequence"), 4 * 7 * 3),
        (("batch", "sequence", "sequence", 2), 4 * 2 * 7 * 7 * 3),
    ],
)
def test_the_bytes_of_outputs_grow_with_each_sequence_axis(
    shape: tuple[int | str, ...], size: int, bundle: MakeBundle
) -> None:
    with Engine(bundle(), threads=1) as engine:
        signature = dataclasses.replace(engine.signature, outputs=(TensorSpec("scores", "float32", shape),))
    assert output_bytes(signature, 7, 3) == size
