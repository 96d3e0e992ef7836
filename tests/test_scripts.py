"""The programs in scripts/ print their help, and do nothing else then."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PROGRAMS = [path for path in sorted(SCRIPTS.rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
INSTRUMENTED = SCRIPTS / "fuzz_targets.py"  # would import lfx with atheris's instrumentation into this process


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.relative_to(SCRIPTS).as_posix())
def test_help_is_printed_and_nothing_is_written(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if program == INSTRUMENTED:
        done = subprocess.run([sys.executable, str(program), "--help"], capture_output=True, text=True, check=True)
        printed = done.stdout
    else:
        monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
        monkeypatch.setattr(sys, "argv", [str(program), "--help"])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(program), run_name="__main__")
        assert not exit_.value.code
        printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert not list(tmp_path.iterdir())
