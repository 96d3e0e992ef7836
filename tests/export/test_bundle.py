"""A bundle is there whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import ExportError
from lfx.export import bundle as bundles
from lfx.export import export, exporter
from lfx.export.bundle import atomic_folder
from tests.models import tiny_model


def _write(folder: Path, text: str = "new") -> None:
    (folder / "lfx.json").write_text(text)


def test_success_takes_the_name(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_older_bundle_is_replaced_on_success_and_kept_on_failure(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        _write(folder, "old")
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        raise ValueError("no")
    assert (tmp_path / "out" / "lfx.json").read_text() == "old"
    with atomic_folder(tmp_path / "out") as folder:
        _write(folder)
    assert (tmp_path / "out" / "lfx.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("too")
    for name in ("folder", "file"):
        with pytest.raises(ExportError, match="exists and is no bundle"), atomic_folder(tmp_path / name):
            pass
    with pytest.raises(ExportError, match="does not exist"), atomic_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"


def test_a_bundle_with_other_files_in_it_is_never_replaced(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        _write(folder, '{"files": {"model.onnx": {}}}')
        (folder / "model.onnx").write_text("graph")
    (tmp_path / "out" / "checkpoint").mkdir()
    (tmp_path / "out" / "checkpoint" / "model.safetensors").write_text("weights")
    with pytest.raises(ExportError, match=r"holds other files too \(checkpoint/model\.safetensors\)"):
        atomic_folder(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").read_text() == "weights"


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("dangling", "later")):
        (tmp_path / name).symlink_to(target)
        with atomic_folder(tmp_path / name) as folder:
            _write(folder)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "lfx.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "later", "link", "real"]


def test_the_current_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), tmp_path / "here"):
        with pytest.raises(ExportError, match="is the current folder or above it; name a folder inside it"):
            atomic_folder(output).__enter__()
    assert Path.cwd().is_dir()


def test_a_leftover_of_this_very_process_number_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".a[1].partial-{os.getpid()}").mkdir()
    with atomic_folder(tmp_path / "a[1]") as folder:
        _write(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a[1]"]


def test_leftovers_of_killed_processes_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".out.partial-{dead.pid}").mkdir()
    (tmp_path / ".out.partial-1").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        _write(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-1", "out"]


def test_a_bundle_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".out.old-{dead.pid}").mkdir()
    _write(tmp_path / f".out.old-{dead.pid}", "old")
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "out"):
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "lfx.json").read_text() == "old"


def test_a_disk_too_small_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match="no disk space: the bundle takes about 2 MB"):
        export(tiny_model(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        (tmp_path / f".out.partial-{os.getpid()}" / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter.ir, "save", full)
    with pytest.raises(ExportError, match="no disk space left"):
        export(tiny_model(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == []
