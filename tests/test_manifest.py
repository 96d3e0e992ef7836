"""`lfx.json` and signatures: round trips, and errors of broken files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from lfx.errors import ArtifactError
from lfx.manifest import FORMAT_VERSION, MANIFEST, MODEL, WEIGHTS, Manifest, sealed, sha256
from lfx.signature import GRAPH_INPUTS, SENTENCE_EMBEDDING, TASKS, TEXT_GENERATION, Signature, TensorSpec

SIGNATURE = Signature(
    architecture="LongformerForQuestionAnswering",
    task="question-answering",
    precision="fp16",
    inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in GRAPH_INPUTS),
    outputs=(
        TensorSpec("start_logits", "float32", ("batch", "sequence")),
        TensorSpec("end_logits", "float32", ("batch", 3)),
    ),
    attention_windows=(4, 8, 16),
    default_global="question",
    global_attention="mask",
    max_seqlen=4096,
    vocab_size=50265,
    max_global=64,
    pad_token_id=7,
    sep_token_id=9,
    lfx_version="9.8.7",
)
MANIFEST_VALUE = Manifest(
    signature=SIGNATURE,
    opset=19,
    source={"model": "models/größe", "sha256": "ab"},
    versions={"lfx": "9.8.7", "torch": "3.0"},
    inlined=True,
    validation={
        "passed": True,
        "outputs": {"start_logits": {"max_abs_error": 2e-7, "torch_max_abs_error": 3e-7, "tolerance": 1e-6}},
    },
)


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A folder with the files of a bundle and its manifest."""
    folder = tmp_path / "bundle"
    (folder / "extra").mkdir(parents=True)
    (folder / MODEL).write_bytes(b"model" * 100)
    (folder / WEIGHTS).write_bytes(bytes(range(256)))
    (folder / "extra" / "vocab.txt").write_text("fox\n")
    MANIFEST_VALUE.write(folder)
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """Change values of `lfx.json` and seal it again; the value ... removes the key."""
    data = json.loads((folder / MANIFEST).read_text())
    data.update(changes)
    data = {key: value for key, value in data.items() if value is not ...}
    (folder / MANIFEST).write_text(json.dumps(sealed(data)))
    return folder


@pytest.mark.parametrize("task", [task for task in TASKS if task != SENTENCE_EMBEDDING])  # its class is lfx's own
def test_tasks_name_the_classes_of_transformers(task: str) -> None:
    auto_class = getattr(transformers, TASKS[task].auto_class)
    config_class = transformers.LEDConfig if task == TEXT_GENERATION else transformers.LongformerConfig
    model_class = auto_class._model_mapping[config_class]
    assert model_class.__name__ == TASKS[task].architecture


@pytest.mark.parametrize(
    "signature",
    [SIGNATURE, replace(SIGNATURE, max_seqlen=None, vocab_size=None, max_global=None, sep_token_id=None)],
)
def test_signature_survives_json(signature: Signature) -> None:
    assert Signature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


def test_signature_has_defaults_for_missing_optional_fields_and_ignores_unknown_ones() -> None:
    data = SIGNATURE.to_dict()
    for key in ("default_global", "global_attention", "max_seqlen", "vocab_size", "max_global"):
        del data[key]
    read = Signature.from_dict({**data, "colour": "blue"})
    assert (read.default_global, read.global_attention, read.max_seqlen) == ("none", "mask", None)
    assert read.task == SIGNATURE.task


REQUIRED = ("architecture", "task", "precision", "inputs", "outputs", "attention_windows")


@pytest.mark.parametrize("key", REQUIRED)
def test_signature_without_a_required_field_is_refused(key: str) -> None:
    data = SIGNATURE.to_dict()
    del data[key]
    with pytest.raises(ArtifactError, match="signature is broken"):
        Signature.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inputs", None),
        ("inputs", "input_ids"),
        ("inputs", [1]),
        ("inputs", {"name": "input_ids"}),
        ("outputs", [{"name": "logits", "dtype": "float32"}]),
        ("outputs", [{"name": "logits", "dtype": "float32", "shape": 3}]),
        ("attention_windows", 4),
        ("attention_windows", [None]),
        ("attention_windows", ["wide"]),
        ("max_seqlen", "long"),
        ("max_seqlen", [128]),
        ("max_seqlen", float("inf")),
        ("vocab_size", float("nan")),
        ("max_global", {}),
        ("sep_token_id", "</s>"),
        ("pad_token_id", "<pad>"),
        ("pad_token_id", None),
        ("precision", "fp8"),
        ("precision", None),
        ("global_attention", "last"),
        ("default_global", "answer"),
        ("task", "translation"),
        ("task", TEXT_GENERATION),  # without a decoder
    ],
)
def test_signature_with_a_value_of_another_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match="export"):
        Signature.from_dict({**SIGNATURE.to_dict(), key: value})


