"""`Engine` on tiny bundles: outputs, and errors of arguments, files and backends."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lfx import machine
from lfx.errors import ArtifactError, DependencyError, InputError, LfxError
from lfx.manifest import MANIFEST, MODEL, WEIGHTS, sealed
from lfx.runtime import Batcher, Engine, backends
from lfx.runtime.backends.onnxruntime import DISABLED_ON_CPU
from lfx.signature import Signature, TensorSpec
from tests.conftest import NULL_BYTE, MakeBundle
from tests.marks import fast_if
from tests.models import VOCAB_SIZE, tiny_model

OUTPUTS = ["last_hidden_state", "pooler_output"]
RAGGED = [[5, 6, 7, 8], list(range(3, 40)), [9], [11] * 17]
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def engine(bundle: MakeBundle) -> Iterator[Engine]:
    """The base model in ONNX Runtime."""
    with Engine(bundle()) as loaded:
        yield loaded


@pytest.fixture
def copy(bundle: MakeBundle, tmp_path: Path) -> Path:
    """A copy of a bundle for a test that breaks it."""
    return Path(shutil.copytree(bundle(), tmp_path / "copy"))


def random_ids(*shape: int, seed: int = 0) -> Any:
    """Random ids without special tokens."""
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, shape)


def assert_same(outputs: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Compare all outputs, arrays or lists."""
    assert list(outputs) == list(expected)
    for name in expected:
        assert len(outputs[name]) == len(expected[name])
        for array, expected_array in zip(outputs[name], expected[name], strict=True):
            assert array.shape == expected_array.shape
            np.testing.assert_allclose(array, expected_array, rtol=0, atol=tolerance, err_msg=name)


def differs(outputs: Any, other: Any) -> bool:
    """Whether an output differs by more than rounding."""
    return any(float(np.abs(outputs[name] - other[name]).max()) > 1e-3 for name in outputs)


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 1), (2, 7), (3, 8), (1, 9), (2, 17), (2, 128)])
def test_outputs_have_the_names_shapes_and_type_of_the_signature(engine: Engine, batch: int, seqlen: int) -> None:
    outputs = engine.run(random_ids(batch, seqlen))
    assert list(outputs) == OUTPUTS == [spec.name for spec in engine.signature.outputs]
    assert outputs["last_hidden_state"].shape == (batch, seqlen, 32)
    assert outputs["pooler_output"].shape == (batch, 32)
    for spec, output in zip(engine.signature.outputs, outputs.values(), strict=True):
        assert output.dtype == np.dtype(spec.dtype) == np.float32
        assert len(spec.shape) == output.ndim


def test_each_argument_reaches_its_own_graph_input(engine: Engine) -> None:
    ids, mask, marks = random_ids(2, 29), np.ones((2, 29), dtype=np.int64), np.zeros((2, 29), dtype=np.int64)
    mask[0, 20:] = mask[1, 25:] = 0
    marks[0, [0, 3]] = marks[1, 11] = 1
    with torch.no_grad():
        theirs = tiny_model()(*(torch.from_numpy(a) for a in (ids, mask, marks)))
    ours = engine.run(ids, mask, marks)
    np.testing.assert_allclose(ours["pooler_output"], theirs["pooler_output"].numpy(), rtol=0, atol=1e-5)
    real = mask == 1
    np.testing.assert_allclose(
        ours["last_hidden_state"][real], theirs["last_hidden_state"].numpy()[real], rtol=0, atol=1e-4
    )
    for other in (engine.run(ids, None, marks), engine.run(ids, mask), engine.run(ids, marks, mask)):
        assert differs(ours, other)


def test_one_sequence_gives_a_batch_of_one(engine: Engine) -> None:
    ids = random_ids(19).tolist()
    one = engine.run(ids)
    assert {name: output.shape for name, output in one.items()} == {
        "last_hidden_state": (1, 19, 32),
        "pooler_output": (1, 32),
    }
    for form in (np.array(ids), [ids], np.array([ids]), tuple(ids)):
        assert_same(engine.run(form), one, tolerance=0)


def test_sequences_of_one_length_give_arrays(engine: Engine) -> None:
    rows = random_ids(3, 11)
    listed = engine.run([row.tolist() for row in rows])
    assert all(isinstance(output, np.ndarray) for output in listed.values())
    assert_same(listed, engine.run(rows), tolerance=0)


