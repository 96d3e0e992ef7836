"""`lfx run` prints valid JSON, writes files atomically, and reports an invalid path in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfx.cli.run import _save, run_text
from lfx.errors import ArtifactError, InputError
from lfx.manifest import MANIFEST, sha256
from lfx.runtime import Engine
from lfx.runtime.documents import encoded
from lfx.runtime.text_files import text_folder
from tests.cli.commands import lfx
from tests.conftest import MakeBundle, SmallDisk


def test_every_output_is_in_the_file_whatever_its_name(tmp_path: Path) -> None:
    names = ["logits", "file", "allow_pickle", "args", "x" * 300, "a/b"]
    arrays: dict[str, Any] = {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}
    _save(tmp_path / "out", arrays)
    with np.load(tmp_path / "out") as stored:
        assert sorted(stored.files) == sorted(names)
        assert all(np.array_equal(stored[name], arrays[name]) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_what_to_do_and_keeps_the_older_file(small_disk: SmallDisk) -> None:
    folder = small_disk()
    (folder / "out.npz").write_text("old")
    with pytest.raises(
        InputError, match=r"out\.npz cannot be written: no disk space left; make room, or choose another"
    ):
        _save(folder / "out.npz", {"logits": np.ones(100_000, np.float32)})
    assert (folder / "out.npz").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["out.npz"]


def test_nan_and_infinity_become_null_in_json(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("text-classification")
    with Engine(folder, threads=1) as engine:
        monkeypatch.setattr(engine, "run", lambda *_: {"logits": np.float32([[np.nan, np.inf]])})
        run_text(engine, folder, "fox", (), None, None, tokenizer=None, as_json=True)

    def refused(name: str) -> Any:
        raise AssertionError(name)

    printed = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert printed["outputs"]["logits"]["values"] == [[None, None]]


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_an_impossible_path_is_an_input_error(path: str, bundle: MakeBundle) -> None:
    folder = bundle("text-classification")
    with Engine(folder, threads=1) as engine, pytest.raises(InputError, match=r"--input .* cannot be opened"):
        run_text(engine, folder, None, (), Path(path), None, tokenizer=None, as_json=True)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_plan_that_names_an_impossible_bundle_is_an_input_error(name: str, tmp_path: Path) -> None:
    manifest = SimpleNamespace(bundle={"name": name})
    with pytest.raises(InputError, match="the bundle that the plan names"):
        text_folder(tmp_path / "a.plan", manifest)


def test_the_bundle_of_a_plan_is_searched_in_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "elsewhere").mkdir()
    manifest = SimpleNamespace(bundle={"name": "../elsewhere"})
    assert text_folder(tmp_path / "plans" / "a.plan", manifest) == tmp_path / "plans"


def test_a_bundle_that_is_not_the_plans_gives_no_labels(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle("text-classification"), tmp_path / "a")
    manifest = SimpleNamespace(bundle={"name": "a", "sha256": sha256(folder / MANIFEST)})
    assert text_folder(tmp_path / "a.plan", manifest) == folder
    shutil.rmtree(folder)
    shutil.copytree(bundle("token-classification"), folder)
    with pytest.raises(ArtifactError, match=r"a is not the bundle that .*a\.plan was built from"):
        text_folder(tmp_path / "a.plan", manifest)


def test_labels_are_the_models_whatever_tokenizer_is_given(
    bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("text-classification")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y", "2": "z"}}))
    with Engine(folder, threads=1) as engine:
        for tokenizer in (None, other):
            run_text(engine, folder, "fox", (), None, None, tokenizer=tokenizer, as_json=True)
    plain, given = capsys.readouterr().out.splitlines()
    assert plain == given


def test_a_text_without_end_is_refused(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lfx.runtime.tokenizer.MAX_CHARACTERS", 10)
    (tmp_path / "text.txt").write_text("the fox " * 2)
    folder = bundle("text-classification")
    with Engine(folder, threads=1) as engine, pytest.raises(InputError, match=r"more than 10 characters.*\.jsonl file"):
        run_text(engine, folder, None, (), tmp_path / "text.txt", None, tokenizer=None, as_json=True)


def test_a_byte_order_mark_is_no_part_of_the_text(
    bundle: MakeBundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = bundle("text-classification")
    printed = []
    with Engine(folder, threads=1) as engine:
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "text.txt").write_text("the fox", encoding=encoding)
            run_text(engine, folder, None, (), tmp_path / "text.txt", None, tokenizer=None, as_json=True)
            windows = encoded(tmp_path / "text.txt", engine.signature, folder)
            printed.append((capsys.readouterr().out, [window.ids for window in windows]))
    assert printed[0] == printed[1]


@pytest.mark.parametrize(("words", "more"), [(38, ""), (60, "… and 22 more answers; --json prints all")])
def test_a_table_of_the_first_answers_says_how_many_there_are(
    words: int, more: str, bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle("token-classification")
    with Engine(path, threads=1) as engine:
        run_text(engine, path, "fox " * words, (), None, None, tokenizer=None, as_json=False)
    out = capsys.readouterr().out
    assert out.count("fox") == min(words, 39)
    assert out.splitlines()[-1] == more if more else "more" not in out


def test_a_choice_is_made_beside_attention_outputs(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = bundle("multiple-choice", opset=21, inline_functions=True, output_attentions=True)
    choices = ("--pair", "fox", "--pair", "the lazy dog jumps")
    arrays = tmp_path / "arrays.npz"
    result = lfx("run", folder, "--text", "the quick", *choices, "--output", arrays, "--json").json()
    (logits,) = result["outputs"]["logits"]["values"]
    assert [answer["choice"] for answer in result["answers"]] == sorted((0, 1), key=lambda i: -logits[i])
    with np.load(arrays) as saved:
        assert {saved[name].shape[0] for name in saved.files if "attentions" in name} == {2}
