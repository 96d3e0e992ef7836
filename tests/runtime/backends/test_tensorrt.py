"""The TensorRT backend (memory, streams, CUDA graphs, profiles, threads) on the fake TensorRT of `fake_tensorrt`."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfx.errors import ArtifactError, DependencyError, InputError, LfxError
from lfx.manifest import sha256
from lfx.runtime import Engine
from lfx.runtime.backends import tensorrt
from lfx.runtime.dlpack import CPU
from lfx.runtime.plan import PlanManifest
from lfx.runtime.profile import Profile, Range
from lfx.signature import GRAPH_INPUTS, Signature, TensorSpec
from tests.runtime.backends import fake_tensorrt

pytestmark = pytest.mark.usefixtures("few_objects")
WIDTH = 4
SIGNATURE = Signature(
    architecture="LongformerModel",
    task="feature-extraction",
    precision="fp16",
    inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS),
    outputs=(
        TensorSpec("last_hidden_state", "float32", ("batch", "sequence", WIDTH)),
        TensorSpec("pooler_output", "float32", ("batch", WIDTH)),
    ),
    attention_windows=(8,),
    max_seqlen=64,
    vocab_size=99,
)
MANIFEST = PlanManifest(
    signature=SIGNATURE,
    flavor="tensorrt",
    tensorrt_version="10.14.1",
    target="sm90",
    profiles=(Profile(Range(1, 1, 8), Range(1, 16, 32)), Profile(Range(1, 1, 2), Range(1, 64, 64))),
    plugin_version="1",
    attention_nodes=2,
    plugin_layers=2,
    bundle={"name": "bundle", "sha256": ""},
    source={},
    quantization={},
    options={"flags": []},
    versions={},
    conversion={},
    plan={},
)


def compute(feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a simple model."""
    ids = feeds["input_ids"] * feeds["attention_mask"] + 1000 * feeds["global_attention_mask"]
    hidden = ids[..., None] + np.arange(WIDTH)
    return {"last_hidden_state": hidden, "pooler_output": hidden.sum(axis=1)}


def shape_of(name: str, shapes: dict[str, Any]) -> tuple[int, ...]:
    """The shape of an output."""
    batch, seqlen = shapes["input_ids"]
    return (batch, seqlen, WIDTH) if name == "last_hidden_state" else (batch, WIDTH)


@pytest.fixture
def cuda() -> fake_tensorrt.Cuda:
    """The fake CUDA runtime."""
    return fake_tensorrt.Cuda()


@pytest.fixture
def device_engine(cuda: fake_tensorrt.Cuda) -> fake_tensorrt.Engine:
    """The fake engine that TensorRT loads."""
    outputs = [spec.name for spec in SIGNATURE.outputs]
    return fake_tensorrt.Engine(cuda, list(GRAPH_INPUTS), outputs, shape_of, compute)


def write_plan(folder: Path, manifest: PlanManifest = MANIFEST) -> Path:
    """Write a plan of any bytes and its JSON."""
    plan = folder / "model.plan"
    plan.write_bytes(b"plan")
    replace(manifest, plan={"sha256": sha256(plan), "bytes": 4}).write(plan)
    return plan


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, cuda: fake_tensorrt.Cuda, device_engine: Any, tmp_path: Path) -> Any:
    """A fake machine with an H100, TensorRT 10.14.1 and the plugin."""
    trt = fake_tensorrt.TensorRt("10.14.1", device_engine)
    monkeypatch.setattr(tensorrt, "require", lambda module, extra: trt)
    monkeypatch.setattr(tensorrt, "cudart", lambda: cuda)
    monkeypatch.setattr(tensorrt, "require_gpu", lambda: "sm90")
    monkeypatch.setattr(tensorrt.plugins, "library", lambda: tmp_path / "liblfx_plugins.so")
    return trt


IDS = np.arange(12).reshape(2, 6)


def expected(ids: Any) -> dict[str, Any]:
    """The outputs that the model must give."""
    ones = np.ones_like(ids)
    return compute({"input_ids": ids, "attention_mask": ones, "global_attention_mask": 0 * ones})


def test_a_plan_gives_the_model_s_outputs(machine: Any, tmp_path: Path) -> None:
    with Engine(write_plan(tmp_path)) as engine:
        assert engine.backend == "tensorrt 10.14.1 sm90"
        assert machine.loaded == [str(tmp_path / "liblfx_plugins.so")]
        for name, array in expected(IDS).items():
            np.testing.assert_array_equal(engine.run(IDS)[name], array)
        ragged = engine.run([[5, 6, 7], [8]])
        assert [row.shape for row in ragged["last_hidden_state"]] == [(3, WIDTH), (1, WIDTH)]


