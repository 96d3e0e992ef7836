"""`Engine.generate` on two plans, on the fake TensorRT of `fake_tensorrt`: tokens, memory and copies.

The fake engines compute with ONNX Runtime and the graphs of a tiny LED, so that the tokens of the bundle are expected.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from lfx.errors import ArtifactError, InputError, LfxError
from lfx.manifest import Manifest, sha256
from lfx.runtime import Engine
from lfx.runtime.backends import device_tensors, tensorrt
from lfx.runtime.generation.defaults import read_defaults
from lfx.runtime.plan import DecoderPlan, PlanManifest, decoder_path, json_path
from lfx.runtime.profile import DecoderProfile, Profile, Range
from lfx.signature import Signature, TensorSpec
from tests.conftest import MakeLed
from tests.marks import fast_if
from tests.models import VOCAB_SIZE
from tests.runtime.backends import fake_tensorrt

pytestmark = pytest.mark.usefixtures("few_objects")
PROFILES = (Profile(Range(1, 1, 4), Range(1, 32, 64)), Profile(Range(1, 1, 4), Range(65, 128, 200)))
DECODER_PROFILES = tuple(
    DecoderProfile(Range(1, 4, 16), Range(1, 1, 4), Range(0, 10, 39), profile.seqlen) for profile in PROFILES
)
IDS = np.random.default_rng(1).integers(3, VOCAB_SIZE, (3, 40))


@pytest.fixture(scope="module")
def bundle(led_bundle: MakeLed) -> Path:
    """The bundle of a tiny LED."""
    return led_bundle(7)[1]


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Any:
    """An Engine that runs the bundle in ONNX Runtime."""
    with Engine(bundle, "onnxruntime", kernels="function") as engine:
        yield engine


def fake_engine(
    cuda: Any, file: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> fake_tensorrt.Engine:
    """An engine that computes with ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(file))
    names = [spec.name for spec in outputs]
    specs = {spec.name: spec for spec in outputs}

    def shape_of(name: str, shapes: dict[str, Any]) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for spec in inputs:
            for axis, size in zip(spec.shape, shapes[spec.name], strict=True):
                # As in TensorRT, axes of one name are equal.
                assert not isinstance(axis, str) or sizes.setdefault(axis, size) == size
        sizes["past + tokens"] = sizes.get("past", 0) + sizes.get("tokens", 0)
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in specs[name].shape)

    return fake_tensorrt.Engine(
        cuda,
        [spec.name for spec in inputs],
        names,
        shape_of,
        lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)),
        {spec.name: spec.dtype for spec in (*inputs, *outputs)},
    )


@pytest.fixture
def cuda() -> fake_tensorrt.Cuda:
    """The fake CUDA runtime."""
    return fake_tensorrt.Cuda()