def test_manifest_survives_writing_and_reading(bundle_folder: Path) -> None:
    read = Manifest.read(bundle_folder)
    assert replace(read, files={}) == MANIFEST_VALUE
    assert json.loads((bundle_folder / MANIFEST).read_text()) == json.loads(json.dumps(read.to_dict()))


def test_manifest_has_its_format_version(bundle_folder: Path) -> None:
    assert json.loads((bundle_folder / MANIFEST).read_text())["format_version"] == FORMAT_VERSION


def test_manifest_lists_size_and_digest_of_all_other_files(bundle_folder: Path) -> None:
    MANIFEST_VALUE.write(bundle_folder)  # a second time, which must not list lfx.json itself
    files = Manifest.read(bundle_folder).files
    assert set(files) == {MODEL, WEIGHTS, "extra/vocab.txt"}
    for name, entry in files.items():
        data = (bundle_folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_a_bundle_verifies_in_any_folder(bundle_folder: Path, tmp_path: Path) -> None:
    Manifest.read(bundle_folder).verify(bundle_folder)
    moved = bundle_folder.rename(tmp_path / "elsewhere")
    Manifest.read(moved).verify(moved)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit of the model": (lambda b: _flip(b / MODEL), rf"{MODEL} was changed after the export"),
    "one bit of the weights": (lambda b: _flip(b / WEIGHTS), rf"{WEIGHTS} was changed after the export"),
    "one bit of a file in a folder": (lambda b: _flip(b / "extra" / "vocab.txt"), "vocab.txt was changed"),
    "weights cut": (
        lambda b: (b / WEIGHTS).write_bytes((b / WEIGHTS).read_bytes()[:100]),
        rf"has 100 bytes where {MANIFEST} says 256",
    ),
    "weights longer": (lambda b: (b / WEIGHTS).write_bytes(bytes(257)), "has 257 bytes where"),
    "weights gone": (lambda b: (b / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "weights a folder": (lambda b: [(b / WEIGHTS).unlink(), (b / WEIGHTS).mkdir()], rf"{WEIGHTS} is missing"),
    "no model listed": (lambda b: edit(b, files={}), rf"lists no {MODEL}"),
    "another model listed": (lambda b: edit(b, model_file="onnx/model.onnx"), r"lists no onnx/model\.onnx"),
    "another size": (lambda b: edit(b, files={MODEL: {"bytes": 5, "sha256": ""}}), "has 500 bytes where"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_verify_names_the_changed_file(name: str, bundle_folder: Path) -> None:
    change, message = CHANGES[name]
    change(bundle_folder)
    manifest = Manifest.read(bundle_folder)
    with pytest.raises(ArtifactError, match=message):
        manifest.verify(bundle_folder)


@pytest.mark.parametrize("name", ["../secret", "extra/../../secret", "/etc/passwd", "{absolute}"])
def test_verify_refuses_a_file_outside_the_bundle(name: str, bundle_folder: Path) -> None:
    secret = bundle_folder.parent / "secret"
    secret.write_bytes(b"key")
    name = name.format(absolute=secret)
    entry = {"bytes": 3, "sha256": hashlib.sha256(b"key").hexdigest()}
    files = Manifest.read(bundle_folder).files
    manifest = Manifest.read(edit(bundle_folder, files={**files, name: entry}))
    with pytest.raises(ArtifactError, match="outside the bundle"):
        manifest.verify(bundle_folder)


def test_a_bundle_of_links_as_in_a_hub_cache_verifies(bundle_folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    (linked / "extra").mkdir(parents=True)
    for path in bundle_folder.rglob("*"):
        if path.is_file():
            (linked / path.relative_to(bundle_folder)).symlink_to(path)
    Manifest.read(linked).verify(linked)


ENDLESS = Path("/proc/self/pagemap")  # a regular file of size 0 from which 256 GB can be read


@pytest.mark.skipif(not ENDLESS.is_file(), reason="no /proc")
def test_no_more_of_a_file_is_read_than_its_size(bundle_folder: Path) -> None:
    (bundle_folder / "extra" / "vocab.txt").unlink()
    (bundle_folder / "extra" / "vocab.txt").symlink_to(ENDLESS)
    files = Manifest.read(bundle_folder).files
    entry = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    Manifest.read(edit(bundle_folder, files={**files, "extra/vocab.txt": entry})).verify(bundle_folder)
    (bundle_folder / MANIFEST).unlink()
    (bundle_folder / MANIFEST).symlink_to(ENDLESS)
    with pytest.raises(ArtifactError, match=r"lfx\.json cannot be read"):
        Manifest.read(bundle_folder)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300])
def test_the_digest_of_the_start_of_a_file(size: int, bundle_folder: Path) -> None:
    expected = hashlib.sha256(bytes(range(256))[:size]).hexdigest()
    assert sha256(bundle_folder / WEIGHTS, size) == expected


@pytest.mark.parametrize("name", [f"./{WEIGHTS}", f".//./{WEIGHTS}", "extra//vocab.txt", "extra/./vocab.txt"])
def test_a_second_name_of_a_listed_file_is_refused(name: str, bundle_folder: Path) -> None:
    files = Manifest.read(bundle_folder).files
    entry = files[str(Path(name))]
    manifest = Manifest.read(edit(bundle_folder, files={**files, name: entry}))
    with pytest.raises(ArtifactError, match="write the path without"):
        manifest.verify(bundle_folder)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_file_that_many_names_link_to_is_hashed_once(
    link: Callable[[Path, Path], None], bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").write_bytes(bytes(100))
    for i in range(20):
        link(bundle_folder / f"link{i}", tmp_path / "large")
    MANIFEST_VALUE.write(bundle_folder)
    hashed: list[Path] = []
    monkeypatch.setattr("lfx.manifest.sha256", lambda path, size: hashed.append(path) or sha256(path, size))
    listed = Manifest.read(bundle_folder).verify(bundle_folder)
    assert len(listed) == 23
    assert len(hashed) == 4


@pytest.mark.parametrize(("old", "new"), [("question-answering", "fill-mask"), ("4096", "4097"), ("1e-06", "1e-03")])
def test_a_manifest_that_was_edited_is_refused(old: str, new: str, bundle_folder: Path) -> None:
    text = (bundle_folder / MANIFEST).read_text()
    assert text.count(old) >= 1
    (bundle_folder / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(ArtifactError, match=r"lfx\.json was changed after it was written"):
        Manifest.read(bundle_folder)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300], ids=["nul", "long"])
def test_verify_refuses_an_impossible_file_name(name: str, bundle_folder: Path) -> None:
    files = Manifest.read(bundle_folder).files
    manifest = Manifest.read(edit(bundle_folder, files={**files, name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(ArtifactError):
        manifest.verify(bundle_folder)


def test_read_says_how_to_make_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere does not exist.*lfx export"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=rf"no bundle: it has no {MANIFEST}.*lfx export"):
        Manifest.read(tmp_path)


NO_MANIFESTS = {
    "empty": b"",
    "brace": b"{",
    "null": b"null",
    "list": b"[]",
    "empty object": b"{}",
    "word": b"fox",
    "no UTF-8": b"\xff\xfe{}",
    "version only": b'{"format_version": 1}',
    "long number": b"1" * 6000,
    "deep nesting": b"[" * 200_000,
}


@pytest.mark.parametrize("name", NO_MANIFESTS)
def test_read_refuses_a_file_that_is_no_manifest(name: str, bundle_folder: Path) -> None:
    (bundle_folder / MANIFEST).write_bytes(NO_MANIFESTS[name])
    with pytest.raises(ArtifactError, match="export"):
        Manifest.read(bundle_folder)


def test_read_refuses_a_manifest_truncated_anywhere(bundle_folder: Path) -> None:
    text = (bundle_folder / MANIFEST).read_bytes().rstrip()
    for length in range(0, len(text), 37):
        (bundle_folder / MANIFEST).write_bytes(text[:length])
        with pytest.raises(ArtifactError):
            Manifest.read(bundle_folder)


@pytest.mark.parametrize("version", [0, 2, None, "1", [1], ...])
def test_read_refuses_another_format_version(version: Any, bundle_folder: Path) -> None:
    shown = None if version is ... else version
    with pytest.raises(ArtifactError) as caught:
        Manifest.read(edit(bundle_folder, format_version=version))
    assert f"has format version {shown!r}; this lfx reads {FORMAT_VERSION}" in str(caught.value)


@pytest.mark.parametrize("key", ["opset", "source", "versions", "inlined", "validation", "files", "inputs"])
def test_read_refuses_a_manifest_without_a_field(key: str, bundle_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="broken"):
        Manifest.read(edit(bundle_folder, **{key: ...}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("opset", "new"),
        ("opset", None),
        ("opset", float("inf")),
        ("source", None),
        ("source", 3),
        ("versions", "1.0"),
        ("validation", ["passed"]),
        ("files", None),
        ("files", [MODEL]),
        ("files", {MODEL: None}),
        ("files", {MODEL: 5}),
        ("files", {MODEL: {"bytes": 500}}),
        ("files", {MODEL: {"sha256": ""}}),
        ("files", {MODEL: {"sha256": "", "bytes": True}}),
        ("validation", {"outputs": {"logits": {"max_abs_error": "small"}}}),
        ("quantization", {"layers": []}),
        ("precision", "int4"),
    ],
)
def test_read_refuses_a_value_of_another_type(key: str, value: Any, bundle_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="export"):
        Manifest.read(edit(bundle_folder, **{key: value}))


def test_a_key_with_control_characters_is_named_in_one_line(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / MANIFEST).read_text())
    with pytest.raises(ArtifactError, match=r"files: 'a\\nb' is broken") as caught:
        Manifest.read(edit(bundle_folder, files={**data["files"], "a\nb": None}))
    assert "\n" not in str(caught.value)
