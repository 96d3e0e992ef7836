"""Atomic writes: no partial files, no links followed, and leftovers of killed processes are removed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lfx import files
from lfx.errors import ExportError, LfxError
from lfx.files import (
    exchange,
    is_disk_full,
    is_mount_point,
    is_same,
    locked,
    move_folder,
    open_journal,
    private_folder,
    replacing,
    temporary_folder,
    try_lock,
)
from lfx.runtime.documents.journal import Journal


def test_a_target_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(ValueError, match="no"), replacing(target) as path:
        path.write_text("half")
        raise ValueError("no")
    assert target.read_text() == "old"
    with replacing(target) as path:
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "out.txt").symlink_to("precious")
    with replacing(tmp_path / "out.txt") as path:
        path.write_text("new")
    assert (tmp_path / "precious").read_text() == "years of work"
    assert not (tmp_path / "out.txt").is_symlink()


def test_a_name_of_the_maximum_length_is_written(tmp_path: Path) -> None:
    with replacing(tmp_path / ("x" * 255)) as path:
        path.write_text("new")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out.txt") as path:
            path.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) == 0o640


def _replace_killed_at(step: int, target: Path) -> None:
    calls = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"):
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with replacing(target) as path:
        path.write_text("new")
        (path.parent / "second").write_text("more")


def test_the_next_write_removes_the_leftovers_of_a_kill_at_any_step(tmp_path: Path) -> None:
    for step in range(1, 100):
        child = os.fork()
        if child == 0:
            try:
                _replace_killed_at(step, tmp_path / "out.txt")
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with replacing(tmp_path / "out.txt") as path:
            path.write_text("next")
        assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
        if status == 0:
            assert step > 8
            return
        assert status == -signal.SIGKILL
    raise AssertionError("no write completed")


def test_an_interrupt_at_any_step_before_the_block_leaves_no_folder(tmp_path: Path) -> None:
    for step in range(1, 100):
        lines = itertools.count(1)

        def interrupt(frame: FrameType, event: str, argument: Any, lines: Any = lines, step: int = step) -> Any:
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line" and next(lines) == step:
                raise KeyboardInterrupt
            return interrupt

        with contextlib.suppress(KeyboardInterrupt):
            sys.settrace(interrupt)
            with private_folder(tmp_path, "out"):
                sys.settrace(None)
                assert step > 8
                return
        sys.settrace(None)
        assert list(tmp_path.iterdir()) == []
    raise AssertionError("no block began")


def test_a_leftover_is_removed_while_its_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may be alive, and about to lock it."""
    leftover, remove, held = tmp_path / f"{files._hidden_name('out')}-x", files.shutil.rmtree, []
    leftover.mkdir()
    (leftover / "lock").touch()

    def check(path: Path, **options: Any) -> None:
        if path == leftover:
            with (path / "lock").open() as lock:
                held.append(not try_lock(lock.fileno()))
        remove(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", check)
    with private_folder(tmp_path, "out"):
        assert not leftover.exists()
    assert held == [True]


def test_folders_of_live_processes_and_of_other_targets_stay(tmp_path: Path) -> None:
    with private_folder(tmp_path, "out") as live, private_folder(tmp_path, "other") as other:
        with private_folder(tmp_path, "out") as second:
            assert len({live, other, second}) == 3
            assert stat.S_IMODE(second.stat().st_mode) == 0o700
        assert live.is_dir()
        assert other.is_dir()
        assert not second.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the list of open files")
def test_no_file_is_removed_while_it_is_open_where_the_system_refuses_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows. The folder of a write and the journal of a run are removed all the same."""
    unlink = os.unlink

    def refusing(path: str | Path, *, dir_fd: int | None = None) -> None:
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if descriptor.readlink().name == Path(path).name:
                    raise PermissionError(errno.EACCES, "it is open", str(path))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(files, "_CAN_REMOVE_OPEN_FILES", False)
    monkeypatch.setattr(os, "unlink", refusing)
    target = tmp_path / "target"
    with locked(target), replacing(target) as temporary:
        temporary.write_bytes(b"new")
    with Journal(tmp_path / "rows.jsonl", {"journal": 1}, 10) as journal:
        journal.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"target"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the list of open files")
def test_nothing_is_left_where_an_open_file_is_only_renamed_when_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS and FUSE, which keep such a file until it is closed."""
    unlink = os.unlink

    def renaming(path: str | Path, *, dir_fd: int | None = None) -> None:
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if descriptor.readlink().name == Path(path).name:
                    os.rename(path, f"{path}.hidden", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                    return
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", renaming)
    for text in ("new", "newer"):
        with replacing(tmp_path / "target") as temporary:
            temporary.write_text(text)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_one_holder_at_a_time_has_the_lock_of_a_target(tmp_path: Path) -> None:
    inside, seen = [0], []

    def hold() -> None:
        for _ in range(50):
            with locked(tmp_path / "out"):
                inside[0] += 1
                seen.append(inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 200
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        name = next(tmp_path.iterdir()).name
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / name).symlink_to("precious")
    with pytest.raises(OSError), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_journal_that_is_a_hard_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    os.link(tmp_path / "precious", tmp_path / "journal")
    with pytest.raises(OSError, match="it is a link, or no plain file"):
        open_journal(tmp_path / "journal")


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange_swaps_the_names_of_two_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "nothing")


def test_a_full_disk_is_recognized_in_errors_of_libraries() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ExportError("the quantizer failed")
    wrapped.__cause__ = full
    assert all(map(is_disk_full, (full, wrapped, OSError(errno.EDQUOT, "quota"), Exception(f"{full.strerror} (28)"))))
    assert not any(map(is_disk_full, (OSError(errno.EACCES, "no"), ValueError("no"))))


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ENOSPC])
def test_a_temporary_folder_that_cannot_be_made_is_an_error_naming_tmpdir(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(LfxError, match=r"cannot be written: .*set TMPDIR to a folder with room"), temporary_folder("x"):
        pass


def test_a_missing_folder_for_temporary_files_is_an_error_naming_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(LfxError, match=r"nowhere cannot be written: No such file.*set TMPDIR"), temporary_folder("x"):
        pass


def test_a_lock_is_made_anew_where_a_removed_one_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on SSHFS, after another process has removed it."""
    missing, opened = [True, True], os.open

    def open_(path: Path, *arguments: int) -> int:
        if missing:
            missing.pop()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", open_)
    with locked(tmp_path / "a"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), locked(tmp_path / "no such folder" / "a"):
        pass


def test_a_lock_that_is_never_released_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.files._LOCK_TRIES", 2)
    target = tmp_path / "out"
    with locked(target), pytest.raises(OSError, match="another process holds its lock"), locked(target):
        pass


def test_small_files_are_copied_and_large_ones_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"abc")
    files.link_or_copy(source, tmp_path / "copy")
    assert source.stat().st_nlink == 1
    monkeypatch.setattr(files, "_COPIED_BYTES", 2)
    files.link_or_copy(source, tmp_path / "link")
    assert (tmp_path / "link").samefile(source)
    assert (tmp_path / "copy").read_bytes() == b"abc"


def test_a_file_is_the_same_through_links_and_mounts(tmp_path: Path, mount: Callable[..., None]) -> None:
    for name in ("folder", "mounted"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "a").touch()
    (tmp_path / "folder" / "b").symlink_to("a")
    assert is_same(tmp_path / "folder" / "a", tmp_path / "folder" / "b")
    assert is_same(tmp_path / "new", tmp_path / "folder" / ".." / "new")
    assert not is_same(tmp_path / "folder" / "a", tmp_path / "new")
    mount("--bind", tmp_path / "folder", tmp_path / "mounted")
    assert is_same(tmp_path / "folder" / "a", tmp_path / "mounted" / "a")
    assert is_same(tmp_path / "folder", tmp_path / "mounted")
    assert not is_same(tmp_path / "folder", tmp_path / "mounted" / "a")


def test_a_file_that_is_mounted_in_the_root_folder_is_a_mount_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker run -v "$PWD/out.jsonl:/out.jsonl"` has it."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"36 35 0:9 /a /out.jsonl rw - ext4 /dev/root rw\n")
    assert not is_mount_point(Path("/out.jsonl"))  # hidden by another mount
    monkeypatch.setattr(os.path, "lexists", lambda path: True)
    assert is_mount_point(Path("/out.jsonl"))
    assert not is_mount_point(Path("/other.jsonl"))


def test_a_copied_folder_that_cannot_be_removed_whole_keeps_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where a folder inside it is another user's."""
    source, private, rename = tmp_path / "source", tmp_path / "private", Path.rename
    source.mkdir()
    private.mkdir()
    (source / "file").write_text("text")

    def refuse(path: Path, target: Path) -> Path:
        if path == source:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    def remove(path: Path) -> None:
        (path / "file").unlink()
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(files.shutil, "rmtree", remove)
    with pytest.raises(OSError, match=r"Permission denied, so a part of it was removed; the whole of it is in .*lfx-k"):
        move_folder(source, private / "old")
    (kept,) = tmp_path.glob("lfx-kept-*")
    assert (kept / "file").read_text() == "text"
