"""What `lfx triton` writes, without a server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import ArtifactError, InputError, LfxError
from lfx.manifest import sha256
from lfx.runtime import plugin
from lfx.runtime.signing import verify
from lfx.runtime.triton import repository as repositories
from lfx.runtime.triton.repository import Settings, write_model
from tests.conftest import MakeBundle, MakeLed, SmallDisk
from tests.runtime.backends.test_tensorrt import MANIFEST, write_plan


def config_of(folder: Path) -> str:
    """The config of a model, without its spaces."""
    return " ".join((folder / "config.pbtxt").read_text().split())


def names(folder: Path) -> set[str]:
    """The files of a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_becomes_a_model_of_copies(bundle: MakeBundle, tmp_path: Path) -> None:
    source = bundle("text-classification")
    written = write_model(source, tmp_path / "models", Settings(name="cls"))
    assert written.folder == tmp_path / "models" / "cls"
    assert names(written.folder) == {
        "config.pbtxt",
        "1/model.py",
        *(f"1/bundle/{path.name}" for path in source.iterdir()),
    }
    for path in source.iterdir():
        written_file = written.folder / "1/bundle" / path.name
        assert written_file.read_bytes() == path.read_bytes()
        assert not written_file.samefile(path)  # onnx refuses weights that have a second hard link
    text = (written.folder / "1/model.py").read_text()
    assert "class TritonPythonModel" in text
    assert len(text.splitlines()) < 80
    assert {path.name for path in tmp_path.iterdir()} == {"models"}  # nothing is left over


def test_the_config_has_the_tensors_batching_and_instances(bundle: MakeBundle, tmp_path: Path) -> None:
    settings = Settings(name="m", max_batch=8, max_delay_ms=1.5, max_pending=9, instances=3, token_budget=99)
    text = config_of(write_model(bundle("multiple-choice"), tmp_path / "models", settings).folder)
    assert "max_batch_size: 8 " in text
    assert 'input { name: "input_ids" data_type: TYPE_INT64 dims: [ -1, -1 ] optional: true' in text
    assert 'input { name: "choices" data_type: TYPE_UINT8 dims: [ -1, -1 ]' in text
    assert 'output { name: "logits" data_type: TYPE_FP32 dims: [ -1 ] }' in text
    assert "max_queue_delay_microseconds: 1500 default_queue_policy { max_queue_size: 9 }" in text
    assert "instance_group [ { count: 3 kind: KIND_CPU } ]" in text
    assert 'parameters { key: "token_budget" value { string_value: "99" } }' in text


def test_a_model_on_gpus_names_them(bundle: MakeBundle, tmp_path: Path) -> None:
    settings = Settings(name="m", provider="cuda", gpus=(0, 2), instances=2)
    text = config_of(write_model(bundle(), tmp_path / "models", settings).folder)
    assert "{ count: 2 kind: KIND_GPU gpus: [ 0, 2 ] }" in text


