"""What commands print: no markup, no control characters, in any locale, to streams that are full or closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx.cli import cli
from lfx.errors import BuildError
from lfx.manifest import WEIGHTS, Manifest
from tests.cli.commands import ENVIRONMENT, Forked, lfx, run
from tests.marks import fast_if

NAMES = {"0": "[u]ax", "1": "[/b]\x1b[31m\u202e"}
NAMES_SHOWN = ("[u]ax", r"[/b]\x1b[31m\u202e")


def _rename_labels(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": NAMES}))
    Manifest.read(folder).write(folder)


def test_labels_and_paths_are_printed_without_markup_and_control_characters(copy: Path, tmp_path: Path) -> None:
    _rename_labels(copy)
    (tmp_path / "[b]\x1b[7m.jsonl").write_text("5\n")
    plain = lfx("run", copy, "--text", "the fox")
    documents = lfx("run", copy, "--input", "[b]\x1b[7m.jsonl", "--output", "[u]\x1b[7m.jsonl", cwd=tmp_path)
    assert all(name in plain.stdout for name in NAMES_SHOWN)
    assert r"[u]\x1b[7m.jsonl: 1 documents" in documents.stdout
    assert r"[b]\x1b[7m.jsonl:1: " in documents.stderr
    assert r"[u]\x1b[7m.jsonl says which" in documents.error()
    assert not {"\x1b", "\u202e"} & set(plain.stdout + documents.stdout + documents.stderr)


def test_log_lines_of_tensorrt_are_printed_without_markup_and_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Any, log: Callable[[str], None], **options: Any) -> Path:
        log("TensorRT warning: [/b]\x1b[2J")
        raise BuildError("no engine")

    monkeypatch.setattr("lfx.runtime.build.build_engine", build)
    with pytest.raises(BuildError):
        cli.main(["build-engine", "x"], standalone_mode=False)
    assert capsys.readouterr().err == "TensorRT warning: [/b]\\x1b[2J\n"


def test_json_has_null_where_a_model_gives_nan(copy: Path) -> None:
    np.full((copy / WEIGHTS).stat().st_size // 4, np.nan, dtype=np.float32).tofile(copy / WEIGHTS)
    Manifest.read(copy).write(copy)
    done = lfx("run", copy, "--text", "fox", "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout, parse_constant=pytest.fail)
    assert result["outputs"]["logits"]["values"] == [[None, None]]


@pytest.mark.parametrize(
    "arguments", [["\x1b[31m"], ["inspect", "--\x1b[31m"], ["inspect", "a", "b\x1b[31m\nerror: c"]]
)
def test_wrong_usage_shows_control_characters_as_escapes(arguments: list[str], forked: Forked, tmp_path: Path) -> None:
    done = forked.run(arguments, tmp_path)
    assert done.code == 2
    assert r"\x1b[31m" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\nerror:" not in done.stderr


LOCALES = (
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


@fast_if(lambda locale: locale["LC_ALL"] == "POSIX")
@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: " ".join(locale.values()))
def test_names_that_the_locale_cannot_encode_are_printed(locale: dict[str, str], copy: Path) -> None:
    _rename_labels(copy)
    folder = os.fsencode(copy)
    odd = folder + b"\xff"
    Path(os.fsdecode(odd)).symlink_to(copy)
    for arguments, code, shown in (
        ([b"run", folder, b"--text", b"fox"], 0, rb"[/b]\x1b[31m\u202e"),
        ([b"verify", odd], 0, rb"copy\udcff: "),
        ([b"inspect", b"nowhere\xff\x1b"], 1, rb"error: nowhere\udcff\x1b does not exist"),
        ([b"inspect", folder, b"\xff\x1b"], 2, rb"unexpected extra argument (\udcff\x1b)"),
    ):
        command = [sys.executable.encode(), b"-m", b"lfx.cli", *arguments]
        done = subprocess.run(command, capture_output=True, env={**ENVIRONMENT, **locale}, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False)
        assert shown in done.stdout + done.stderr


FULL, CLOSED = (">/dev/full", "No space left on device"), (">&-", "stdout cannot be written: it is closed")


@fast_if(lambda arguments: "--json" in arguments)
@pytest.mark.parametrize(
    ("arguments", "stream", "message"),
    [
        ("--help", *FULL),
        *(
            (arguments, *how)
            for arguments in ("inspect {}", "inspect {} --json", "verify {}")
            for how in (FULL, CLOSED)
        ),
    ],
)
def test_a_result_that_stdout_does_not_take_is_an_error_of_one_line(
    arguments: str, stream: str, message: str, reviews: Path
) -> None:
    command = [sys.executable, "-m", "lfx.cli", *arguments.format(reviews).split()]
    done = run(["sh", "-c", f'exec "$@" {stream}', "sh", *command])
    assert message in done.error()
    assert len(done.stderr.splitlines()) == 1


def test_no_file_gets_the_descriptor_of_a_closed_stream(reviews: Path, tmp_path: Path) -> None:
    """Otherwise the output of a library would be written into the file."""
    code = f"""
import os, sys
from lfx.cli import main
sys.argv = ["lfx", "inspect", {str(tmp_path)!r}]
try:
    main()
except SystemExit as end:
    file = open({str(tmp_path / "numbers")!r}, "w")
    print(file.fileno(), end.code, file=file)
"""
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], check=False)
    number, exit_code = map(int, (tmp_path / "numbers").read_text().split())
    assert number > 2
    assert exit_code == 1


def test_a_closed_stderr_changes_nothing(reviews: Path) -> None:
    command = [sys.executable, "-m", "lfx.cli", "inspect", str(reviews), "--json"]
    done = run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command])
    assert done.json()["task"] == "text-classification"
