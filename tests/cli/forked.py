"""Commands in copies of a process that has imported torch, which takes longer than most commands do.

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
from collections.abc import Iterator
from pathlib import Path

# All models of these tests are folders, so nothing is looked up on the hub.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
_SERVER = """
import json, os, sys
import lfx.cli, lfx.export, lfx.export.validate, lfx.runtime, onnxruntime
import torch._dynamo, torch.onnx._internal.exporter._core

for line in sys.stdin:
    job = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(job["folder"])
for number, path in enumerate(job["streams"]):
    os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
sys.argv = ["lfx", *job["arguments"]]
lfx.cli.main()
"""


class Commands:
    """Starts commands, one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def start(self, arguments: list[str], folder: Path, stdout: Path, stderr: Path) -> int:
        """Start a command in a folder, with its streams in files; return the id of its process."""
        assert self._server.stdin is not None
        streams = [os.devnull, str(stdout), str(stderr)]
        self._server.stdin.write(json.dumps({"arguments": arguments, "folder": str(folder), "streams": streams}) + "\n")
        self._server.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """Wait for the end of the command; return its exit status, or less than 0 for a signal."""
        return self._number()

    def run(self, arguments: list[str], folder: Path) -> tuple[int, str, str]:
        """Run a command in a folder; return its exit status and what it has written."""
        with tempfile.TemporaryDirectory() as temporary:
            stdout, stderr = Path(temporary, "stdout"), Path(temporary, "stderr")
            stdout.touch()
            stderr.touch()
            self.start(arguments, folder, stdout, stderr)
            code = self.wait()
            return code, stdout.read_text(encoding="utf-8"), stderr.read_text(encoding="utf-8")

    def _number(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._server.communicate()


@contextlib.contextmanager
def commands() -> Iterator[Commands]:
    """A process for commands."""
    opened = Commands()
    try:
        yield opened
    finally:
        opened.close()
