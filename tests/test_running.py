"""The .npz file of `lfx run --output`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.errors import InputError
from lfx.running import _save
from tests.conftest import SmallDisk


def test_every_output_is_in_the_file_whatever_its_name(tmp_path: Path) -> None:
    names = ["logits", "file", "allow_pickle", "args", "x" * 300, "a/b"]
    arrays: dict[str, Any] = {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}
    _save(tmp_path / "out", arrays)
    with np.load(tmp_path / "out") as found:
        assert sorted(found.files) == sorted(names)
        assert all(np.array_equal(found[name], arrays[name]) for name in names)
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
