"""`lfx push` and `Engine("org/name")`, with a server on this machine that speaks the hub's HTTP API."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lfx.errors import ArtifactError, InputError, LfxError
from lfx.export import relayout
from lfx.manifest import MANIFEST, Manifest
from lfx.runtime import Engine
from lfx.runtime.hub import local_path, push
from lfx.runtime.model_card import MARK, model_card
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.hub_server import Hub, hub_of_this_process

NAME = "org/tiny"
IDS = np.arange(5, 25)[None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this process, whose working folder is the temporary one."""
    monkeypatch.chdir(tmp_path)
    with hub_of_this_process(tmp_path / "cache") as server:
        yield server


def test_a_pushed_bundle_is_opened_by_its_name(hub: Hub, bundle: MakeBundle) -> None:
    source = bundle("text-classification")
    commit = push(source, NAME)
    assert commit == f"{hub.address}/{NAME}/commit/{hub.repositories[NAME].commit}"
    assert set(hub.repositories[NAME].files) == {*Manifest.read(source).files, MANIFEST, "README.md"}
    assert hub.objects  # the larger files went through Git LFS
    with Engine(NAME) as engine, Engine(source) as local:
        np.testing.assert_array_equal(engine.run(IDS)["logits"], local.run(IDS)["logits"])
        assert engine.identity == local.identity
        again = pickle.loads(pickle.dumps(engine))
        np.testing.assert_array_equal(again.run(IDS)["logits"], local.run(IDS)["logits"])


def test_a_bundle_in_the_layout_of_the_hub_is_pushed_and_opened(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    push(relayout(bundle(), tmp_path / "hf"), NAME)
    assert "onnx/model.onnx" in hub.repositories[NAME].files
    with Engine(f"{NAME}@{hub.repositories[NAME].commit}") as engine, Engine(bundle()) as local:
        expected = local.run(IDS)["last_hidden_state"]
        np.testing.assert_allclose(engine.run(IDS)["last_hidden_state"], expected, rtol=0, atol=1e-5)


def test_only_listed_files_are_fetched_and_a_second_time_none(hub: Hub, bundle: MakeBundle) -> None:
    push(bundle(), NAME)
    hub.repositories[NAME].files["tokenizer.model"] = b"from another tool"
    hub.requests.clear()
    folder = local_path(Path(NAME))
    assert not (folder / "tokenizer.model").exists()
    assert sum(request.startswith("GET") for request in hub.requests) == len(Manifest.read(bundle()).files) + 1
    hub.requests.clear()
    assert local_path(Path(NAME)) == folder
    assert not [request for request in hub.requests if request.startswith("GET")]


def test_a_broken_file_of_the_cache_is_fetched_again_after_the_cure_that_the_error_names(
    hub: Hub, bundle: MakeBundle
) -> None:
    push(bundle(), NAME)
    folder = local_path(Path(NAME))
    weights = (folder / "model.onnx.data").resolve()
    content = weights.read_bytes()
    for broken in (content[:100], content[:-1] + bytes([content[-1] ^ 1])):
        weights.write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"so that it is fetched again$") as raised:
            Engine(NAME)
        cure = Path(str(raised.value).rpartition("; remove ")[2].partition(",")[0])
        shutil.rmtree(cure)
        Engine(NAME).close()
        assert weights.read_bytes() == content
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"is missing; remove .*, so that it is fetched again$"):
        Engine(folder)


def test_files_of_the_hub_are_checked_against_the_manifest(hub: Hub, bundle: MakeBundle) -> None:
    push(bundle(), NAME)
    files = hub.repositories[NAME].files
    files["model.onnx.data"] = files["model.onnx.data"][:-1] + b"\x00"
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was changed after the export"):
        Engine(NAME)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "C:/b", "a//b", "./a"])
def test_a_manifest_of_the_hub_that_names_another_place_is_refused(name: str, hub: Hub, bundle: MakeBundle) -> None:
    push(bundle(), NAME)
    from lfx.manifest import sealed

    manifest = json.loads(hub.repositories[NAME].files[MANIFEST])
    manifest["files"][name] = {"sha256": "", "bytes": 0}
    hub.repositories[NAME].files[MANIFEST] = json.dumps(sealed(manifest)).encode()
    with pytest.raises(ArtifactError, match="which is no path inside the repository"):
        Engine(NAME)


