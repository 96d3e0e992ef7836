"""Bundles of links, weights that no manifest lists, and manifests whose signature is not the model's."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lfx.errors import ArtifactError
from lfx.manifest import MANIFEST, MODEL, WEIGHTS, Manifest, sealed, sha256
from lfx.runtime import Engine
from lfx.runtime.artifact import open_artifact
from lfx.runtime.backends import BACKENDS
from tests.conftest import NULL_BYTE, MakeBundle
from tests.marks import fast_if

IDS = [5, 6, 7, 8, 9]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the list of open files")
def test_files_that_cannot_be_mapped_are_copied_for_onnx_ir(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """9p, and FUSE without a page cache, refuse a shared mapping."""
    artifact, original = open_artifact(copy), mmap.mmap

    def refuse(descriptor: int, *arguments: Any, **options: Any) -> mmap.mmap:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(copy):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return original(descriptor, *arguments, **options)

    with artifact.plain_files(unshared=True) as path:
        assert path == copy / MODEL
    monkeypatch.setattr(mmap, "mmap", refuse)
    with artifact.plain_files(unshared=True) as path:
        assert sorted(file.name for file in path.parent.iterdir()) == ["lock", MODEL, WEIGHTS]
        assert path.read_bytes() == (copy / MODEL).read_bytes()


@pytest.fixture
def copy(bundle: MakeBundle, tmp_path: Path) -> Path:
    """A copy of a bundle for one test, without hard links."""
    return shutil.copytree(bundle(), tmp_path / "copy")


def reseal(folder: Path, **changes: Any) -> None:
    """Change values of the manifest, update the digests of changed files, and seal it."""
    data = json.loads((folder / MANIFEST).read_text())
    files = {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in data["files"]}
    (folder / MANIFEST).write_text(json.dumps(sealed({**data, "files": files, **changes})))


def set_metadata(folder: Path, **changes: Any) -> None:
    """Change values of the signature inside model.onnx."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    entry = next(entry for entry in model.metadata_props if entry.key == "lfx")
    entry.value = json.dumps({**json.loads(entry.value), **changes})
    (folder / MODEL).write_bytes(model.SerializeToString())


def answer(path: Path, backend: str = "onnxruntime") -> np.ndarray[Any, Any]:
    with Engine(path, backend) as engine:
        return np.asarray(engine.run(IDS)["last_hidden_state"])


def hub_cache(copy: Path, linked: Path) -> None:
    """Link to files in one folder of blobs, as a hub cache does."""
    for path in copy.iterdir():
        (linked / path.name).symlink_to(path)


def folder_per_file(copy: Path, linked: Path) -> None:
    """Link to files in one folder each, as DVC and git-annex do."""
    for path in copy.iterdir():
        blob = copy.parent / "annex" / sha256(path)[:2] / sha256(path)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        (linked / path.name).symlink_to(os.path.relpath(blob, linked))


def hard_links(copy: Path, linked: Path) -> None:
    """Give each file a second hard link."""
    for path in copy.iterdir():
        os.link(path, linked / path.name)


def chain(copy: Path, linked: Path) -> None:
    """Link to links."""
    for path in copy.iterdir():
        (copy.parent / f"{path.name}.link").symlink_to(path)
        (linked / path.name).symlink_to(copy.parent / f"{path.name}.link")


