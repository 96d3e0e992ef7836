"""Runs commands in processes of their own, or in copies of one that has imported torch, which takes its seconds.

A copy has its own working folder, streams and signals, and ends with the exit status of the command. What the import
itself writes to the streams is tested with commands in processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# All models of these tests are folders, so nothing is looked up on the hub.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
_SERVER = """
import gc, json, os, signal, sys
import lfx.cli, lfx.cli.terminal, lfx.export, lfx.export.validate, lfx.runtime, onnxruntime
import torch._dynamo, torch.onnx._internal.exporter._core, tqdm

tqdm.tqdm.get_lock()  # a semaphore of this process; Python 3.14 warns of one that a copy makes, and leaves by os._exit
gc.freeze()  # a copy does not search the objects of torch for garbage
for line in sys.stdin:
    job = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(job["folder"])
for number, path in enumerate(job["streams"]):
    os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
sys.argv = ["lfx", *job["arguments"]]
echo = lfx.cli.terminal.echo

def echo_and_start_the_timer(text, **options):
    echo(text, **options)
    step, number, seconds = job["interrupt"]
    if step in text:
        lfx.cli.terminal.echo = echo
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_PROF, seconds)

if job["interrupt"] is not None:
    lfx.cli.terminal.echo = echo_and_start_the_timer
try:
    lfx.cli.main()
except SystemExit as end:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(end.code)  # without the end of Python, which takes seconds with all objects of torch
"""


@dataclass(frozen=True)
class Done:
    """The exit status of a command, less than 0 for a signal, and what it has written."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Parse stdout as JSON, after exit status 0."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    def error(self) -> str:
        """Return the one-line error, after exit status 1."""
        assert self.code == 1, self.stderr
        assert "Traceback" not in self.stderr
        lines = self.stderr.splitlines()
        (error,) = [line for line in lines if line.startswith("error:")]
        assert lines[-1] == error
        assert "please report" not in error  # only an unexpected error asks for a report
        return error


def run(command: list[str], cwd: Path | None = None) -> Done:
    """Run a command in a process of its own."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def lfx(*arguments: str | Path, cwd: Path | None = None) -> Done:
    """Run a command of lfx in a process of its own."""
    return run([sys.executable, "-m", "lfx.cli", *map(str, arguments)], cwd)


class Forked:
    """Runs commands of lfx in copies of a process that has imported torch, one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def run(
        self, arguments: Sequence[str | Path], folder: Path, interrupt: tuple[str, int, float] | None = None
    ) -> Done:
        """Run a command in a folder.

        Args:
            interrupt: a step of its progress, a signal that the command gets in it, and after how many seconds of its
                CPU time.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as temporary:
            paths = [Path(temporary, name) for name in ("stdout", "stderr")]
            for path in paths:
                path.touch()
            streams = [os.devnull, *map(str, paths)]
            words = [str(argument) for argument in arguments]
            job = {"arguments": words, "folder": str(folder), "streams": streams, "interrupt": interrupt}
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            stdout, stderr = (path.read_text(encoding="utf-8") for path in paths)
        return Done(code, stdout, stderr)

    def close(self) -> None:
        """End the process."""
        self._server.communicate()


@contextlib.contextmanager
def forked_commands() -> Iterator[Forked]:
    """A process for commands."""
    opened = Forked()
    try:
        yield opened
    finally:
        opened.close()