def test_ragged_sequences_give_the_outputs_of_each_alone(engine: Engine) -> None:
    outputs = engine.run(RAGGED)
    assert isinstance(outputs["last_hidden_state"], list)
    assert [row.shape for row in outputs["last_hidden_state"]] == [(len(ids), 32) for ids in RAGGED]
    assert isinstance(outputs["pooler_output"], np.ndarray)
    assert outputs["pooler_output"].shape == (4, 32)
    for i, ids in enumerate(RAGGED):
        alone = engine.run(ids)
        np.testing.assert_allclose(outputs["last_hidden_state"][i], alone["last_hidden_state"][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(outputs["pooler_output"][i], alone["pooler_output"][0], rtol=0, atol=1e-5)


def test_ragged_masks_apply_to_their_own_sequences(engine: Engine) -> None:
    masks = [[1, 1, 0, 1], [1] * 30 + [0] * 7, [1], [0] * 3 + [1] * 14]
    marks = [[0, 0, 0, 1], [1, 0, 0, 1] + [0] * 33, [0], [0] * 5 + [1] + [0] * 11]
    outputs = engine.run(RAGGED, masks, marks)
    for i, ids in enumerate(RAGGED):
        alone = engine.run(ids, masks[i], marks[i])
        np.testing.assert_allclose(outputs["last_hidden_state"][i], alone["last_hidden_state"][0], rtol=0, atol=1e-5)


def test_outputs_per_token_of_all_tasks_are_cut(bundle: MakeBundle) -> None:
    rows = [[5, 2, 2, 6, 2], [7, 8, 2, 2, 9, 10, 11, 2]]
    with Engine(bundle("question-answering")) as reader:
        outputs = reader.run(rows)
        alone = [reader.run(row) for row in rows]
    assert list(outputs) == ["start_logits", "end_logits"]
    for name, output in outputs.items():
        assert [row.shape for row in output] == [(5,), (8,)]
        for i in range(2):
            np.testing.assert_allclose(output[i], alone[i][name][0], rtol=0, atol=1e-5)


def test_outputs_per_sequence_are_stacked(bundle: MakeBundle) -> None:
    with Engine(bundle("text-classification")) as classifier:
        outputs = classifier.run(RAGGED)
        assert isinstance(outputs["logits"], np.ndarray)
        assert outputs["logits"].shape == (4, 2)
        for i, ids in enumerate(RAGGED):
            np.testing.assert_allclose(outputs["logits"][i], classifier.run(ids)["logits"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_outputs_are_owned_by_the_caller(bundle: MakeBundle, backend: str) -> None:
    with Engine(bundle(), backend) as loaded:
        for ids in (RAGGED[1], RAGGED):
            first, kept = loaded.run(ids), loaded.run(ids)
            for output in first.values():
                for row in output:
                    row[...] = -99.0
            assert_same(loaded.run(ids), kept, tolerance=0)
            assert not any((row == -99.0).any() for output in kept.values() for row in output)


@pytest.mark.parametrize("shape", [(None, None), (1, "4"), (0, 4), (1, 10**5000)], ids=["none", "text", "zero", "huge"])
def test_supports_shape_refuses_arguments_that_are_no_shape(shape: tuple[Any, Any], engine: Engine) -> None:
    with pytest.raises(InputError):
        engine.supports_shape(*shape)


def test_on_error_return_gives_each_sequence_its_outputs_or_its_error(engine: Engine) -> None:
    too_long = [5] * (engine.signature.max_seqlen + 1)
    rows = engine.run([RAGGED[0], too_long, RAGGED[1], [VOCAB_SIZE], RAGGED[2]], on_error="return")
    assert "above the model's maximum" in str(rows[1])
    assert "outside the vocabulary" in str(rows[3])
    for row, ids in zip((rows[0], rows[2], rows[4]), RAGGED[:3], strict=True):
        assert_same({name: array[None] for name, array in row.items()}, engine.run(ids))
    streamed = list(engine.stream([RAGGED[0], too_long, RAGGED[1]], on_error="return"))
    assert isinstance(streamed[1], InputError)
    assert "document 1" in str(streamed[1])
    assert_same(streamed[2], rows[2])
    assert engine.run([too_long], on_error="return")[0].args == engine.run([too_long], on_error="return")[0].args


@pytest.mark.parametrize("make", [list, np.array])
def test_stream_takes_an_iterable_that_fills_one_buffer_for_each_document(make: Any, engine: Engine) -> None:
    documents = [[5, 6, 7, 8], [9, 10, 11, 12], [8, 7, 6, 5]]

    def refill() -> Iterator[Any]:
        buffer = make(documents[0])
        for document in documents:
            buffer[:] = document
            yield buffer

    for rows in (engine.stream(refill()), engine.stream(refill(), on_error="return")):
        for row, document in zip(rows, documents, strict=True):
            assert_same({name: array[None] for name, array in row.items()}, engine.run(document))


def test_on_error_return_keeps_the_error_of_an_object_that_cannot_be_read(engine: Engine) -> None:
    class OnAnotherDevice:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("copy it to the host first")

    for rows in (
        engine.run([RAGGED[0], OnAnotherDevice()], on_error="return"),
        list(engine.stream([RAGGED[0], OnAnotherDevice()], on_error="return")),
    ):
        assert isinstance(rows[0], dict)
        assert isinstance(rows[1], InputError)
        assert "copy it to the host first" in str(rows[1])


BAD_DOCUMENTS = [
    None,
    "x",
    5,
    5.5,
    [],
    [5.5],
    [[[[5]]]],
    {"input_ids": [5]},
    np.zeros((2, 2, 2), int),
    np.zeros(0, int),
]


@fast_if(lambda task: task == "text-classification")
@pytest.mark.parametrize("task", ["text-classification", "multiple-choice"])
@pytest.mark.parametrize("bad", BAD_DOCUMENTS, ids=lambda bad: str(bad).replace("\n", ""))
def test_on_error_return_runs_the_others_wherever_the_bad_document_is(task: str, bad: Any, bundle: MakeBundle) -> None:
    good: list[Any] = [[0, 5, 2], [0, 6, 7, 2]]
    if task == "multiple-choice":
        good = [[[0, 5, 2, 2, 6, 2]] * 2, [[0, 7, 2, 2, 8, 9, 2]] * 3]
    with Engine(bundle(task), threads=1) as engine:
        expected = engine.run(good, on_error="return")
        for index in range(3):
            rows = engine.run([*good[:index], bad, *good[index:]], on_error="return")
            assert [isinstance(row, InputError) for row in rows] == [i == index for i in range(3)]
            for row, other in zip((row for i, row in enumerate(rows) if i != index), expected, strict=True):
                assert_same({name: array[None] for name, array in row.items()}, {n: a[None] for n, a in other.items()})


def test_on_error_return_keeps_the_error_of_a_batch_that_fails_in_the_backend(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = type(engine._backend).infer

    def fail_on_long(self: Any, feeds: dict[str, Any], *names: Any, **options: Any) -> Any:
        if feeds["input_ids"].shape[1] > 20:
            raise LfxError("out of memory")
        return infer(self, feeds, *names, **options)

    monkeypatch.setattr(type(engine._backend), "infer", fail_on_long)
    monkeypatch.setattr(engine, "token_budget", 17)
    rows = engine.run(RAGGED, on_error="return")
    assert [isinstance(row, LfxError) for row in rows] == [False, True, False, False]
    with pytest.raises(LfxError, match="out of memory"):
        engine.run(RAGGED)


def test_on_error_return_takes_different_numbers_of_choices(bundle: MakeBundle) -> None:
    with Engine(bundle("multiple-choice"), threads=1) as engine:
        row = [0, 5, 2, 2, 6, 2]
        documents = [[row] * 2, [row] * 3, [[*row[:-1], 7, 8, 2]], [[0, 9, 2, 2, 9, 2]] * 3]
        alone = [engine.run(document) for document in documents]
        for rows in (engine.stream(documents), engine.stream(documents, on_error="return")):
            for row, expected in zip(rows, alone, strict=True):
                assert_same({name: array[None] for name, array in row.items()}, expected)


def test_on_error_return_raises_what_concerns_the_whole_call(bundle: MakeBundle) -> None:
    engine = Engine(bundle())
    for call in (engine.run, engine.stream):
        with pytest.raises(InputError, match="on_error 'ignore' is not known; choose one of: raise, return"):
            call([[5]], on_error="ignore")
    with pytest.raises(InputError, match="give token ids"):
        engine.run("text", on_error="return")
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.run([[5]], on_error="return")


def test_run_together_of_no_requests_gives_no_outputs(engine: Engine) -> None:
    assert engine.run_together([]) == []


def test_default_attention_mask_is_all_real(engine: Engine) -> None:
    ids = random_ids(2, 21)
    assert_same(engine.run(ids), engine.run(ids, np.ones_like(ids)), tolerance=0)


@pytest.mark.parametrize(
    ("task", "marks"),
    [
        ("feature-extraction", [0, 0, 0, 0, 0, 0, 0, 0]),
        ("text-classification", [1, 0, 0, 0, 0, 0, 0, 0]),
        ("question-answering", [1, 1, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_default_globals_follow_the_task(bundle: MakeBundle, task: str, marks: list[int]) -> None:
    ids = [0, 40, 41, 2, 2, 42, 43, 2]
    others = [[0] * 8, [1] + [0] * 7, [1, 1, 1, 0, 0, 0, 0, 0], [0] * 5 + [1, 1, 1]]
    with Engine(bundle(task)) as loaded:
        default = loaded.run(ids)
        assert_same(default, loaded.run(ids, None, marks), tolerance=0)
        for other in others:
            assert other == marks or differs(default, loaded.run(ids, None, other))


def test_the_engine_is_usable_after_bad_input(engine: Engine) -> None:
    before = engine.run([5, 6, 7])
    for ids in ([VOCAB_SIZE], [3] * 129, [-1], []):
        with pytest.raises(InputError):
            engine.run(ids)
    assert_same(engine.run([5, 6, 7]), before, tolerance=0)


def test_run_on_a_closed_engine_is_an_error(bundle: MakeBundle) -> None:
    with Engine(bundle()) as loaded:
        assert loaded.run([5, 6])["pooler_output"].shape == (1, 32)
    with pytest.raises(InputError, match="closed; make a new one"):
        loaded.run([5, 6])
    loaded.close()
    with pytest.raises(InputError, match="closed"):
        loaded.run([5, 6])


def test_a_running_batch_completes_when_another_thread_closes_the_engine(bundle: MakeBundle) -> None:
    engine = Engine(bundle())
    infer = engine._backend.infer

    def close_first(feeds: Any, *names: Any, **options: Any) -> Any:
        engine.close()
        return infer(feeds, *names, **options)

    engine._backend.infer = close_first
    assert engine.run([5, 6])["last_hidden_state"].shape[0] == 1


def test_an_engine_closes_on_an_exception_and_passes_it_on(bundle: MakeBundle) -> None:
    with pytest.raises(KeyError, match="mine"), Engine(bundle()) as loaded:
        raise KeyError("mine")
    with pytest.raises(InputError, match="closed"):
        loaded.run([5, 6])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_two_concurrent_threads_get_the_outputs_of_one(bundle: MakeBundle, backend: str) -> None:
    batches = [[random_ids(2, length, seed=length) for length in lengths] for lengths in ((5, 30, 64), (17, 9, 33))]
    start = threading.Barrier(2)
    with Engine(bundle(), backend) as loaded:
        expected = [[loaded.run(ids) for ids in mine] for mine in batches]

        def work(mine: list[Any]) -> list[Any]:
            start.wait(timeout=60)
            return [loaded.run(ids) for _ in range(10) for ids in mine]

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(work, batches))
    for ours, theirs in zip(results, expected, strict=True):
        for i, outputs in enumerate(ours):
            assert_same(outputs, theirs[i % len(theirs)], tolerance=1e-6)


def test_a_bundle_opens_by_its_folder_as_path_or_text_and_by_its_model(bundle: MakeBundle) -> None:
    folder = bundle()
    for path in (folder, str(folder), folder / MODEL, str(folder / MODEL)):
        with Engine(path) as loaded:
            assert loaded.manifest is not None
            assert loaded.manifest.signature == loaded.signature


def test_a_single_onnx_file_has_its_signature(bundle: MakeBundle, engine: Engine, tmp_path: Path) -> None:
    for name in (MODEL, WEIGHTS):
        shutil.copy(bundle() / name, tmp_path / name)
    with Engine(tmp_path / MODEL) as lone:
        assert lone.manifest is None
        assert lone.signature == engine.signature
        assert_same(lone.run(RAGGED), engine.run(RAGGED), tolerance=0)
        with pytest.raises(InputError, match="maximum 128"):
            lone.run([3] * 129)
        with pytest.raises(InputError, match="vocabulary of 99"):
            lone.run([99])


def test_a_single_onnx_file_may_have_another_name(bundle: MakeBundle, engine: Engine, tmp_path: Path) -> None:
    shutil.copy(bundle() / MODEL, tmp_path / "reader.onnx")
    shutil.copy(bundle() / WEIGHTS, tmp_path / WEIGHTS)
    with Engine(tmp_path / "reader.onnx") as lone:
        assert_same(lone.run(RAGGED), engine.run(RAGGED), tolerance=0)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _set(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed({**data, **changes})))


def _name_outside(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"key")
    data = json.loads((folder / MANIFEST).read_text())
    _set(folder, files={**data["files"], "../secret": {"bytes": 3, "sha256": ""}})


def _rename_output(folder: Path) -> None:
    outputs = json.loads((folder / MANIFEST).read_text())["outputs"]
    _set(folder, outputs=[{**outputs[0], "name": "logits"}, outputs[1]])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"copy does not exist; make a bundle with: lfx export"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), rf"no bundle: it has no {MANIFEST}"),
    "manifest cut": (lambda b: _cut(b / MANIFEST), rf"{MANIFEST} cannot be read"),
    "other format": (
        lambda b: _set(b, format_version=2),
        r"format version 2; this lfx reads 1: install a newer lfx, or export",
    ),
    "model changed": (lambda b: _flip(b / MODEL), rf"{MODEL} was changed after the export"),
    "weights changed": (lambda b: _flip(b / WEIGHTS), rf"{WEIGHTS} was changed after the export"),
    "weights cut": (lambda b: _cut(b / WEIGHTS), rf"{WEIGHTS} has \d+ bytes where {MANIFEST} says \d+"),
    "weights gone": (lambda b: (b / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "model gone": (lambda b: (b / MODEL).unlink(), rf"{MODEL} is missing"),
    "file outside": (_name_outside, "outside the bundle"),
    "other outputs": (_rename_output, rf"{MANIFEST} says outputs .* where {MODEL} says"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_an_artifact_error_in_one_line(name: str, copy: Path) -> None:
    change, message = BROKEN[name]
    change(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        Engine(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model changed", "weights cut", "manifest cut"])
def test_a_broken_bundle_is_refused_by_its_model_too(name: str, copy: Path) -> None:
    change, message = BROKEN[name]
    change(copy)
    with pytest.raises(ArtifactError, match=message):
        Engine(copy / MODEL)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(
    ("name", "content"),
    [("model.txt", b"fox\n"), ("fox.onnx", b"fox\n"), ("empty.onnx", b""), ("zeros.onnx", bytes(1000))],
)
def test_a_file_that_is_no_model_is_an_artifact_error(name: str, content: bytes, backend: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name) as caught:
        Engine(tmp_path / name, backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("weights cut", rf"{MODEL} cannot be loaded"),
        ("weights gone", rf"{MODEL} has weights in '{WEIGHTS}'.* is no file"),
        ("model cut", rf"{MODEL} is no ONNX file \(it is truncated\)"),
    ],
)
def test_a_broken_single_onnx_file_is_an_artifact_error(broken: str, message: str, backend: str, copy: Path) -> None:
    (copy / MANIFEST).unlink()
    if broken == "weights gone":
        (copy / WEIGHTS).unlink()
    else:
        _cut(copy / (MODEL if broken == "model cut" else WEIGHTS))
    with pytest.raises(ArtifactError, match=message) as caught:
        Engine(copy / MODEL, backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_model_of_another_exporter_is_refused(backend: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> other (int64[b, s] input_ids) => (int64[b, s] logits)'
        " { logits = Identity(input_ids) }"
    )
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match=r"not written by lfx.*export it with lfx"):
        Engine(tmp_path / "other.onnx", backend)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "does not exist; make a bundle with: lfx export"),
        ("nowhere.onnx", "does not exist; make a bundle with: lfx export"),
        ("x" * 300, "File name too long; give another path"),
        ("x" * 5000, r"path 'x+…' cannot be opened: File name too long; give another path"),
        ("x" * 5000 + ".plan", "File name too long; give another path"),
        ("a\0b", f"{NULL_BYTE}; give another path"),
        ("", "path is empty; give the path of a bundle, made with: lfx export"),
    ],
    ids=lambda text: text[:12],
)
def test_a_path_that_does_not_exist_is_an_artifact_error(
    path: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=message) as caught:
        Engine(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": b"bundle"}, InputError, "path is bytes; give the path of a bundle"),
        ({"path": None}, InputError, "path is NoneType; give"),
        ({"path": 5}, InputError, "path is int; give"),
        ({"backend": None}, DependencyError, "backend None is not known; choose one of: auto, onnxruntime"),
        ({"backend": []}, DependencyError, r"backend \[\] is not known"),
        ({"provider": {}}, DependencyError, r"provider \{\} is not known; choose one of: cpu"),
        ({"provider": b"cpu"}, DependencyError, "provider b'cpu' is not known"),
        ({"precision": 32}, DependencyError, "precision 32 is not known; choose one of: fp32, bf16"),
        ({"precision": ["fp32"]}, DependencyError, "is not known; choose one of: fp32, bf16"),
        ({"threads": True}, InputError, "threads is True; give a whole number from 1 to 1024"),
        ({"threads": float("nan")}, InputError, "threads is nan; give a whole number"),
        ({"token_budget": "x"}, InputError, "token_budget is 'x'; give a whole number, 1 or more"),
        ({"token_budget": float("nan")}, InputError, "token_budget is nan; give a whole number"),
        ({"token_budget": True}, InputError, "token_budget is True; give a whole number"),
        ({"token_budget": None}, InputError, "token_budget is None; give a whole number"),
        ({"token_budget": -(10**30)}, InputError, "token_budget -10+ is out of range"),
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_refused_in_one_line(
    bundle: MakeBundle, arguments: dict[str, Any], error: type[LfxError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Engine(**{"path": bundle(), **arguments})
    assert "\n" not in str(caught.value)


def test_a_huge_budget_and_numpy_integers_are_accepted(bundle: MakeBundle, engine: Engine) -> None:
    with Engine(bundle(), threads=np.int64(1), token_budget=2**63 - 1) as loaded:  # type: ignore[arg-type]
        assert_same(loaded.run(RAGGED), engine.run(RAGGED))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (5, "shapes is 5; give a list of pairs"),
        ([5], "give a list of pairs"),
        ([(1, 2, 3)], "give a list of pairs"),
        ("ab", "give a list of pairs"),
        (["ab"], "batch is 'a'; give a whole number"),
        ([(0, 1)], "batch 0 is out of range; give a whole number, 1 or more"),
        ([(1, 0)], "seqlen 0 is out of range; give a whole number from 1 to 128"),
        ([(1, 129)], "seqlen 129 is out of range"),
        ([(1.0, 5)], "batch is 1.0; give a whole number"),
        ([(True, 5)], "batch is True; give a whole number"),
        ([(2**63 - 1, 5)], "does not fit in memory"),
        (
            [(10**30, 5)],
            "batch 1000000000000000000000000000000 is out of range; give a whole number from 1 to 9223372036854",
        ),
    ],
)
def test_warm_up_refuses_arguments_that_are_no_shapes(engine: Engine, shapes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.warm_up(shapes)


def test_all_methods_of_a_closed_engine_raise(bundle: MakeBundle) -> None:
    engine = Engine(bundle())
    stream = engine.stream([[5, 6], [7, 8]], ahead=1)
    assert next(stream)["pooler_output"].shape == (32,)
    engine.close()
    for ask in (
        lambda: next(stream),
        lambda: engine.stream([[5, 6]]),
        lambda: engine.run([5, 6]),
        engine.warm_up,
        lambda: engine.warm_up([]),
        lambda: engine.supports_shape(1, 1),
        lambda: pickle.dumps(engine),
        lambda: Batcher(engine),
    ):
        with pytest.raises(InputError, match="this Engine is closed"):
            ask()


@pytest.mark.slow
def test_an_engine_is_reopened_by_another_process(
    bundle: MakeBundle, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle().parent)
    with Engine(bundle().name, "openvino", threads=1, token_budget=99) as loaded:
        (tmp_path / "engine").write_bytes(pickle.dumps(loaded))
    code = (
        "import pickle, pathlib; engine = pickle.loads(pathlib.Path('engine').read_bytes());"
        "print(engine.backend.split()[0], engine.threads, engine.token_budget);"
        "print(engine.run([5, 6])['pooler_output'][0, 0])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300, cwd=tmp_path
    ).stdout.split()
    assert printed[:3] == ["openvino", "1", "99"]
    assert float(printed[3]) == pytest.approx(float(engine.run([5, 6])["pooler_output"][0, 0]), abs=1e-5)


def _mutate(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(random.integers(1, 4)):
        position, byte = int(random.integers(len(changed))), int(random.integers(256))
        action = random.integers(5)
        if action == 0:
            del changed[position : position + int(random.integers(1, 20))]
        elif action == 1:
            changed.insert(position, byte)
        elif action == 2:
            changed[position] = b'0123456789.-"[]{},:'[byte % 19]
        else:
            changed[position] = byte
    return bytes(changed)


def test_a_randomly_changed_manifest_is_refused_unless_its_content_is_equal(
    copy: Path, engine: Engine, monkeypatch: Any
) -> None:
    # The backend is loaded once, since this test is about the manifest.
    monkeypatch.setattr(backends, "load", lambda *_: engine._backend)
    random = np.random.default_rng(0)
    original = (copy / MANIFEST).read_bytes()
    refused = 0
    for _ in range(400):
        text = _mutate(original, random)
        (copy / MANIFEST).write_bytes(text)
        try:
            Engine(copy)
            assert json.loads(text) == json.loads(original)
        except LfxError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{error!r} for {MANIFEST} = {text!r}")
    assert refused > 300


@pytest.mark.parametrize("value", [None, "x", "", -1, 0.5, 1e999, True, [], {}, [None], {"x": 1}, 10**30], ids=repr)
def test_any_value_in_the_manifest_loads_or_is_an_lfx_error(
    value: Any, copy: Path, engine: Engine, monkeypatch: Any
) -> None:
    monkeypatch.setattr(backends, "load", lambda *_: engine._backend)
    original = json.loads((copy / MANIFEST).read_text())
    for key in original:
        (copy / MANIFEST).write_text(json.dumps(sealed({**original, key: value})))
        try:
            Engine(copy)
        except LfxError:
            continue
        except Exception as error:
            pytest.fail(f"{error!r} for {key} = {value!r}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, r"backend 'tensorflow' is not known; choose one of: auto, onnxruntime"),
        ({"provider": "tpu"}, r"provider 'tpu' is not known; choose one of: cpu, cuda, tensorrt"),
        ({"backend": "openvino", "provider": "cuda"}, "backend 'openvino' runs on the CPU"),
        ({"backend": "reference", "provider": "cuda"}, "backend 'reference' runs on the CPU"),
        ({"backend": "ONNXRuntime"}, "is not known"),
    ],
)
def test_unknown_backends_and_providers_name_the_known_ones(
    bundle: MakeBundle, options: dict[str, str], message: str
) -> None:
    with pytest.raises(DependencyError, match=message):
        Engine(bundle(), **options)


def test_threads_are_refused_by_the_reference_evaluator(bundle: MakeBundle) -> None:
    with pytest.raises(DependencyError, match=r"threads is 2, and the reference evaluator has one thread"):
        Engine(bundle(), "reference", threads=2)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10**9])
def test_threads_below_one_are_refused_and_one_is_used(bundle: MakeBundle, engine: Engine, threads: Any) -> None:
    with pytest.raises(InputError, match=rf"threads .*{threads!r}.*; give a whole number from 1 to 1024"):
        Engine(bundle(), threads=threads)
    with Engine(bundle(), threads=1) as single:
        assert_same(single.run(RAGGED), engine.run(RAGGED))


def test_threads_that_the_system_refuses_are_an_error(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would hang."""
    start, left = threading.Thread.start, iter(range(3))

    def start_three(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    folder, before = bundle(), threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", start_three)
    monkeypatch.setattr("lfx.runtime.backends.onnxruntime._RELEASE_SECONDS", 0.05)
    with pytest.raises(DependencyError, match=r"starts only 4 of 16 threads .*; .* give threads=4 \(--threads 4\)"):
        Engine(folder, threads=16)
    assert threading.active_count() == before


def test_threads_that_the_system_still_counts_are_waited_for(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an Engine just closed; and its own, of which none is left when ONNX Runtime starts its threads."""
    start, exists, refusals = threading.Thread.start, Path.exists, iter(range(2))
    looked_up: list[Path] = []

    def start_later(thread: threading.Thread) -> None:
        if next(refusals, None) is not None:
            raise RuntimeError("can't start new thread")
        start(thread)

    def stays_for_a_moment(path: Path, **options: Any) -> bool:
        if path.parent != Path("/proc/self/task"):
            return exists(path, **options)
        looked_up.append(path)
        return looked_up.count(path) < 3 or exists(path)

    folder = bundle()
    monkeypatch.setattr(threading.Thread, "start", start_later)
    monkeypatch.setattr(Path, "exists", stays_for_a_moment)
    with Engine(folder, threads=3) as engine:
        assert engine.threads == 3
    assert len(set(looked_up)) == 2
    assert len(looked_up) >= 6


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has the CUDA provider")
@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_an_unavailable_provider_is_an_error_with_a_cure(bundle: MakeBundle, provider: str, name: str) -> None:
    with pytest.raises(DependencyError, match=rf"no {name}ExecutionProvider.*longformer-lfx\[gpu\].*provider='cpu'"):
        Engine(bundle(), provider=provider)


@pytest.mark.parametrize("backend", ["openvino", "reference"])
def test_other_backends_give_the_same_outputs(bundle: MakeBundle, engine: Engine, backend: str) -> None:
    ids, mask, marks = random_ids(2, 29), np.ones((2, 29), dtype=int), np.zeros((2, 29), dtype=int)
    mask[1, 20:] = 0
    marks[0, [0, 7, 8]] = 1
    with Engine(bundle(), backend) as other:
        assert backend in other.backend
        assert other.signature == engine.signature
        assert_same(other.run(RAGGED), engine.run(RAGGED))
        assert_same(other.run(ids, mask, marks), engine.run(ids, mask, marks))


def test_backend_auto_is_onnxruntime(engine: Engine) -> None:
    assert engine.backend == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"


def test_bf16_on_onnxruntime_is_refused_in_one_line_naming_openvino(bundle: MakeBundle) -> None:
    with pytest.raises(
        DependencyError, match=r"backend='openvino' \(pip install 'longformer-lfx\[openvino\]'\)"
    ) as caught:
        Engine(bundle(precision="bf16"), "onnxruntime")
    assert "\n" not in str(caught.value)


def test_backend_auto_runs_bf16_with_openvino(bundle: MakeBundle, engine: Engine) -> None:
    folder = bundle(precision="bf16")
    ids = random_ids(2, 21)
    with Engine(folder) as auto, Engine(folder, "reference") as reference:
        assert auto.backend.startswith("openvino")
        assert auto.signature.precision == "bf16"
        assert all(output.dtype == np.float32 for output in auto.run(ids).values())
        assert auto.manifest is not None
        ours, theirs = auto.run(ids), reference.run(ids)
        for name, measured in auto.manifest.validation["outputs"].items():
            # Both are within the tolerance of the float64 reference.
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2 * measured["tolerance"])
        assert differs(auto.run(ids), engine.run(ids))  # the bf16 model ran


def test_backend_auto_runs_a_single_bf16_onnx_file_with_openvino(bundle: MakeBundle, tmp_path: Path) -> None:
    for name in (MODEL, WEIGHTS):
        shutil.copy(bundle(precision="bf16") / name, tmp_path / name)
    with Engine(tmp_path / MODEL) as lone:
        assert lone.backend.startswith("openvino")


def test_the_fusions_that_cost_time_or_memory_on_cpus_are_disabled(bundle: MakeBundle, tmp_path: Path) -> None:
    kinds = {}
    for name, disabled in (("with", []), ("without", DISABLED_ON_CPU)):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        onnxruntime.InferenceSession(str(bundle() / MODEL), options, disabled_optimizers=disabled)
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        kinds[name] = {node.op_type for node in graph.node}
    for fused in ("SkipLayerNormalization", "BiasGelu"):
        assert fused in kinds["with"]  # fails if ONNX Runtime has renamed it
        assert fused not in kinds["without"]


@pytest.mark.parametrize(
    ("flags", "overflows"),
    [("fpu avx2", True), ("fpu avx2 avx_vnni", False), ("avx512f avx512_vnni", False), (None, False)],
)
def test_int8_overflows_on_x86_without_vnni(
    flags: str | None, overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "cpu_fields", lambda: {"flags": flags} if flags is not None else {})
    assert machine.int8_overflows() is overflows
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert not machine.int8_overflows()


def odd_model(path: Path, nodes: str, inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Path:
    """Write an ONNX file whose `logits` are not what its signature says: (batch, sequence)."""
    declared = ", ".join(f"int64[batch, sequence] {name}" for name in inputs)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({declared}) => (float[] logits) {{ {nodes} }}'
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    signature = Signature(
        architecture="Odd",
        task="feature-extraction",
        precision="fp32",
        inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in inputs),
        outputs=(TensorSpec("logits", "float32", ("batch", "sequence")),),
        attention_windows=(4,),
    )
    model.metadata_props.add(key="lfx", value=json.dumps(signature.to_dict()))
    onnx.save(model, path)
    return path


ODD_MODELS = {
    "no axes": "f = Cast<to: int = 1>(input_ids) logits = ReduceSum<keepdims: int = 0>(f)",
    "one row": "f = Cast<to: int = 1>(input_ids) logits = ReduceMean<axes: ints = [0]>(f)",
    "one axis": "f = Cast<to: int = 1>(input_ids) logits = ReduceMean<axes: ints = [1], keepdims: int = 0>(f)",
}


@pytest.mark.parametrize("name", ODD_MODELS)
def test_outputs_that_are_not_what_the_signature_says_are_refused(name: str, tmp_path: Path) -> None:
    with Engine(odd_model(tmp_path / "odd.onnx", ODD_MODELS[name])) as engine:
        reason = r"output logits of a batch of 2 has shape .* where the model's signature says \(batch, sequence\)"
        for run in (engine.run, lambda ids: list(engine.stream(ids))):
            with pytest.raises(ArtifactError, match=reason):
                run([[5, 6], [7]])
        with pytest.raises(ArtifactError, match=reason):
            engine.run([[5, 6], [7, 8]])


def test_an_output_that_is_no_array_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = engine.run([5, 6])
    monkeypatch.setattr(engine._backend, "infer", lambda feeds, *names, **options: {**outputs, "pooler_output": [1.0]})
    with pytest.raises(ArtifactError, match="output pooler_output of a batch of 1 has list"):
        engine.run([5, 6])


def test_a_model_without_input_ids_is_refused(tmp_path: Path) -> None:
    model = odd_model(tmp_path / "odd.onnx", "logits = Cast<to: int = 1>(attention_mask)", ("attention_mask",))
    with pytest.raises(ArtifactError, match="has no input input_ids"):
        Engine(model)