def test_a_repeated_shape_is_replayed_from_a_graph(machine: Any, cuda: Any, tmp_path: Path) -> None:
    with Engine(write_plan(tmp_path)) as engine:
        for turn in range(6):
            ids = (IDS + turn) % 99
            np.testing.assert_array_equal(engine.run(ids)["pooler_output"], expected(ids)["pooler_output"])
        assert cuda.counts["graphs"] == 1
        assert cuda.counts["launches"] == 5  # the first run is not a graph
        copies = cuda.counts["copies"]
        engine.run(IDS)
        assert cuda.counts["copies"] == copies  # the graph has the copies


def test_a_new_shape_is_prepared_and_replaces_the_graph(machine: Any, cuda: Any, tmp_path: Path) -> None:
    larger = np.arange(40).reshape(2, 20)
    with Engine(write_plan(tmp_path)) as engine:
        for ids in (IDS, IDS, IDS, larger, IDS, IDS, larger, larger, larger, IDS):
            np.testing.assert_array_equal(engine.run(ids)["last_hidden_state"], expected(ids)["last_hidden_state"])
            assert cuda.counts["graphs"] <= 1
        assert cuda.counts["launches"] == 2 + 1 + 2  # the second and later runs of a shape in a row
        assert len(cuda.memory) == 2 * 5  # device and host memory of three inputs and two outputs


def test_nothing_is_set_on_a_context_between_capture_and_replay(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("set_input_shape", "set_tensor_address", "set_optimization_profile_async", "execute_async_v3"):
        original = getattr(fake_tensorrt.Context, name)
        monkeypatch.setattr(
            fake_tensorrt.Context,
            name,
            lambda self, *args, name=name, original=original: calls.append(name) or original(self, *args),
        )
    with Engine(write_plan(tmp_path)) as engine:
        engine.run(IDS)
        assert (
            "set_input_shape" in calls and calls[-1] == "execute_async_v3"
        )  # a run without a graph applies the shapes
        calls.clear()
        engine.run(IDS)
        assert calls == ["execute_async_v3"]  # the run that is captured
        engine.run(IDS)
        assert calls == ["execute_async_v3"]


def test_a_stream_that_tensorrt_rtx_cannot_capture_is_not_captured(
    machine: Any, cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt.Context, "is_stream_capturable", lambda self, stream: False, raising=False)
    with Engine(write_plan(tmp_path)) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine.run(IDS)["pooler_output"], expected(IDS)["pooler_output"])
    assert cuda.counts["launches"] == 0


def test_a_failed_allocation_leaks_nothing(machine: Any, cuda: Any, tmp_path: Path) -> None:
    engine = Engine(write_plan(tmp_path))
    original = cuda.cudaMallocHost
    cuda.cudaMallocHost = lambda size: (fake_tensorrt.Error.cudaErrorInvalidValue, 0)
    for _ in range(3):
        with pytest.raises(LfxError, match="CUDA failed"):
            engine.run(IDS)
    assert cuda.memory == {}
    cuda.cudaMallocHost = original
    np.testing.assert_array_equal(engine.run(IDS)["pooler_output"], expected(IDS)["pooler_output"])


def test_a_layer_that_cannot_be_captured_runs_without_a_graph(
    machine: Any, cuda: Any, device_engine: Any, tmp_path: Path
) -> None:
    device_engine.uncapturable = True
    with Engine(write_plan(tmp_path)) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine.run(IDS)["pooler_output"], expected(IDS)["pooler_output"])
    assert cuda.counts["launches"] == 0


def test_each_thread_has_its_own_context(machine: Any, device_engine: Any, tmp_path: Path) -> None:
    failures: list[Any] = []
    with Engine(write_plan(tmp_path)) as engine:

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(50):
                ids = random.integers(0, 99, (random.integers(1, 3), random.integers(1, 33)))
                if not np.array_equal(engine.run(ids)["pooler_output"], expected(ids)["pooler_output"]):
                    failures.append(ids)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert device_engine.contexts == 4


def test_close_frees_all_memory(machine: Any, cuda: Any, tmp_path: Path) -> None:
    engine = Engine(write_plan(tmp_path))
    for _ in range(3):
        engine.run(IDS)
    assert cuda.memory
    engine.close()
    gc.collect()
    assert (cuda.memory, cuda.counts["graphs"]) == ({}, 0)


WIDE = 4096  # the last_hidden_state of IDS then is large enough for pinned memory of its own


