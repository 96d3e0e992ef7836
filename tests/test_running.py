"""What `lfx run` prints is JSON, and a path that no system has is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError
from lfx.running import _text_folder, run_text
from lfx.runtime import Engine
from tests.conftest import MakeBundle


def test_the_json_of_outputs_that_are_no_numbers_is_json(
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
def test_a_path_that_no_system_has_is_an_input_error(path: str, bundle: MakeBundle) -> None:
    folder = bundle("text-classification")
    with Engine(folder, threads=1) as engine, pytest.raises(InputError, match=r"--input .* cannot be opened"):
        run_text(engine, folder, None, (), Path(path), None, tokenizer=None, as_json=True)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_plan_that_names_no_possible_bundle_is_an_input_error(name: str, tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(manifest=SimpleNamespace(bundle={"name": name}))
    with pytest.raises(InputError, match="the bundle that the plan names"):
        _text_folder(tmp_path / "a.plan", engine)


def test_the_bundle_of_a_plan_is_looked_for_beside_it_alone(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "elsewhere").mkdir()
    engine: Any = SimpleNamespace(manifest=SimpleNamespace(bundle={"name": "../elsewhere"}))
    assert _text_folder(tmp_path / "plans" / "a.plan", engine) == tmp_path / "plans"