def test_a_single_onnx_file_takes_ids_only(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        (folder / name).write_bytes((bundle() / name).read_bytes())
    written = write_model(folder / "model.onnx", tmp_path / "models", Settings(name="m"))
    assert names(written.folder) == {"config.pbtxt", "1/model.py", "1/bundle/model.onnx", "1/bundle/model.onnx.data"}
    assert '"text"' not in config_of(written.folder)
    assert 'value { string_value: "bundle/model.onnx" }' in config_of(written.folder)
    assert written.lacks_tokenizer
    (folder / "tokenizer.json").unlink()
    assert not write_model(folder / "model.onnx", tmp_path / "models", Settings(name="m")).lacks_tokenizer


def test_a_plan_without_its_bundle_takes_ids_only(bundle: MakeBundle, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    shutil.copy(bundle() / "tokenizer.json", tmp_path)
    written = write_model(plan, tmp_path / "models", Settings(name="p"))
    assert '"text"' not in config_of(written.folder)
    assert written.lacks_tokenizer
    linked = write_model(plan, tmp_path / "models", Settings(name="p", link=True))
    assert '"text"' in config_of(linked.folder)


def test_a_linked_bundle_is_named_and_not_copied(bundle: MakeBundle, tmp_path: Path) -> None:
    written = write_model(bundle(), tmp_path / "models", Settings(link=True))
    assert names(written.folder) == {"config.pbtxt", "1/model.py"}
    assert json.dumps(str(bundle())) in config_of(written.folder)


@pytest.mark.parametrize("name", ["mod\u00e8le", "mod\udce8le"], ids=["letters", "no-utf8"])
def test_a_path_that_tritons_python_cannot_open_is_not_linked(name: str, bundle: MakeBundle, tmp_path: Path) -> None:
    """The file system encoding of that Python is ASCII, whatever the locale is."""
    (tmp_path / name).symlink_to(bundle())
    (tmp_path / "real" / name).mkdir(parents=True)
    for path in bundle().iterdir():
        (tmp_path / "real" / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="in its path, which Triton's Python cannot open; leave link"):
        write_model(tmp_path / "real" / name, tmp_path / "models", Settings(link=True))
    assert not (tmp_path / "models").exists()
    assert write_model(tmp_path / "real" / name, tmp_path / "models", Settings(name="m")).name == "m"
    write_model(tmp_path / name, tmp_path / "models", Settings(name="linked", link=True))  # its target's path is ASCII


def test_onnxruntime_gets_the_model_alone_and_the_library_of_custom_ops(bundle: MakeBundle, tmp_path: Path) -> None:
    settings = Settings(triton_backend="onnxruntime", custom_ops="/opt/libops.so")
    written = write_model(bundle(), tmp_path / "models", settings)
    assert names(written.folder) == {"config.pbtxt", "1/model.onnx", "1/model.onnx.data"}
    text = config_of(written.folder)
    assert 'backend: "onnxruntime" default_model_filename: "model.onnx"' in text
    assert 'model_operations { op_library_filename: "/opt/libops.so" }' in text
    assert "optional" not in text
    assert '"text"' not in text


def test_tensorrt_gets_the_plan_its_profiles_and_the_plugin_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "liblfx_plugins.so"
    library.write_bytes(b"library")
    monkeypatch.setattr(plugin, "library", lambda: library)
    written = write_model(write_plan(tmp_path), tmp_path / "models", Settings(name="p", triton_backend="tensorrt"))
    assert names(written.folder) == {"config.pbtxt", "1/model.plan", "1/liblfx_plugins.so"}
    assert written.plugins == written.folder / "1" / "liblfx_plugins.so"
    text = config_of(written.folder)
    assert "max_batch_size: 8 " in text
    assert 'kind: KIND_GPU profile: [ "0", "1" ]' in text


def test_a_plan_runs_in_an_engine_with_its_json_beside_it(tmp_path: Path) -> None:
    written = write_model(write_plan(tmp_path), tmp_path / "models", Settings(name="p"))
    assert names(written.folder) == {"config.pbtxt", "1/model.py", "1/model.plan", "1/model.plan.json"}
    assert "kind: KIND_GPU" in config_of(written.folder)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_plan_that_is_replaced_while_it_is_copied_is_refused(
    copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, copy, copied = write_plan(tmp_path), repositories.copy, []

    def replace_and_copy(source: Path, target: Path) -> None:
        copied.append(source)
        if len(copied) == 1 + copies:  # the first is model.py
            write_plan(tmp_path, replace(MANIFEST, target="sm89"))
            if copies == 1:
                plan.write_bytes(b"newer")
        copy(source, target)

    monkeypatch.setattr(repositories, "copy", replace_and_copy)
    with pytest.raises(ArtifactError, match=r"\.plan was replaced while it was read; run it again"):
        write_model(plan, tmp_path / "models", Settings(name="p"))


def test_a_plan_that_is_replaced_while_it_is_copied_is_refused_for_the_tensorrt_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, copy = write_plan(tmp_path), repositories.copy

    def replace_and_copy(source: Path, target: Path) -> None:
        plan.write_bytes(b"newer")
        copy(source, target)

    monkeypatch.setattr(repositories, "copy", replace_and_copy)
    with pytest.raises(ArtifactError, match=r"\.plan was replaced while it was read; run it again"):
        write_model(plan, tmp_path / "models", Settings(name="p", triton_backend="tensorrt"))


def test_a_plan_of_a_led_has_no_graphs_of_its_bundle_beside_it(led_bundle: MakeLed, tmp_path: Path) -> None:
    bundle = tmp_path / "led"
    bundle.symlink_to(led_bundle()[1])
    plan = write_plan(tmp_path, replace(MANIFEST, bundle={"name": "led", "sha256": sha256(bundle / "lfx.json")}))
    written = write_model(plan, tmp_path / "models", Settings(name="p"))
    texts = {"config.json", "generation_config.json", "lfx.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (written.folder / "1" / "led").iterdir()} == texts


def test_a_model_is_not_replaced_by_a_link_into_it(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = write_model(bundle(), tmp_path, Settings(name="a")).folder
    inner = folder / "1" / "bundle"
    with pytest.raises(InputError, match="which is replaced; leave link out, or give another name"):
        write_model(inner, tmp_path, Settings(name="a", link=True))
    write_model(inner, tmp_path, Settings(name="b", link=True))
    write_model(inner, tmp_path, Settings(name="a", max_batch=8))
    assert verify(inner).files


def test_a_model_of_lfx_is_replaced_and_edited_or_foreign_ones_are_kept(bundle: MakeBundle, tmp_path: Path) -> None:
    models = tmp_path / "models"
    folder = write_model(bundle(), models, Settings(name="m")).folder
    (folder / "1" / "__pycache__").mkdir()
    (folder / "1" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"")
    write_model(bundle(), models, Settings(name="m", max_batch=5))
    assert "max_batch_size: 5 " in config_of(folder)
    config = folder / "config.pbtxt"
    written = config.read_text()
    config.write_text(written.replace("max_batch_size: 5", "max_batch_size: 6"))
    with pytest.raises(ArtifactError, match=r"did not write, which would be lost; remove it, or give .* --name"):
        write_model(bundle(), models, Settings(name="m"))
    assert "max_batch_size: 6" in config.read_text()
    config.write_text(written)
    model_py = folder / "1" / "model.py"
    text = model_py.read_text()
    model_py.write_text(f"# mine\n{text}")
    with pytest.raises(ArtifactError, match="which would be lost"):
        write_model(bundle(), models, Settings(name="m"))
    assert model_py.read_text().startswith("# mine")
    model_py.write_text(text)
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="which would be lost"):
        write_model(bundle(), models, Settings(name="m"))
    (folder / "linked").unlink()
    write_model(bundle(), models, Settings(name="m"))
    (folder / "2").mkdir()
    (folder / "2" / "model.py").write_text("")
    with pytest.raises(ArtifactError, match="which would be lost"):
        write_model(bundle(), models, Settings(name="m"))
    (models / "other").mkdir()
    (models / "other" / "config.pbtxt").write_text('name: "other"\n')
    with pytest.raises(ArtifactError, match="is no model of lfx"):
        write_model(bundle(), models, Settings(name="other"))
    (models / "other" / "config.pbtxt").unlink()
    os.mkfifo(models / "other" / "config.pbtxt")  # to read it would take until somebody writes to it
    with pytest.raises(ArtifactError, match="is no model of lfx"):
        write_model(bundle(), models, Settings(name="other"))


def test_an_older_model_is_checked_while_no_other_process_replaces_it(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, locked, refusal = [0], repositories.locked, repositories._refusal

    @contextlib.contextmanager
    def counting(target: Path) -> Iterator[None]:
        with locked(target):
            held[0] += 1
            yield
            held[0] -= 1

    def checked(folder: Path) -> str | None:
        assert held[0] == 1
        return refusal(folder)

    write_model(bundle(), tmp_path / "models", Settings(name="m"))
    monkeypatch.setattr(repositories, "locked", counting)
    monkeypatch.setattr(repositories, "_refusal", checked)
    assert write_model(bundle(), tmp_path / "models", Settings(name="m")).name == "m"


def test_a_failed_write_leaves_the_older_model(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(bundle(), tmp_path / "models", Settings(name="m")).folder
    before = config_of(folder)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repositories, "_write_config", fail)
    with pytest.raises(LfxError, match="no disk space left; make room, or choose another --output"):
        write_model(bundle(), tmp_path / "models", Settings(name="m", max_batch=5))
    assert config_of(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


def test_a_failed_rename_leaves_the_older_model(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two folders."""
    folder = write_model(bundle(), tmp_path / "models", Settings(name="m")).folder
    before, rename = config_of(folder), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(repositories, "exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(LfxError, match="no disk space left"):
        write_model(bundle(), tmp_path / "models", Settings(name="m", max_batch=5))
    assert config_of(folder) == before


def test_a_stop_while_a_copied_model_is_removed_leaves_it(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container whose image holds the model."""
    folder = write_model(bundle(), tmp_path / "models", Settings(name="m")).folder
    before = config_of(folder)

    def stop(target: Path, old: Path) -> None:
        shutil.copytree(target, old)
        (target / "config.pbtxt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(repositories, "exchange", lambda first, second: False)
    monkeypatch.setattr(repositories, "move_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        write_model(bundle(), tmp_path / "models", Settings(name="m", max_batch=5))
    assert config_of(folder) == before


def test_a_repository_whose_parent_is_read_only_works(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "parent" / "models"
    models.mkdir(parents=True)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != models.parent)
    made: list[Path] = []
    folder = repositories.private_folder

    def record(parent: Path, *rest: Any) -> Any:
        made.append(parent)
        return folder(parent, *rest)

    monkeypatch.setattr(repositories, "private_folder", record)
    write_model(bundle(), models, Settings(name="m", link=True))
    assert made == [models]
    assert {path.name for path in models.iterdir()} == {"m"}


def test_a_repository_that_is_a_mount_point_works(bundle: MakeBundle, small_disk: SmallDisk) -> None:
    disk = small_disk()
    written = write_model(bundle(), disk, Settings(name="m", link=True))
    assert {path.name for path in disk.iterdir()} == {"m"}
    assert names(written.folder) == {"config.pbtxt", "1/model.py"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "../x"}, "is no name of a model; give up to 100 letters"),
        ({"gpus": (0,)}, "runs on the CPU; choose provider cuda"),
        ({"custom_ops": "a.so"}, "custom ops are for Triton's onnxruntime backend"),
        ({"triton_backend": "tensorrt"}, "is no plan; build one with: lfx build-engine"),
        ({"triton_backend": "onnxruntime", "threads": 2}, "threads is for the Engine"),
        ({"triton_backend": "onnxruntime", "link": True}, "leave link out"),
        ({"triton_backend": "torch"}, "choose one of: python, onnxruntime, tensorrt"),
        ({"provider": "cuda", "gpus": (1, 1)}, "names a GPU twice"),
        ({"instances": 0}, "instances 0 is out of range"),
        ({"name": 5}, "5 is no name of a model"),
        ({"link": "yes"}, "link is 'yes'; give True or False"),
        ({"custom_ops": 5}, "custom_ops is 5; give a path"),
        ({"max_pending": 2**40}, "max_pending 1099511627776 is out of range"),
        ({"max_batch": "8"}, "max_batch is '8'; give a whole number"),
        ({"token_budget": -5}, "token_budget -5 is out of range"),
        ({"threads": 0}, "threads 0 is out of range"),
        ({"gpus": 1}, "gpus is 1; give a list of numbers of GPUs"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, bundle: MakeBundle, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_model(bundle(), tmp_path / "models", Settings(**settings))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"triton_backend": "onnxruntime"}, "is a plan; choose Triton's tensorrt or python backend"),
        ({"threads": 2}, "leave threads and precision out"),
        ({"provider": "cuda"}, "leave backend and provider out"),
        ({"max_batch": 9}, "max_batch 9 is above the plan's 8"),
    ],
)
def test_options_that_do_not_fit_a_plan_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_model(write_plan(tmp_path), tmp_path / "models", Settings(**settings))


def test_a_plan_of_tensorrt_rtx_is_refused_for_the_tensorrt_backend(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, replace(MANIFEST, flavor="tensorrt-rtx"))
    with pytest.raises(InputError, match="build it with: --flavor tensorrt, or choose the python backend"):
        write_model(plan, tmp_path / "models", Settings(triton_backend="tensorrt"))


def test_settings_of_another_type_are_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="settings is 5; give Settings"):
        write_model(bundle(), tmp_path / "models", 5)  # type: ignore[arg-type]


def test_attention_outputs_are_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exported without --output-attentions"):
        write_model(bundle(output_attentions=True), tmp_path / "models", Settings())


def test_the_command_writes_a_model_and_says_how_to_start_the_server(bundle: MakeBundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lfx.cli", "triton", str(bundle()), "--output", "models", "--gpu", "1"]
    options = ["--provider", "cuda", "--name", "m", "--json"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["model"], result["plugins"]) == ("m", None)
    assert result["start"] == "tritonserver --model-repository=models"
    assert "gpus: [ 1 ]" in config_of(tmp_path / "models" / "m")