def test_a_manifest_of_the_hub_with_too_many_files_is_refused(
    hub: Hub, bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundle(), NAME)
    hub.requests.clear()
    monkeypatch.setattr("lfx.runtime.hub._MOST_FILES", 2)
    with pytest.raises(ArtifactError, match="files; at most 2 are fetched"):
        Engine(NAME)
    assert all(request.endswith(MANIFEST) for request in hub.requests if request.startswith("GET"))


def test_a_folder_wins_over_a_repository_of_its_name(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / NAME).symlink_to(bundle())
    with Engine(NAME):
        pass
    with pytest.raises(ArtifactError, match="org/other does not exist; make a bundle"):
        Engine("org/other")
    assert not hub.requests


@pytest.mark.parametrize("name", ["org/none", "org/none@branch"])
def test_a_repository_that_does_not_exist_is_one_line(name: str, hub: Hub) -> None:
    with pytest.raises(
        ArtifactError, match=f"^{name} is no folder here, and cannot be fetched from the hub: .*; check the name"
    ):
        Engine(name)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_named_as_the_cause(
    number: int, hub: Hub, bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundle(), NAME)

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "/home/nobody/.cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing)
    with pytest.raises(ArtifactError, match=rf"{os.strerror(number)}: '/home/nobody/.cache'; set HF_HOME to a folder"):
        Engine(NAME)


def test_a_private_repository_needs_the_token(hub: Hub, bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    push(bundle(), NAME, private=True)
    assert hub.repositories[NAME].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ArtifactError, match="give the token of a private repository as HF_TOKEN"):
        Engine(NAME)
    with pytest.raises(LfxError, match="org/other cannot be uploaded: "):
        push(bundle(), "org/other")


def test_a_repository_is_public_unless_asked_for(hub: Hub, bundle: MakeBundle) -> None:
    push(bundle(), NAME)
    assert not hub.repositories[NAME].private


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "org/name@main", "org/name.onnx", "org/name.plan", None])
def test_push_refuses_what_is_no_repository(name: Any, bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match="give ORG/NAME"):
        push(bundle(), name)
    with pytest.raises(InputError, match="bundle is 5; give a path"):
        push(5, NAME)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="revision is 5; give the name of a branch"):
        push(bundle(), NAME, revision=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["org/name.onnx", "org/name.plan"])
def test_the_name_of_a_file_that_is_missing_is_not_looked_up(name: str, hub: Hub) -> None:
    assert local_path(Path(name)) == Path(name)
    with pytest.raises(ArtifactError, match="does not exist"):
        Engine(name)
    assert not hub.requests


