"""Every threat is refused in one line, and no file outside its folder changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.attacks import NAMES, run


@pytest.mark.parametrize("name", NAMES)
def test_is_refused(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    around = tmp_path / "around"
    folder = around / "folder"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    refusal = run(name, folder)
    assert refusal
    assert [path.name for path in around.iterdir()] == ["folder"]


def test_every_attack_is_documented() -> None:
    for name in NAMES:
        text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert text.startswith('"""'), f"{name}.py does not begin with what is attacked"
