"""Every file of a bundle in every broken form: the bundle is refused in one line, or its results are the same.

Enumerated are the files of a classifier's bundle and of an LED's, and the forms of `BROKEN` and `SAME`. Each bundle is
opened and run with its tokenizer, verified, and written into a model repository; nothing in or around it may change.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import LfxError
from lfx.runtime import Engine, verify
from lfx.runtime.tokenizer import Tokenizer
from lfx.runtime.triton.repository import Settings, write_model
from tests.conftest import MakeBundle, MakeLed

OUTSIDE = "outside"  # a folder beside the bundle
_TIMEOUT_S = 60  # of one call, which takes milliseconds


def _flip(position: float) -> Callable[[Path], Any]:
    """A change of one bit, in the byte at a fraction of the file."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return change


def _replaced(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: (path.unlink(), make(path))


def _moved(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\0"),
    "sparse": lambda path: os.truncate(path, 1 << 40),
    "first byte": _flip(0),
    "middle byte": _flip(0.5),
    "last byte but one": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"!" + path.read_bytes()[-1:]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "random": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "other JSON": lambda path: path.write_text("[1]"),
    "folder": _replaced(Path.mkdir),
    "pipe": _replaced(os.mkfifo),
    "socket": _replaced(lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))),
    "link to a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "link to /proc": _replaced(lambda path: path.symlink_to("/proc/self/environ")),
    "link to nothing": _replaced(lambda path: path.symlink_to("/nowhere")),
    "link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "link to a folder": _replaced(lambda path: path.symlink_to(path.parent.parent / OUTSIDE)),
    "another case": lambda path: path.rename(path.with_name(path.name.swapcase())),
}
SAME: dict[str, Callable[[Path], Any]] = {
    "link to a file outside": lambda path: _moved(path, path.parent.parent / OUTSIDE / path.name),
    "link to a hidden file": lambda path: _moved(path, path.with_name(f".{path.name}")),
    "second hard link": lambda path: os.link(path, path.parent.parent / OUTSIDE / path.name),
}


def _run(bundle: Path, _: Path) -> Any:
    with Engine(bundle, threads=1) as engine:
        ids = Tokenizer(bundle, engine.signature).encode("the fox").ids
        return {name: array.tolist() for name, array in engine.run(ids).items()}


CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "run": _run,
    "verify": lambda bundle, _: sorted(verify(bundle).files),
    "triton": lambda bundle, output: write_model(bundle, output, Settings()).folder.name,
}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Let a call that waits for ever fail."""

    def fail(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, fail)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _called(call: str, bundle: Path, output: Path) -> Any:
    """What a call gives, or the type of error that it raises."""
    signal.alarm(_TIMEOUT_S)
    try:
        return CALLS[call](bundle, output)
    except LfxError as error:
        assert "\n" not in str(error)
        return LfxError
    except BaseException as error:
        return repr(error)


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> type, size and time of everything in a folder."""
    status = {str(path): path.lstat() for path in folder.rglob("*")}
    return {
        name: (s.st_mode, s.st_size, s.st_mtime_ns, s.st_nlink)
        for name, s in status.items()
        if not stat.S_ISDIR(s.st_mode)
    }


@pytest.mark.parametrize("model", ["classifier", "led"])
def test_a_broken_file_is_refused_and_a_link_is_followed(
    model: str, bundle: MakeBundle, led_bundle: MakeLed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bundle("text-classification") if model == "classifier" else led_bundle()[1]
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 108 letters
    (tmp_path / "good").mkdir()
    expected = {call: _called(call, source, tmp_path / "good") for call in CALLS}
    failures = []
    for name in sorted(path.name for path in source.iterdir()):
        for form, change in {**BROKEN, **SAME}.items():
            around = tmp_path / "around"
            (around / OUTSIDE).mkdir(parents=True)
            copy = Path(shutil.copytree(source, around / source.name))
            change(copy / name)
            before = _state(around)
            for call in CALLS:
                output = tmp_path / "output"
                output.mkdir()
                result = _called(call, copy, output)
                if result != (expected[call] if form in SAME else LfxError):
                    failures.append((name, form, call, result))
                if _state(around) != before or (form in BROKEN and any(output.iterdir())):
                    failures.append((name, form, call, "something was written"))
                shutil.rmtree(output)
            shutil.rmtree(around)
    assert failures == []