def test_push_refuses_a_broken_bundle(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(bundle(), tmp_path / "broken")
    (copied / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json has 2 bytes"):
        push(copied, NAME)
    assert not hub.requests


def test_nothing_is_pushed_of_a_bundle_that_was_replaced(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    folder, other = (shutil.copytree(bundle(task), tmp_path / task) for task in ("fill-mask", "text-classification"))

    def replace(step: str) -> None:
        if step.startswith("uploading"):
            folder.rename(tmp_path / "before")
            other.rename(folder)

    with pytest.raises(LfxError, match="was replaced or changed while it was read; run it again"):
        push(folder, NAME, progress=replace)
    assert not hub.repositories[NAME].files


def test_the_card_has_the_validation_table(bundle: MakeBundle) -> None:
    manifest = Manifest.read(bundle("text-classification"))
    card = model_card(manifest, NAME)
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "lfx",
        "pipeline_tag": "text-classification",
        "tags": ["longformer", "onnx", "lfx"],
    }
    measured = manifest.validation["outputs"]["logits"]
    row = next(line for line in text.splitlines() if line.startswith("| logits |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == [f"{measured[key]:.2g}" for key in ("max_abs_error", "torch_max_abs_error", "tolerance")]
    assert 'engine = runtime.Engine("org/tiny")' in text


def test_the_card_of_a_model_that_writes_texts_generates(led_bundle: MakeLed) -> None:
    card = model_card(Manifest.read(led_bundle()[1]), NAME)
    assert 'engine.generate("A long document …")' in card
    assert "transformers.js" not in card and "standard operators" not in card  # it has not the layout of the hub


@pytest.mark.parametrize("missing", ["accuracy", "max_abs_value"])
def test_a_card_is_written_without_what_the_manifest_need_not_have(missing: str, bundle: MakeBundle) -> None:
    measured = {"max_abs_error": 0.25, "tolerance": 1.0, "unfused_max_abs_error": 0.25, "cosine": 0.5}
    accuracy = {"reference": "float32", "outputs": {"logits": measured}}
    quantization = {"accuracy": accuracy} if missing != "accuracy" else {"weight_bits": 7}
    card = model_card(dataclasses.replace(Manifest.read(bundle()), quantization=quantization), NAME)
    assert ("| logits | 0.25 |  | 0.50000 |" in card) == (missing != "accuracy")


def test_names_in_a_card_are_no_markup(bundle: MakeBundle) -> None:
    manifest = dataclasses.replace(Manifest.read(bundle()), source={"model": "/home/me/<b>|x`", "kind": "folder"})
    card = model_card(manifest, NAME)
    assert r"\<b\>\|x\`" in card
    assert "/home/me" not in card


def test_a_bundle_of_a_folder_whose_name_is_not_utf_8_is_pushed(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    source = shutil.copytree(bundle(), tmp_path / "source")
    manifest = Manifest.read(source)
    dataclasses.replace(manifest, source={**manifest.source, "model": "/models/mod\udce8le"}).write(source)
    push(source, NAME)
    assert b"mod?le as an ONNX model" in hub.repositories[NAME].files["README.md"]


def test_a_card_of_the_user_is_kept_and_one_of_lfx_replaced(hub: Hub, bundle: MakeBundle) -> None:
    push(bundle(), NAME)
    files = hub.repositories[NAME].files
    files["README.md"] = files["README.md"].replace(b"## Validation", b"")
    push(bundle(), NAME)
    assert b"## Validation" in files["README.md"]
    assert MARK.encode() in files["README.md"]
    files["README.md"] = b"# My own words"
    hub.repositories[NAME].commit = "1" * 40
    push(bundle(), NAME)
    assert files["README.md"] == b"# My own words"


def test_files_of_an_earlier_push_are_deleted_and_others_kept(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    push(bundle(), NAME)
    repository = hub.repositories[NAME]
    own = {"notes.txt": b"mine", "onnx/other.onnx": b"mine", ".gitattributes": b"mine"}
    repository.files |= {**own, "lfx.json.minisig": b"of the first manifest"}
    first = repository.commit
    push(relayout(bundle(), tmp_path / "hf"), NAME)
    expected = {*Manifest.read(tmp_path / "hf").files, MANIFEST, "README.md", *own}
    assert set(repository.files) == expected
    assert "model.onnx.data" not in expected
    assert sum(request.startswith("POST") and "/commit/" in request for request in hub.requests) == 2
    assert repository.commit != first
    with Engine(NAME) as engine:
        assert engine.identity == Manifest.read(tmp_path / "hf").to_dict()["manifest_sha256"]


def test_a_push_is_refused_if_another_one_has_come_first(hub: Hub, bundle: MakeBundle) -> None:
    push(bundle(), NAME)

    def push_another(step: str) -> None:
        if step.startswith("uploading"):
            push(bundle("text-classification"), NAME)

    with pytest.raises(LfxError, match="org/tiny got another commit since this push began; push again"):
        push(bundle(global_attention="first"), NAME, progress=push_another)
    assert Manifest.read(local_path(Path(NAME))).signature.task == "text-classification"


def test_nothing_is_deleted_where_no_manifest_of_lfx_is(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    push(bundle(), NAME)
    files = hub.repositories[NAME].files
    for manifest in (b"{", json.dumps({"files": {"notes.txt": {}}}).encode()):
        files |= {"notes.txt": b"mine", MANIFEST: manifest}
        hub.repositories[NAME].commit = f"{len(manifest):040}"
        push(bundle("text-classification"), NAME)
        assert files["notes.txt"] == b"mine"
        assert Manifest.read(local_path(Path(NAME))).signature.task == "text-classification"


def test_the_commands_push_run_and_inspect(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    def lfx(*arguments: str) -> str:
        command = [sys.executable, "-m", "lfx.cli", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pushed = json.loads(lfx("push", str(bundle("text-classification")), NAME, "--json"))
    assert pushed["commit"].startswith(f"{hub.address}/{NAME}/commit/")
    assert "LABEL" in lfx("run", NAME, "--text", "the quick brown fox")
    assert "text-classification" in lfx("inspect", NAME)
