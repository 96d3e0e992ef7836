"""Every option and argument of every command with wrong and odd values: each is accepted, or refused with an LfxError.

The list is click's own tree of commands, so a new option is tried too. A call stops before it computes or loads a
checkpoint. A call that fails leaves no new file, and none changes an input.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from lfx.cli import cli
from lfx.cli.options import FilePath
from lfx.errors import LfxError
from lfx.runtime import Engine
from tests.conftest import MakeBundle
from tests.models import save_tiny_checkpoint

CALLS = {  # of each command, arguments that it accepts
    "convert": ["--model", "checkpoint", "--output", "new"],
    "export": ["--model", "checkpoint", "--output", "new"],
    "quantize": ["bundle", "--calibration", "in.jsonl", "--output", "new"],
    "build-engine": ["bundle", "--output", "new.plan", "--target", "sm89"],
    "run": ["bundle", "--text", "the fox", "--output", "new"],
    "map": ["in.jsonl", "new", "--model", "bundle"],
    "explain": ["bundle", "--text", "the fox", "--output", "new"],
    "serve": ["bundle", "--port", "0"],
    "triton": ["bundle", "--output", "new"],
    "inspect": ["bundle"],
    "verify": ["bundle"],
    "parity": ["bundle", "--source", "checkpoint"],
    "push": ["bundle", "org/name"],
    "bench": ["bundle", "--length", "8", "--output", "new"],
}
TEXTS = ["", " ", "-", "--", "=", "a=b", "0", "nan", "\udcff", "a\0b", "[b]x[/b]", "\x1b[31m\n", "x" * 5000]
NUMBERS = ["-1", "1", "1.5", "1e400", "1,2", "1:2:3", "\uff11\uff12", str(2**64), "9" * 5000]
PATHS = ["", " ", "--", "\udcff", "a\0b", "[b]x[/b]", "\x1b[31m\n", "x" * 5000, "n" * 300, "missing", "missing/x"]
PATHS += ["bundle", "bundle/model.onnx", "checkpoint", "folder", "file", "file/x", "in.jsonl", "broken", "loop"]
PATHS += ["empty", "empty.onnx", "empty.plan", "empty.jsonl", "pipe", "pipe.plan", "pipe.jsonl", "/dev/null", "/", "."]
# Parameters that are paths or names, by command.
FREE_PATHS = {("export", "model"), ("convert", "model"), ("parity", "source"), ("bench", "source"), ("verify", "key")}
FREE_PATHS |= {("map", "source"), ("serve", "models")}


class StopError(LfxError):
    """Ends a command before it computes."""


def stop(*arguments: Any, **options: Any) -> None:
    raise StopError


@contextlib.contextmanager
def stopping_progress() -> Iterator[Callable[[str], None]]:
    """Ends a command at its first step, but for the import of torch, which comes before the options are checked."""
    yield lambda step: None if step == "importing torch" else stop()


@pytest.fixture(scope="module")
def folder(bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with all inputs."""
    folder = tmp_path_factory.mktemp("options")
    save_tiny_checkpoint(folder / "checkpoint", "text-classification")
    shutil.copytree(bundle("text-classification"), folder / "bundle")
    (folder / "in.jsonl").write_text('{"text": "the fox"}\n')
    (folder / "file").write_text("the fox")
    (folder / "folder").mkdir()
    for name in ("empty", "empty.onnx", "empty.plan", "empty.jsonl"):
        (folder / name).touch()
    for name in ("pipe", "pipe.plan", "pipe.jsonl"):
        os.mkfifo(folder / name)
    (folder / "broken").symlink_to("missing")
    (folder / "loop").symlink_to("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(Engine, "run", stop)
        patch.setattr("lfx.runtime.plugin.library", lambda: folder / "file")  # there may be none
        patch.setattr("lfx.ray.job.connected", stop)
        patch.setattr("lfx.runtime.serve.server.serve", stop)
        patch.setattr("lfx.runtime.serve.supervisor.supervise", stop)
        for command in ("bench", "build_engine", "convert", "explain", "export", "parity", "push", "quantize", "run"):
            patch.setattr(f"lfx.cli.{command}.progress", stopping_progress)
        yield folder


def values(command: str, parameter: click.Parameter) -> list[str]:
    """The values that are tried for an option or an argument."""
    if isinstance(parameter.type, FilePath) or (command, parameter.name) in FREE_PATHS:
        pipes = {"pipe", "pipe.plan"} if parameter.name == "file" else set()  # a text may come from a pipe
        return [path for path in PATHS if path not in pipes]
    return TEXTS if isinstance(parameter.type, click.Choice) else [*TEXTS, *NUMBERS]


def with_value(command: str, parameter: click.Parameter, value: str) -> list[str]:
    """The arguments of a command, with this value of an option or an argument."""
    names = [p for p in cli.commands[command].params if isinstance(p, click.Argument)]
    count = min(len(names), sum(1 for _ in itertools.takewhile(lambda text: text[0] != "-", CALLS[command])))
    plain, options = CALLS[command][:count], CALLS[command][count:]
    given = dict(zip(options[::2], options[1::2], strict=True))
    if isinstance(parameter, click.Argument):
        plain[names.index(parameter)] = value
    else:
        if parameter.opts[0] == "--input":
            given.pop("--text")
        given[parameter.opts[0]] = value
    return [command, *itertools.chain(*given.items()), "--", *plain]


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_the_calls_are_accepted(command: str, folder: Path) -> None:
    with contextlib.suppress(StopError):
        cli.main([command, *CALLS[command]], standalone_mode=False)
    shutil.rmtree(folder / "new", ignore_errors=True)


def run(arguments: list[str]) -> str | None:
    """Run a command; returns "" if it is refused with a usage error or an LfxError, and what another error says."""
    try:
        cli.main(arguments, standalone_mode=False)
    except (click.UsageError, LfxError):
        return ""
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


def files(folder: Path) -> dict[Path, int]:
    """The paths in a folder, with the time of the last change of those that are no folders."""
    folders = {path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()}
    return {path: 0 if path in folders else path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_a_wrong_value_is_refused_with_an_lfx_error(command: str, folder: Path) -> None:
    failures, before = [], files(folder)
    for parameter in cli.commands[command].params:
        if isinstance(parameter, click.Option) and parameter.is_flag:
            continue
        for value in values(command, parameter):
            arguments = with_value(command, parameter, value)
            if failure := run(arguments):
                failures.append(f"{arguments}: {failure}")
            after = files(folder)
            if failure is None:  # it may have written its output
                for path in sorted(after.keys() - before.keys(), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                    del after[path]
            if after != before:
                failures.append(f"{arguments}: changed {dict(set(after.items()) ^ set(before.items()))}")
                before = after
    assert failures == []