@pytest.fixture
def plan(bundle: Path, cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two plans and their JSON, alone in a folder, on a fake machine with an H100."""
    manifest = Manifest.read(bundle)
    signature, decoder = manifest.signature, manifest.signature.decoder
    assert decoder is not None
    trt = fake_tensorrt.TensorRt("10.14.1", None)
    trt.engines = {
        b"encoder": fake_engine(cuda, bundle / "encoder_model.onnx", signature.inputs, signature.outputs),
        b"decoder": fake_engine(cuda, bundle / "decoder_model.onnx", decoder.inputs, decoder.outputs),
    }
    monkeypatch.setattr(tensorrt, "require", lambda module, extra: trt)
    monkeypatch.setattr(tensorrt, "cudart", lambda: cuda)
    monkeypatch.setattr(tensorrt, "require_gpu", lambda: "sm90")
    monkeypatch.setattr(tensorrt.plugins, "library", lambda: tmp_path / "liblfx_plugins.so")
    return write_plan(tmp_path, signature, read_defaults(bundle))


def write_plan(folder: Path, signature: Signature, generation: dict[str, Any]) -> Path:
    """Write two plans and their JSON."""
    plan = folder / "led.plan"
    plan.write_bytes(b"encoder")
    decoder_path(plan).write_bytes(b"decoder")
    assert signature.decoder is not None
    PlanManifest(
        signature=replace(signature, max_seqlen=200, decoder=replace(signature.decoder, max_tokens=40)),
        flavor="tensorrt",
        tensorrt_version="10.14.1",
        target="sm90",
        profiles=PROFILES,
        plugin_version="1",
        attention_nodes=4,
        plugin_layers=4,
        bundle={"name": "led", "sha256": ""},
        source={},
        quantization={},
        options={"flags": []},
        versions={},
        conversion={},
        plan={"sha256": sha256(plan), "bytes": 7},
        decoder_plan=DecoderPlan(DECODER_PROFILES, generation, {"sha256": sha256(decoder_path(plan)), "bytes": 7}),
    ).write(plan)
    return plan


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, no n-gram twice": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "2 beams": {"num_beams": 2, "length_penalty": 0.5},
    "4 beams": {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    "sampling": {"do_sample": True, "seed": 3, "top_k": 20, "num_return_sequences": 2},
}


@fast_if(lambda name: name in ("greedy", "2 beams"))
@pytest.mark.parametrize("name", SEARCHES)
def test_two_plans_give_the_tokens_of_the_bundle(name: str, plan: Path, reference: Engine) -> None:
    options = {"max_new_tokens": 20, **SEARCHES[name]}
    sequences = [IDS[0], IDS[1, :7], IDS[2, :33], np.tile(IDS[0], 3)]  # the last one needs the second profile
    with Engine(plan) as engine:
        np.testing.assert_array_equal(engine.generate(IDS, **options), reference.generate(IDS, **options))
        np.testing.assert_array_equal(engine.generate(IDS[:1], **options), reference.generate(IDS[:1], **options))
        np.testing.assert_array_equal(engine.generate(sequences, **options), reference.generate(sequences, **options))


def test_tokens_are_streamed_and_runs_of_the_encoder_come_between(plan: Path, reference: Engine) -> None:
    with Engine(plan) as engine:
        columns = []
        for column in engine.generate(IDS, stream=True, max_new_tokens=8):
            columns.append(column)
            hidden = engine.run(IDS)["last_hidden_state"]
        np.testing.assert_array_equal(np.stack(columns, 1), reference.generate(IDS, max_new_tokens=8)[:, 1:])
        np.testing.assert_allclose(hidden, reference.run(IDS)["last_hidden_state"], rtol=0, atol=1e-5)


def test_keys_and_values_stay_on_the_device(plan: Path, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, int]] = []  # tensor name -> address, of each run of the decoder
    execute = fake_tensorrt.Context.execute_async_v3

    def record(self: Any, stream: int) -> bool:
        if "logits" in self.engine.outputs:
            steps.append(dict(self.addresses))
        return execute(self, stream)

    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", record)
    rows, new_tokens = len(IDS), 12
    with Engine(plan) as engine:
        tokens = engine.generate(IDS, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    assert tokens.shape == (rows, new_tokens + 1)
    assert len(steps) == new_tokens
    for name in steps[0]:
        if name.startswith("past_key_values") and ".decoder." in name:
            present = name.replace("past_key_values", "present")
            assert [step[name] for step in steps[1:]] == [step[present] for step in steps[:-1]]
        elif name.startswith("past_key_values"):
            assert len({step[name] for step in steps}) == 1  # bound to what the encoder wrote
    # To the device: three inputs of the encoder, the decoder's mask, and a token of each row at each step.
    assert cuda.copied_bytes == {1: 8 * (4 * IDS.size + new_tokens * rows), 2: 4 * new_tokens * rows * VOCAB_SIZE, 3: 0}


def test_beams_change_places_on_the_device(plan: Path, cuda: Any) -> None:
    with Engine(plan) as engine:
        engine.generate(IDS, num_beams=3, max_new_tokens=12)
    steps = 12
    assert cuda.copied_bytes[1] <= 8 * (4 * IDS.size + steps * 9)
    assert cuda.copied_bytes[2] <= 4 * steps * 9 * VOCAB_SIZE
    assert cuda.copied_bytes[3] > 0


def test_close_frees_all_memory(plan: Path, cuda: Any) -> None:
    engine = Engine(plan)
    engine.generate(IDS, num_beams=2, max_new_tokens=30)
    engine.close()
    gc.collect()
    assert cuda.memory == {}


def test_memory_of_the_steps_is_used_again(plan: Path, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    allocate = cuda.cudaMalloc
    monkeypatch.setattr(cuda, "cudaMalloc", lambda size: sizes.append(size) or allocate(size))
    counts = []
    with Engine(plan) as engine:
        for _ in range(2):
            engine.generate(IDS, max_new_tokens=39, min_new_tokens=39)
            counts.append(len(sizes) - sum(counts))
    assert counts[1] < counts[0] < 39 * 5 / 2  # 39 steps write five tensors each


def test_a_full_device_frees_the_memory_that_waits(cuda: Any) -> None:
    pool = device_tensors.DevicePool(cuda)
    allocate, limit = cuda.cudaMalloc, 1 << 20

    def limited(size: int) -> Any:
        used = sum(len(buffer) for buffer in cuda.memory.values())
        return allocate(size) if used + size <= limit else (fake_tensorrt.Error.cudaErrorInvalidValue, 0)

    cuda.cudaMalloc = limited
    byte = np.dtype(np.uint8)
    kept = pool.tensor((limit // 2,), byte)
    pool.tensor((limit // 4,), byte)  # waits
    pool.tensor((limit // 4 - 4096,), byte)
    assert pool.tensor((limit // 2,), byte).memory.address in cuda.memory
    with pytest.raises(LfxError, match="CUDA failed"):
        pool.tensor((limit,), byte)
    del kept, pool
    gc.collect()
    assert cuda.memory == {}


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 0, 1, 2, 2], [1], []])
def test_rows_are_taken_on_the_device(rows: list[int], cuda: Any) -> None:
    stream = cuda.cudaStreamCreateWithFlags(1)[1]
    copies = device_tensors.Copies(cuda, stream, device_tensors.DevicePool(cuda))
    array = np.random.default_rng(0).random((3, 2, 5), np.float32)
    taken = copies.take(copies.upload(array), np.array(rows, np.int64))
    np.testing.assert_array_equal(copies.download(taken), array[rows])


def test_each_thread_writes_its_own_texts(plan: Path, reference: Engine) -> None:
    failures: list[Any] = []
    expected = {n: reference.generate(IDS[:, :n], num_beams=2, max_new_tokens=9) for n in (5, 17, 40)}
    with Engine(plan) as engine:

        def work() -> None:
            for n, tokens in expected.items():
                if not np.array_equal(engine.generate(IDS[:, :n], num_beams=2, max_new_tokens=9), tokens):
                    failures.append(n)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_defaults_are_those_that_the_plan_was_built_with(plan: Path, bundle: Path, reference: Engine) -> None:
    signature = Manifest.read(bundle).signature
    write_plan(plan.parent, signature, {**read_defaults(bundle), "num_beams": 3, "max_new_tokens": 11})
    with Engine(plan) as engine:
        tokens = engine.generate(IDS)
    np.testing.assert_array_equal(tokens, reference.generate(IDS, num_beams=3, max_new_tokens=11))


def test_what_the_plans_were_not_built_for_is_refused(plan: Path) -> None:
    with Engine(plan) as engine:
        with pytest.raises(InputError, match=r"rows 18, tokens 1, cached 0, seqlen 40 is outside .* --num-beams N"):
            engine.generate(IDS, num_beams=6)
        with pytest.raises(InputError, match="max_new_tokens 41 is above what the decoder has positions for"):
            engine.generate(IDS, max_new_tokens=41)
        with pytest.raises(InputError, match="batch 5, seqlen 40 is outside what the plan was built for"):
            engine.generate(np.ones((5, 40), int) + 3)


def test_a_plan_without_its_decoder_is_refused(plan: Path) -> None:
    decoder_path(plan).write_bytes(b"decodes")
    with pytest.raises(ArtifactError, match=r"led\.plan\.decoder was changed after the build"):
        Engine(plan)
    decoder_path(plan).unlink()
    with pytest.raises(ArtifactError, match=r"led\.plan\.decoder cannot be read: No such file"):
        Engine(plan)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "fp16"}, {"shape": ("batch", -1, "past", 8)}, {"shape": ("batch", 4, "past", 2**62)}, {"shape": (4,)}],
    ids=str,
)
def test_keys_and_values_that_no_decoder_has_are_refused(change: dict[str, Any], plan: Path) -> None:
    manifest = PlanManifest.read(plan)
    decoder = manifest.signature.decoder
    assert decoder is not None
    inputs = [replace(spec, **change) if spec.name.endswith("0.decoder.key") else spec for spec in decoder.inputs]
    signature = replace(manifest.signature, decoder=replace(decoder, inputs=tuple(inputs)))
    replace(manifest, signature=signature).write(plan)
    with pytest.raises(ArtifactError, match=r"past_key_values\.0\.decoder\.key of .*, which no decoder has"):
        Engine(plan)


def test_a_manifest_with_a_broken_decoder_is_refused(plan: Path, bundle: Path) -> None:
    manifest = PlanManifest.read(plan)
    assert manifest.decoder_plan is not None
    for decoder, message in (
        (replace(manifest.decoder_plan, profiles=()), "it has no profile"),
        (replace(manifest.decoder_plan, profiles=(replace(DECODER_PROFILES[0], past=Range(5, 4, 3)),)), "out of order"),
        (replace(manifest.decoder_plan, plan={"sha256": ""}), "it has no bytes"),
    ):
        replace(manifest, decoder_plan=decoder).write(plan)
        with pytest.raises(ArtifactError, match=message):
            Engine(plan)
    replace(manifest, signature=replace(manifest.signature, task="feature-extraction", decoder=None)).write(plan)
    with pytest.raises(ArtifactError, match="it has a decoder's plan, and no decoder"):
        PlanManifest.read(plan)
    assert json_path(plan).exists()