@fast_if(lambda links: links is hub_cache)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("links", [hub_cache, folder_per_file, hard_links, chain], ids=lambda f: f.__name__)
def test_a_bundle_of_links_gives_the_outputs_of_the_bundle(
    links: Callable[[Path, Path], None], backend: str, copy: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    linked, temporary = tmp_path / "linked", tmp_path / "tmp"
    linked.mkdir()
    temporary.mkdir()
    links(copy, linked)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    np.testing.assert_array_equal(answer(linked, backend), answer(copy, backend))
    np.testing.assert_array_equal(answer(linked / MODEL, backend), answer(copy, backend))
    assert not list(temporary.glob(".lfx-*"))


@pytest.mark.parametrize("name", [MODEL, WEIGHTS])
def test_the_target_of_a_link_is_compared_with_its_digest(name: str, copy: Path, tmp_path: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "other").write_bytes(data)
    (copy / name).unlink()
    (copy / name).symlink_to(tmp_path / "other")
    with pytest.raises(ArtifactError, match=f"{name} was changed"):
        Engine(copy)


def test_broken_links_are_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to(copy / WEIGHTS)
    with pytest.raises(ArtifactError, match=WEIGHTS):
        Engine(copy)
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to("gone")
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is missing"):
        Engine(copy)


def test_a_link_to_a_folder_in_a_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "extra").mkdir()
    (copy / "extra" / "vocab.txt").write_text("fox\n")
    Manifest.read(copy).write(copy)
    Engine(copy).close()
    (copy / "extra").rename(tmp_path / "extra")
    (copy / "extra").symlink_to(tmp_path / "extra")
    with pytest.raises(ArtifactError, match=r"extra is a link; a bundle's files may be links"):
        Engine(copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_the_manifest_does_not_list_are_refused(backend: str, copy: Path) -> None:
    data = json.loads((copy / MANIFEST).read_text())
    del data["files"][WEIGHTS]
    (copy / MANIFEST).write_text(json.dumps(sealed(data)))
    with pytest.raises(ArtifactError, match=rf"has weights in '{WEIGHTS}', which {MANIFEST} does not list"):
        Engine(copy, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_a_single_onnx_file_outside_its_folder_are_refused(backend: str, copy: Path, tmp_path: Path) -> None:
    (copy / MANIFEST).unlink()
    (copy / WEIGHTS).rename(tmp_path / "elsewhere")
    (copy / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="outside its folder"):
        Engine(copy / MODEL, backend)
    name_weights(copy / MODEL, "../elsewhere")
    with pytest.raises(ArtifactError, match="outside its folder"):
        Engine(copy / MODEL, backend)


@pytest.mark.parametrize(("name", "reason"), [("a\0b", NULL_BYTE), ("x" * 300, "File name too long")])
def test_weights_of_a_single_onnx_file_whose_name_no_file_can_have_are_refused(
    name: str, reason: str, copy: Path
) -> None:
    (copy / MANIFEST).unlink()
    name_weights(copy / MODEL, name)
    with pytest.raises(ArtifactError, match=rf"the path of the weights of {MODEL} .* cannot be opened: {reason}"):
        Engine(copy / MODEL)


def test_weights_of_a_single_onnx_file_without_a_name_are_refused(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    name_weights(copy / MODEL, "")
    with pytest.raises(ArtifactError, match="has weights in "):
        Engine(copy / MODEL)


def name_weights(path: Path, name: str) -> None:
    """Give the file of weights another name in an ONNX file."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString())


def test_weights_of_a_single_onnx_file_that_link_to_themselves_are_refused(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to(WEIGHTS)
    with pytest.raises(ArtifactError, match="is no file"):
        Engine(copy / MODEL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 9999), ("max_seqlen", 4096), ("pad_token_id", 3), ("default_global", "first"), ("max_global", 5)],
)
def test_a_manifest_with_another_signature_than_its_model_is_refused(
    field: str, value: Any, backend: str, copy: Path
) -> None:
    reseal(copy, **{field: value})
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} says {field} .* where {MODEL} says"):
        Engine(copy, backend)


def test_a_model_whose_graph_has_other_outputs_is_refused(copy: Path) -> None:
    signature = Manifest.read(copy).signature.to_dict()
    outputs = [{**output, "name": f"other_{i}"} for i, output in enumerate(signature["outputs"])]
    set_metadata(copy, outputs=outputs)
    reseal(copy, outputs=outputs)
    with pytest.raises(ArtifactError, match="other inputs or outputs than its manifest"):
        Engine(copy)


@pytest.mark.parametrize("metadata", ["[]", "5", "null", "{}", '{"task": 1}', '"fox"', "{", '{"a": NaN}'])
def test_broken_metadata_is_an_artifact_error(metadata: str, copy: Path) -> None:
    model = onnx.load(copy / MODEL, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == "lfx").value = metadata
    (copy / MODEL).write_bytes(model.SerializeToString())
    reseal(copy)
    for _ in ("with its manifest", "alone"):
        with pytest.raises(ArtifactError, match="export"):
            Engine(copy / MODEL)
        (copy / MANIFEST).unlink(missing_ok=True)


def test_many_processes_leave_no_temporary_files(copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    linked = tmp_path / "linked"
    linked.mkdir()
    folder_per_file(copy, linked)
    for backend in BACKENDS:
        answer(linked, backend)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_in_a_folder_of_the_bundle_are_refused_whatever_the_backend(backend: str, copy: Path) -> None:
    (copy / "sub").mkdir()
    (copy / WEIGHTS).rename(copy / "sub" / WEIGHTS)
    model = onnx.load(copy / MODEL, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"sub/{WEIGHTS}"
    (copy / MODEL).write_bytes(model.SerializeToString())
    Manifest.read(copy).write(copy)
    with pytest.raises(ArtifactError, match="outside its folder"):
        Engine(copy, backend)
