"""Usage errors: invalid paths and numbers, and contradicting options, are refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from lfx.cli import cli
from lfx.errors import InputError, LfxError

PATHS = {  # each path option and argument, with a command that has it
    "MODEL (a bundle or a plan)": ["inspect", "{}"],
    "MODEL": ["run", "{}", "--text", "a"],
    "BUNDLE": ["quantize", "{}", "--calibration", "x"],
    "--calibration": ["quantize", "x", "--calibration", "{}"],
    "--tokenizer": ["run", "x", "--text", "a", "--tokenizer", "{}"],
    "--input": ["run", "x", "--input", "{}"],
    "--signature": ["verify", "x", "--key", "y", "--signature", "{}"],
}
FILES = {
    "--output": ["run", "x", "--text", "a", "--output", "{}"],
    "--report": ["parity", "x", "--report", "{}"],
    "--plot": ["bench", "x", "--plot", "{}"],
    "--timing-cache": ["build-engine", "x", "--timing-cache", "{}"],
}
FOLDERS = {"--output": ["export", "--model", "x", "--output", "{}"]}


def lfx(arguments: list[str], value: str = "") -> None:
    """Run the command in this process."""
    cli.main([argument.format(value) for argument in arguments], standalone_mode=False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, which must still be empty after the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_and_option_has_help(command: str) -> None:
    assert cli.commands[command].help
    for parameter in cli.commands[command].params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


@pytest.mark.parametrize(("name", "arguments"), [*PATHS.items(), *FILES.items(), *FOLDERS.items()])
def test_a_path_that_is_empty_or_too_long_is_refused(name: str, arguments: list[str]) -> None:
    with pytest.raises(click.UsageError, match="it is empty"):
        lfx(arguments)
    with pytest.raises(InputError, match="File name too long; give another path") as error:
        lfx(arguments, "x" * 5000)
    assert str(error.value).startswith(f"{name} ")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("name", "arguments"), [*FILES.items(), *FOLDERS.items()])
@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/dev/stdout", "pipe"])
def test_a_device_or_a_pipe_is_not_replaced(name: str, arguments: list[str], path: str) -> None:
    os.mkfifo("pipe")
    with pytest.raises(InputError, match=f"{name} {path} cannot be written: it is a device or a pipe"):
        lfx(arguments, path)


@pytest.mark.parametrize(("name", "arguments"), FILES.items())
def test_an_output_that_is_a_folder_or_in_a_missing_folder_is_refused_at_once(name: str, arguments: list[str]) -> None:
    Path("there").mkdir()
    with pytest.raises(InputError, match=f"{name} there cannot be written: it is a folder; give the name of a file"):
        lfx(arguments, "there")
    with pytest.raises(InputError, match=f"{name} nowhere/x cannot be written: its folder does not exist"):
        lfx(arguments, "nowhere/x")


@pytest.mark.parametrize(("name", "arguments"), FILES.items())
def test_an_output_that_is_a_mounted_file_is_refused_at_once(
    name: str, arguments: list[str], bind_mount: Callable[[Path], None]
) -> None:
    """As `docker run -v "$PWD/out.jsonl:/data/out.jsonl"` has it."""
    Path("the out\\put").touch()
    bind_mount(Path("the out\\put"))
    with pytest.raises(
        InputError, match=f"{name} .* cannot be written: it is a mount point.*; mount its folder instead"
    ):
        lfx(arguments, "the out\\put")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build-engine", "x", "--fp16", "--bf16"], "--fp16 and --bf16 contradict each other; give one"),
        (["build-engine", "x", "--plugin", "--no-plugin"], "--plugin/--no-plugin is given more than once"),
        (["build-engine", "x", "--output", "a.plan", "--output=b.plan"], "--output is given more than once"),
        (["quantize", "x", "--calibration", "a", "--calibration", "b"], "--calibration is given more than once"),
        (["run", "x", "--text", "a", "--text", "b"], "--text is given more than once"),
        (["run", "x", "--text", "a", "--threads", "1", "--threads", "2"], "--threads is given more than once"),
        (["run", "x", "--input", "a.txt", "--output", "a.txt"], "--output and --input are the same file"),
        (["run", "x", "--input", "a.txt", "--output", "./b/../a.txt"], "--output and --input are the same file"),
        (["run", "x.onnx", "--text", "a", "--output", "x.onnx"], "--output and MODEL are the same file"),
        (["bench", "x", "--output", "y", "--plot", "y"], "--output and --plot are the same file"),
        (
            ["build-engine", "--timing-cache", "a.plan", "--output", "a.plan"],
            "--timing-cache and --output are the same",
        ),
        (["bench", "x", "--source", "y"], "--source is the checkpoint that --against measures"),
        (["verify", "x", "--signature", "y"], "--signature needs --key"),
        (["export", "--model", ""], "it is empty"),
        (["parity", "x", "--source", ""], "it is empty"),
        (["verify", "x", "--key", ""], "it is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict_each_other_are_wrong_usage(arguments: list[str], message: str) -> None:
    Path("b").mkdir()
    with pytest.raises(click.UsageError, match=message):
        lfx(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build-engine", "nowhere", "--fp16", "--fp16", "--json", "--json"],
        ["bench", "nowhere", "--length", "8", "--length", "16", "--batch", "1", "--batch", "2"],
        ["run", "nowhere", "--text", "a", "--pair", "b", "--pair", "c"],
    ],
    ids=" ".join,
)
def test_repeatable_options_may_be_repeated(arguments: list[str]) -> None:
    with pytest.raises(LfxError, match="nowhere"):
        lfx(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "x", "--text", "a", "--threads", "{}"],
        ["run", "x", "--input", "a.jsonl", "--stride", "{}"],
        ["bench", "x", "--length", "{}"],
        ["bench", "x", "--batch", "{}"],
        ["bench", "x", "--rounds", "{}"],
        ["build-engine", "x", "--workspace", "{}"],
        ["export", "--model", "x", "--max-global", "{}"],
        ["convert", "--model", "x", "--output", "y", "--max-seqlen", "{}"],
        ["quantize", "x", "--calibration", "y", "--samples", "{}"],
    ],
    ids=lambda arguments: arguments[-2],
)
def test_a_number_that_no_machine_can_use_is_wrong_usage(arguments: list[str]) -> None:
    for number in (str(10**30), "-1", "0", "1.5", "1e3", "nan", "\u00b2"):
        with pytest.raises(click.BadParameter) as error:
            lfx(arguments, number)
        assert error.value.param is not None
        assert error.value.param.opts[0] == arguments[-2]
