"""A bundle that another one replaces, as `lfx export` does by one rename, while it is opened, open or read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.errors import ArtifactError
from lfx.export import relayout
from lfx.export.quantize import quantize
from lfx.manifest import Manifest
from lfx.runtime import Engine, backends, loading
from lfx.runtime.artifact import check_bundle, unchanged
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.tokenizer import open_tokenizer
from lfx.runtime.triton import repository
from tests.conftest import MakeBundle, MakeLed, MakeOnce

IDS = [5, 6, 7, 8, 9]


def replace(folder: Path, other: Path) -> None:
    """Give the name of a folder to another one."""
    folder.rename(folder.with_name(f"{folder.name}-before"))
    other.rename(folder)


def edited(bundle: Path, folder: Path, **files: Callable[[Any], None]) -> Path:
    """A copy of a bundle in which JSON files are edited, with a valid manifest."""
    shutil.copytree(bundle, folder)
    for name, edit in files.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
    Manifest.read(folder).write(folder)
    return folder


def turn_vocabulary(tokenizer: Any) -> None:
    """Give the words the ids of others."""
    words = [word for word, index in tokenizer["model"]["vocab"].items() if index > 4]
    tokenizer["model"]["vocab"] |= dict(
        zip(words, [tokenizer["model"]["vocab"][word] for word in words][::-1], strict=True)
    )


def rename_labels(config: Any) -> None:
    """Other names of the classes."""
    config["id2label"] = {"0": "first", "1": "second"}


def test_an_open_engine_reads_no_texts_of_another_bundle(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle("sentence-embedding"), tmp_path / "a")
    with Engine(folder) as engine:
        replace(folder, edited(folder, tmp_path / "b", tokenizer=turn_vocabulary))
        with pytest.raises(
            ArtifactError, match=r"tokenizer\.json was changed .* or the bundle was replaced since it was"
        ):
            engine.embed("the fox")


def test_an_open_engine_takes_no_options_of_another_bundle(led_bundle: MakeLed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(led_bundle()[1], tmp_path / "a"))
    with Engine(folder) as engine:
        other = edited(folder, tmp_path / "b", generation_config=lambda options: options.update(num_beams=3))
        replace(folder, other)
        with pytest.raises(
            ArtifactError, match=r"generation_config\.json was changed .* was replaced since it was opened"
        ):
            engine.generate([IDS])


def test_an_open_engine_of_a_file_in_a_bundle_takes_no_texts_and_options_of_another(
    led_bundle: MakeLed, made_once: MakeOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = made_once("led-hf", lambda new: relayout(led_bundle(7)[1], new / "hf")) / "hf"
    folder = Path(shutil.copytree(layout, tmp_path / "a"))
    monkeypatch.chdir(folder / "onnx")
    with Engine("encoder_model.onnx") as first, Engine(folder / "onnx" / "encoder_model.onnx") as second:
        edit: Any = {"generation_config": lambda options: options.update(num_beams=3), "tokenizer": turn_vocabulary}
        replace(folder, edited(folder, tmp_path / "b", **edit))
        for engine in (first, second):
            with pytest.raises(
                ArtifactError, match=r"generation_config\.json was changed .* was replaced since it was"
            ):
                engine.generate([IDS])
            with pytest.raises(ArtifactError, match=r"tokenizer\.json was changed .* was replaced since it was opened"):
                open_tokenizer(engine.path, engine.text_source, engine.signature)


def test_labels_are_those_that_the_tokenizer_was_opened_with(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle("text-classification"), tmp_path / "a")
    with Engine(folder) as engine:
        tokenizer = open_tokenizer(engine.path, engine.manifest, engine.signature)
        label = Postprocessor(tokenizer).label(0)
        replace(folder, edited(folder, tmp_path / "b", config=rename_labels))
        assert Postprocessor(tokenizer).label(0) == label != "first"
        with pytest.raises(ArtifactError, match=r"config\.json was changed"):
            open_tokenizer(engine.path, engine.manifest, engine.signature)


@pytest.mark.parametrize("times", [1, 9])
def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_again(
    times: int, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = (shutil.copytree(bundle(task), tmp_path / task) for task in ("fill-mask", "text-classification"))
    with Engine(other) as engine:
        expected = engine.run(IDS)["logits"]
    load, left = backends.load, [times]

    def load_meanwhile(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            (tmp_path / "swapped").mkdir(exist_ok=True)
            folder.rename(tmp_path / "swapped" / "a")
            other.rename(folder)
            (tmp_path / "swapped" / "a").rename(other)
        return load(*arguments, **options)

    monkeypatch.setattr(loading.backends, "load", load_meanwhile)
    if times > 1:
        with pytest.raises(ArtifactError, match="was replaced while it was opened, 3 times in a row; open it again"):
            Engine(folder)
        return
    with Engine(folder) as engine:
        assert engine.signature.task == "text-classification"
        np.testing.assert_array_equal(engine.run(IDS)["logits"], expected)


def test_a_plan_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, errors = tmp_path / "a.plan", iter(["first", "second"])
    plan.write_bytes(b"old")

    def load(*_: Any) -> Any:
        (tmp_path / "new").write_bytes(b"new")
        if (error := next(errors)) == "first":
            (tmp_path / "new").rename(plan)
        raise ArtifactError(error)

    monkeypatch.setattr(loading, "_load_plan", load)
    with pytest.raises(ArtifactError, match="second"):
        Engine(plan)


def test_what_is_made_of_a_bundle_that_is_replaced_meanwhile_is_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    commands: dict[str, Callable[[Path, Callable[[str], None]], Any]] = {
        "calibrating": lambda folder, progress: quantize(
            folder, tmp_path / "out", calibration=tmp_path / "texts.txt", samples=2, progress=progress
        ),
        "comparing": lambda folder, progress: relayout(folder, tmp_path / "out", progress=progress),
    }
    for step, command in commands.items():
        folder = shutil.copytree(bundle("text-classification"), tmp_path / step)
        other = edited(folder, tmp_path / f"{step}-new", config=rename_labels)

        def progress(name: str, step: str = step, folder: Path = folder, other: Path = other) -> None:
            if name.startswith(step):
                replace(folder, other)

        with pytest.raises(ArtifactError, match=f"{step} was replaced or changed while it was read; run it again"):
            command(folder, progress)
        assert not (tmp_path / "out").exists()


def test_a_model_of_triton_is_of_one_bundle(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bundle("text-classification"), tmp_path / "a")
    other = edited(folder, tmp_path / "b", config=rename_labels)
    copy = repository.copy

    def copy_meanwhile(source: Path, target: Path) -> None:
        if other.exists():
            replace(folder, other)
        copy(source, target)

    monkeypatch.setattr(repository, "copy", copy_meanwhile)
    with pytest.raises(ArtifactError, match="was replaced or changed while it was read"):
        repository.write_model(folder, tmp_path / "models", repository.Settings())


def test_an_error_of_a_bundle_that_is_replaced_names_the_cause(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle("text-classification"), tmp_path / "a")
    manifest = Manifest.read(folder)
    with pytest.raises(ArtifactError, match="was replaced or changed while it was read"), unchanged(folder, manifest):
        replace(folder, edited(folder, tmp_path / "b", config=rename_labels))
        check_bundle(folder, manifest)
    with pytest.raises(ValueError, match="another"), unchanged(folder, Manifest.read(folder)):
        raise ValueError("another")