@pytest.fixture
def wide(device_engine: Any) -> Any:
    """Makes last_hidden_state `WIDE` numbers per token."""

    def widened(feeds: dict[str, Any]) -> dict[str, Any]:
        hidden = compute(feeds)["last_hidden_state"]
        return {"last_hidden_state": np.tile(hidden, WIDE // WIDTH), "pooler_output": hidden.sum(axis=1)}

    def shape(name: str, shapes: dict[str, Any]) -> tuple[int, ...]:
        return (*shapes["input_ids"], WIDE) if name == "last_hidden_state" else shape_of(name, shapes)

    device_engine.compute, device_engine.shape_of = widened, shape
    return widened


def hidden_of(ids: Any) -> Any:
    """The wide last_hidden_state of a batch."""
    return np.tile(expected(ids)["last_hidden_state"], WIDE // WIDTH)


def test_a_large_output_is_pinned_memory_that_is_reused_when_the_caller_has_dropped_it(
    machine: Any, cuda: Any, wide: Any, tmp_path: Path
) -> None:
    batches = [IDS.repeat(2, axis=1) + turn for turn in range(5)]
    with Engine(write_plan(tmp_path)) as engine:
        kept = [engine.run(ids)["last_hidden_state"] for ids in batches]
        view, base = kept[0][1:, 3], kept[0].ctypes.data
        for ids, array in zip(batches, kept, strict=True):
            assert array.flags.writeable and array.ctypes.data in cuda.memory
            np.testing.assert_array_equal(array, hidden_of(ids))
        addresses = {array.ctypes.data for array in kept}
        assert len(addresses) == len(batches)
        del array
        kept.clear()
        gc.collect()
        later = [engine.run(ids)["last_hidden_state"] for ids in batches]
        used = {array.ctypes.data for array in later}
        assert base not in used  # a view of it is still in use
        assert len(addresses & used) == len(batches) - 1
        np.testing.assert_array_equal(view, hidden_of(batches[0])[1:, 3])
        assert cuda.counts["launches"] == 2 * len(batches) - 1  # the graph is kept, whatever memory a run has
        del view
    del later, engine
    gc.collect()
    assert cuda.memory == {}


def test_above_the_limit_of_pinned_memory_outputs_are_copied(
    machine: Any, cuda: Any, wide: Any, tmp_path: Path
) -> None:
    ids = IDS.repeat(2, axis=1)
    with Engine(write_plan(tmp_path)) as engine:
        engine._backend._pool._limit_bytes = 2 * ids.size * WIDE * 4  # type: ignore[union-attr]
        kept = [engine.run(ids + turn)["last_hidden_state"] for turn in range(4)]
        assert [array.ctypes.data in cuda.memory for array in kept] == [True, True, False, False]
        for turn, array in enumerate(kept):
            np.testing.assert_array_equal(array, hidden_of(ids + turn))
        larger = ids.repeat(2, axis=0)
        kept.clear()
        del array
        gc.collect()
        result = engine.run(larger)["last_hidden_state"]  # what waits is too small, and freed to make room
        assert result.ctypes.data in cuda.memory
        np.testing.assert_array_equal(result, hidden_of(larger))


def test_each_thread_gets_pinned_memory_of_its_own(machine: Any, wide: Any, tmp_path: Path) -> None:
    failures: list[Any] = []
    with Engine(write_plan(tmp_path)) as engine:

        def work(seed: int) -> None:
            random, previous = np.random.default_rng(seed), None
            for _ in range(15):
                ids = random.integers(0, 99, (2, random.integers(9, 12)))
                result = engine.run(ids)["last_hidden_state"]
                for given, array in (previous,) if previous is not None else ():
                    if not np.array_equal(array, hidden_of(given)):
                        failures.append(given)
                previous = (ids, result)
                if not np.array_equal(result, hidden_of(ids)):
                    failures.append(ids)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_only_the_outputs_asked_for_are_copied(machine: Any, cuda: Any, tmp_path: Path) -> None:
    with Engine(write_plan(tmp_path)) as engine:
        for turn in range(4):
            outputs = engine.run(IDS + turn, outputs=["pooler_output"])
            assert list(outputs) == ["pooler_output"]
            np.testing.assert_array_equal(outputs["pooler_output"], expected(IDS + turn)["pooler_output"])
        assert cuda.counts["copies"] == 2 * (3 + 1)  # of a run and of the graph: three inputs and one output
        assert cuda.counts["launches"] == 3
        both = engine.run(IDS)
        np.testing.assert_array_equal(both["last_hidden_state"], expected(IDS)["last_hidden_state"])


def test_device_outputs_stay_in_device_memory_of_their_own(
    machine: Any, cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "DLPACK_DEVICE", (CPU, 0))  # the fake device memory is host memory
    with Engine(write_plan(tmp_path)) as engine:
        kept = [engine.run(IDS + turn, device_outputs=True) for turn in range(4)]
        assert cuda.counts["launches"] == 3
        tensors = [torch.from_dlpack(outputs["last_hidden_state"]) for outputs in kept]
        shapes = {outputs["pooler_output"].shape for outputs in kept}
        assert shapes == {(2, WIDTH)}
        kept.clear()
        for turn, tensor in enumerate(tensors):
            np.testing.assert_array_equal(tensor.numpy(), expected(IDS + turn)["last_hidden_state"])
        before = len(cuda.memory)
        tensors.clear()
        del tensor
        gc.collect()
        assert len(cuda.memory) == before - 4
        host = engine.run(IDS)["pooler_output"]
        np.testing.assert_array_equal(host, expected(IDS)["pooler_output"])
    del engine
    gc.collect()
    assert cuda.memory == {}


def test_device_outputs_say_that_they_are_on_the_gpu(machine: Any, tmp_path: Path) -> None:
    with Engine(write_plan(tmp_path)) as engine:
        assert engine.run(IDS, device_outputs=True)["pooler_output"].__dlpack_device__() == (2, 0)


def test_a_run_that_fails_returns_its_memory_and_the_next_run_works(
    machine: Any, cuda: Any, wide: Any, tmp_path: Path
) -> None:
    ids = IDS.repeat(2, axis=1)
    with Engine(write_plan(tmp_path)) as engine:
        engine.run(ids)
        synchronize = cuda.cudaStreamSynchronize
        cuda.cudaStreamSynchronize = lambda stream: (fake_tensorrt.Error.cudaErrorInvalidValue,)
        with pytest.raises(LfxError, match="CUDA failed: cudaErrorInvalidValue"):
            engine.run(ids)
        cuda.cudaStreamSynchronize = synchronize
        np.testing.assert_array_equal(engine.run(ids)["last_hidden_state"], hidden_of(ids))
    del engine
    gc.collect()
    assert cuda.memory == {}


def test_the_profile_follows_the_shape(machine: Any, tmp_path: Path, monkeypatch: Any) -> None:
    profiles: list[int] = []
    original = fake_tensorrt.Context.set_optimization_profile_async
    monkeypatch.setattr(
        fake_tensorrt.Context,
        "set_optimization_profile_async",
        lambda self, profile, stream: profiles.append(profile) or original(self, profile, stream),
    )
    with Engine(write_plan(tmp_path)) as engine:
        for shape in ((1, 10), (8, 32), (1, 60), (2, 33), (1, 5)):
            ids = np.ones(shape, int)
            np.testing.assert_array_equal(engine.run(ids)["pooler_output"], expected(ids)["pooler_output"])
        assert profiles == [1, 0]  # a new context has profile 0 selected
        with pytest.raises(
            InputError, match=r"batch 3, seqlen 40 is outside what the plan was built for \(batch 1:1:8"
        ):
            engine.run(np.ones((3, 40), int))
        with pytest.raises(InputError, match="9"):
            engine.run(np.ones((9, 1), int))


def test_a_plan_that_this_machine_cannot_run_is_refused_in_one_line(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match=r"was built for sm89, and this GPU is sm90; build it again here"):
        Engine(write_plan(tmp_path, replace(MANIFEST, target="sm89")))
    with pytest.raises(ArtifactError, match=r"built by tensorrt 10\.13, and 10\.14\.1 is installed"):
        Engine(write_plan(tmp_path, replace(MANIFEST, tensorrt_version="10.13")))
    compatible = replace(MANIFEST, tensorrt_version="10.13", options={"flags": ["VERSION_COMPATIBLE"]})
    Engine(write_plan(tmp_path, compatible)).close()
    machine.engine = None
    with pytest.raises(ArtifactError, match="cannot be loaded by tensorrt: the plan is not for me"):
        Engine(write_plan(tmp_path))
    monkeypatch.setattr(tensorrt, "require_gpu", _no_gpu)
    with pytest.raises(DependencyError, match="no NVIDIA GPU"):
        Engine(write_plan(tmp_path))


def _no_gpu() -> str:
    raise DependencyError("this machine has no NVIDIA GPU")


def test_a_cuda_error_is_named(machine: Any, cuda: Any, tmp_path: Path) -> None:
    with Engine(write_plan(tmp_path)) as engine:
        cuda.cudaStreamSynchronize = lambda stream: (fake_tensorrt.Error.cudaErrorInvalidValue,)
        with pytest.raises(LfxError, match="CUDA failed: cudaErrorInvalidValue"):
            engine.run(IDS)


def test_a_plan_with_other_outputs_than_its_json_is_refused(machine: Any, device_engine: Any, tmp_path: Path) -> None:
    device_engine.outputs = ["logits"]
    device_engine.num_io_tensors = 4
    with pytest.raises(ArtifactError, match="other inputs or outputs than its manifest"):
        Engine(write_plan(tmp_path))
