"""Bundles are written atomically, with other processes running, and wherever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import ArtifactError, ExportError
from lfx.export import bundle as bundles
from lfx.export import export, exporter
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.manifest import MANIFEST, MODEL, Manifest
from lfx.signature import Signature, TensorSpec
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import tiny_model

IDS = (TensorSpec("input_ids", "int64", ("batch", "sequence")),)
SIGNATURE = Signature("LongformerModel", "feature-extraction", "fp32", IDS, (TensorSpec("out", "float32", ()),), (8,))


def _write(folder: Path, text: str = "new") -> None:
    """Write a bundle of three files, whose graph is `text`."""
    (folder / MODEL).write_text(text)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "vocab.txt").write_text(text)
    Manifest(SIGNATURE, 17, {}, {}).write(folder)


def _export(output: Path, text: str = "new") -> None:
    with atomic_folder(output) as folder:
        _write(folder, text)


def _text(output: Path) -> str:
    """Return the graph of a bundle, and check that it is complete."""
    Manifest.read(output).verify(output)
    assert (output / "sub" / "vocab.txt").read_text() == (output / MODEL).read_text()
    return (output / MODEL).read_text()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a child process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def _ended(child: int) -> int:
    """Wait for a process; returns its exit status, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(params=["exchange", "two renames", "a copy"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the system call that exchanges two paths, without it, and where a folder cannot be renamed."""
    if request.param != "exchange":
        monkeypatch.setattr(bundles, "exchange", lambda first, second: False)
    if request.param == "a copy":
        rename = Path.rename

        def refusing(path: Path, target: Path) -> Path:
            if path.name == "out":  # as overlayfs does for a folder of a container's image
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", refusing)
    return str(request.param)


def test_a_complete_folder_is_renamed_to_the_output(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        assert not (tmp_path / "out").exists()
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        raise error
    assert _names(tmp_path) == []


def test_an_older_bundle_is_replaced_on_success_and_kept_on_failure(tmp_path: Path, either_way: str) -> None:
    _export(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        raise ValueError("no")
    assert _text(tmp_path / "out") == "old"
    _export(tmp_path / "out", "new")
    assert _text(tmp_path / "out") == "new"
    assert _names(tmp_path) == ["out"]


def test_an_empty_folder_is_replaced(tmp_path: Path, either_way: str) -> None:
    (tmp_path / "out").mkdir()
    _export(tmp_path / "out")
    assert _names(tmp_path) == ["out"]


def test_a_path_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("too")
    for name in ("folder", "file"):
        with pytest.raises(ExportError, match="exists and is no bundle"), atomic_folder(tmp_path / name):
            pass
    with pytest.raises(ExportError, match="does not exist"), atomic_folder(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("stranger", ["checkpoint/model.safetensors", "notes.txt", "link"])
def test_a_bundle_with_other_files_in_it_is_never_replaced(tmp_path: Path, stranger: str) -> None:
    _export(tmp_path / "out")
    (tmp_path / "out" / stranger).parent.mkdir(exist_ok=True)
    if stranger == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out" / stranger).symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "out" / stranger).write_text("weights")
    with pytest.raises(ExportError, match=rf"holds other files too \({stranger}\)"):
        _export(tmp_path / "out")
    assert os.path.lexists(tmp_path / "out" / stranger)


@pytest.mark.parametrize("text", ['{"files": {"thesis.txt": {}}}', "{", "[]", ""])
def test_files_that_a_manifest_without_a_valid_seal_names_are_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(text)
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ExportError, match=r"holds an lfx\.json that was changed .*; remove the folder, or choose another"
    ):
        _export(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_signature_beside_the_manifest_is_removed_with_its_bundle(tmp_path: Path, either_way: str) -> None:
    _export(tmp_path / "out", "old")
    (tmp_path / "out" / f"{MANIFEST}.minisig").write_text("signed")
    _export(tmp_path / "out")
    assert _names(tmp_path / "out") == [MANIFEST, MODEL, "sub"]


def test_links_in_an_older_bundle_are_removed_and_their_targets_stay(tmp_path: Path, either_way: str) -> None:
    _export(tmp_path / "out", "old")
    shutil.move(tmp_path / "out" / MODEL, tmp_path / "stored")
    shutil.move(tmp_path / "out" / "sub" / "vocab.txt", tmp_path / "vocabulary")
    (tmp_path / "out" / MODEL).symlink_to(tmp_path / "stored")
    (tmp_path / "out" / "sub" / "vocab.txt").symlink_to(tmp_path / "vocabulary")
    _export(tmp_path / "out")
    assert _text(tmp_path / "out") == "new"
    assert [(tmp_path / name).read_text() for name in ("stored", "vocabulary")] == ["old", "old"]
    assert _names(tmp_path) == ["out", "stored", "vocabulary"]


def test_a_bundle_whose_manifest_is_a_relative_link_is_refused_before_the_work(tmp_path: Path) -> None:
    _export(tmp_path / "out", "old")
    (tmp_path / "out" / MANIFEST).rename(tmp_path / "stored")
    (tmp_path / "out" / MANIFEST).symlink_to("../stored")
    with pytest.raises(ExportError, match=r"holds an lfx\.json that is a relative link, as of git-annex"):
        check_target(tmp_path / "out")
    assert _text(tmp_path / "out") == "old"


def test_a_file_added_to_the_older_bundle_during_the_export_is_kept(tmp_path: Path, either_way: str) -> None:
    _export(tmp_path / "out", "old")
    with (
        pytest.raises(ExportError, match=r"holds other files too \(thesis.txt\)"),
        atomic_folder(tmp_path / "out") as new,
    ):
        _write(new)
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert _text(tmp_path / "out") == "old"
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert _names(tmp_path) == ["out"]


def test_a_manifest_in_a_folder_of_the_older_bundle_is_the_user_s(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    _export(tmp_path / "private" / "old", "old")
    (tmp_path / "private" / "old" / "folder").mkdir()
    (tmp_path / "private" / "old" / "folder" / "lfx.json").write_text("years of work")
    kept = bundles._discard(tmp_path / "private" / "old")
    assert kept is not None and (kept / "folder" / "lfx.json").read_text() == "years of work"


# A folder that was copied is no more: who has it open cannot add a file.
@pytest.mark.parametrize("either_way", ["exchange", "two renames"], indirect=True)
def test_a_file_added_to_the_older_bundle_after_the_rename_is_kept(
    tmp_path: Path, either_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _export(tmp_path / "out", "old")
    folder = os.open(tmp_path / "out", os.O_RDONLY)
    discard = bundles._discard

    def late(bundle: Path) -> Path | None:
        os.close(os.open("thesis.txt", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        return discard(bundle)

    monkeypatch.setattr(bundles, "_discard", late)
    with pytest.raises(
        ExportError, match=r"is the new bundle; the older one could not be removed whole, .* is in .*lfx-kept"
    ):
        _export(tmp_path / "out")
    os.close(folder)
    assert _text(tmp_path / "out") == "new"
    kept = next(tmp_path.glob("lfx-kept-*"))
    assert "thesis.txt" in _names(kept)
    assert _names(tmp_path) == [kept.name, "out"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, either_way: str) -> None:
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("dangling", "later")):
        (tmp_path / name).symlink_to(target)
        _export(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert _text(tmp_path / target) == "new"
    assert _names(tmp_path) == ["dangling", "later", "link", "real"]


def test_the_current_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), tmp_path / "here"):
        with pytest.raises(ExportError, match="is the current folder or above it; name a folder inside it"):
            atomic_folder(output).__enter__()
    assert Path.cwd().is_dir()


def _export_killed_at(step: int, output: Path) -> None:
    """Export, and kill the process before the system call number `step` that changes or opens a file."""
    calls = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"):
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    _export(output)


def _steps(output: Path, before: Callable[[], None]) -> Iterator[int]:
    """Kill an export at each step, until one completes."""
    for step in range(1, 200):
        before()
        status = _ended(_in_child(lambda step=step: _export_killed_at(step, output)))
        yield step
        if status == 0:
            assert step > 20
            return
        assert status == -signal.SIGKILL
    raise AssertionError("no export completed")


@pytest.mark.slow
@fast_if(lambda case: case == "exchange")
def test_a_kill_at_any_step_leaves_a_whole_bundle_and_the_next_export_clears_up(
    tmp_path: Path, either_way: str
) -> None:
    out = tmp_path / "out"
    seen = set()
    for _ in _steps(out, lambda: _export(out, "old")):
        if either_way == "exchange" or out.exists():
            # While a copied bundle is removed, the rest of it is refused; the next export restores it.
            with contextlib.suppress(*([ArtifactError] if either_way == "a copy" else [])):
                seen.add(_text(out))
        with pytest.raises(ValueError, match="no"), atomic_folder(out):
            raise ValueError("no")
        assert _text(out) in ("old", "new")  # an older bundle that was renamed is restored
        _export(out)
        assert _names(tmp_path) == ["out"]
    assert seen == {"old", "new"}


@pytest.mark.slow
def test_a_kill_of_the_first_export_leaves_nothing_or_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in _steps(out, lambda: shutil.rmtree(out, ignore_errors=True)):
        assert not out.exists() or _text(out) == "new"
        _export(out)
        assert _names(tmp_path) == ["out"]


def test_concurrent_exports_of_processes_with_equal_ids_leave_one_whole_bundle(
    tmp_path: Path, bundle: MakeBundle, either_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # two containers have the same process ids
    models = [bundle("feature-extraction"), bundle("text-classification")]

    def export_often(model: Path) -> None:
        for _ in range(15):
            with atomic_folder(tmp_path / "out") as folder:
                shutil.copytree(model, folder, dirs_exist_ok=True)

    children = [_in_child(lambda model=model: export_often(model)) for model in models * 2]
    assert [_ended(child) for child in children] == [0] * len(children)
    manifest = Manifest.read(tmp_path / "out")
    manifest.verify(tmp_path / "out")
    assert manifest.to_dict() in [Manifest.read(model).to_dict() for model in models]
    assert set(_names(tmp_path / "out")) == {MANIFEST, *manifest.files}
    assert _names(tmp_path) == ["out"]


def test_a_live_export_is_left_alone_by_another(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as first:
        _write(first, "first")
        _export(tmp_path / "out", "second")
        assert _text(tmp_path / "out") == "second"
    assert _text(tmp_path / "out") == "first"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("x" * 300, "File name too long"),
        ("a/" * 2500, "File name too long"),
        ("a\0b", "null"),
        (5, "output is 5; give a path"),
    ],
)
def test_an_impossible_path_is_an_error_of_one_line(output: Any, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        export(tiny_model(), output)


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(ExportError, match="out is a mount point, which cannot be replaced; name a folder inside it"):
        check_target(tmp_path / "out")


def test_a_link_to_itself_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    # From Python 3.13 on, such a link is a path like others for Path.resolve.
    message = r"out cannot be written: .*loop" if sys.version_info < (3, 13) else "out exists and is no bundle"
    with pytest.raises(ExportError, match=message):
        export(tiny_model(), tmp_path / "out")


def test_a_bind_mount_is_refused_before_the_work(bind_mount: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "an out").mkdir()
    bind_mount(tmp_path / "an out")
    with pytest.raises(ExportError, match="an out is a mount point, which cannot be replaced"):
        check_target(tmp_path / "an out")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_bundle_of_another_user_is_refused_before_the_work() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are private
        shared = Path(folder)
        shared.chmod(0o777)
        _export(shared / "out", "old")
        os.seteuid(65534)
        try:
            with pytest.raises(ExportError, match="out cannot be written: Permission denied; choose another"):
                check_target(shared / "out")
        finally:
            os.seteuid(0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_folders_that_may_not_be_read_or_written_are_errors_of_one_line() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        closed = Path(name) / "closed"
        closed.mkdir(mode=0o700)
        os.seteuid(65534)
        try:
            for output in (Path(name) / "out", closed / "out"):
                with pytest.raises(ExportError, match=r"Permission denied; (choose|give) another"):
                    _export(output)
        finally:
            os.seteuid(0)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            _write(folder)
            (folder / MODEL).chmod(0o600)
    finally:
        os.umask(before)
    modes = {
        path.name: stat.filemode(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    }
    assert modes.pop("out") == modes.pop("sub") == "drwxr-x---"
    assert set(modes.values()) == {"-rw-r-----"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_modes_is_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with atomic_folder(tmp_path / "out") as folder:
        _write(folder)
        (folder / MODEL).chmod(0o600)
        monkeypatch.setattr(Path, "chmod", refuse)
    assert _text(tmp_path / "out") == "new"


@pytest.mark.parametrize("name", [".nfs000001", ".fuse_hidden000001"])
def test_a_file_that_another_process_has_open_does_not_fail_the_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS and FUSE such a file is renamed, and not removed, until it is closed."""
    _export(tmp_path / "out", "old")
    unlink = Path.unlink

    def renaming(path: Path, missing_ok: bool = False) -> None:
        if path.name == MODEL:
            path.rename(path.with_name(name))
        else:
            unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", renaming)
    _export(tmp_path / "out", "new")
    assert _text(tmp_path / "out") == "new"
    assert _names(tmp_path) == ["out"]


def test_a_bundle_of_a_container_s_image_is_replaced(overlay: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    _export(tmp_path / "image" / "out", "old")
    container = overlay(tmp_path / "image")
    _export(container / "out", "new")
    assert (_text(container / "out"), _names(container)) == ("new", ["out"])


def test_a_disk_too_small_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match="no disk space: the bundle takes about 2 MB"):
        export(tiny_model(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_file_system_that_does_not_say_its_size_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 0, "free": 0})
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "out", 1000)


class RustError(Exception):
    """Raise an error as a tokenizer does: the system's error is in its text only."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RustError("No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_fills_up_is_an_error_of_one_line(tmp_path: Path, error: Exception) -> None:
    full = "out cannot be written: no disk space left; make room, or choose another --output"
    with pytest.raises(ExportError, match=full), atomic_folder(tmp_path / "out") as folder:
        (folder / MODEL).write_bytes(b"half")
        raise error
    assert _names(tmp_path) == []


def test_an_export_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter.ir, "save", full)
    with pytest.raises(ExportError, match="no disk space left"):
        export(tiny_model(), tmp_path / "out")
    assert _names(tmp_path) == []


def test_an_error_caused_by_a_full_disk_is_reported_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no disk space left"), atomic_folder(tmp_path / "out"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ExportError("the quantizer failed") from error
