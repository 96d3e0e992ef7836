"""Starts the process that runs TensorRT's builder, and reads its messages."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lfx.errors import BuildError, one_line


def run_tensorrt(
    job: dict[str, Any], scratch: Path, progress: Callable[[str], None], log: Callable[[str], None]
) -> dict[str, Any]:
    """Run `trt_process` on a job.

    Args:
        job: see `builder._job`.
        scratch: a temporary folder, for the job file.
        progress: called with the name of each step.
        log: called with each warning and error of TensorRT.
    Returns:
        {"tensorrt_version", "network_layers", "plugin_layers"}.
    Raises:
        BuildError: TensorRT built no engine.
        OSError: the disk is full.
    """
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # -P keeps the current folder off sys.path, so that modules come from the installation.
    command = [sys.executable, "-P", "-m", "lfx.runtime.build.trt_process", str(scratch / "job.json")]
    errors: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # the child ends when this pipe is closed, also if this process is killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_environment(job, scratch),
    ) as process:
        try:
            assert process.stdout is not None
            result = _read_messages(process.stdout, errors, progress, log)
        except BaseException:
            process.kill()
            raise
        if result is not None:
            return result
    errors.append(f"it ended with exit status {process.returncode}")
    reason = next((error for error in errors if error.startswith("lfx::")), errors[0])
    raise BuildError(f"TensorRT built no engine: {one_line(Exception(reason), 600)}")


def _environment(job: dict[str, Any], scratch: Path) -> dict[str, str]:
    """The environment of the child process, in which TensorRT-RTX finds its library."""
    environment = dict(os.environ)
    if job["module"] == "tensorrt_rtx":
        libraries = _named_library(scratch)
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [libraries, environment.get("LD_LIBRARY_PATH")]))
    return environment


def _read_messages(
    lines: Iterable[str], errors: list[str], progress: Callable[[str], None], log: Callable[[str], None]
) -> dict[str, Any] | None:
    """Read the child's output up to its result, and append its errors to `errors`; None if there is no result.

    Raises:
        OSError: the child's disk is full.
    """
    for text in lines:
        message = _parse(text)
        if message is None:
            log(text.rstrip())  # a library printed it
            if text.startswith("lfx::"):
                errors.append(text.rstrip())
        elif "result" in message:
            return dict(message["result"])
        elif "step" in message:
            progress(message["step"])
        elif "error" in message:
            if message.get("disk_full"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            errors.append(message["error"])
        else:
            log(f"TensorRT {message['severity']}: {message['log']}")
            if message["severity"] in ("error", "internal_error"):
                errors.append(message["log"])
    return None


def _parse(text: str) -> dict[str, Any] | None:
    """Parse a message of `trt_process`; None if a library printed the line."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    messages = ({"result"}, {"step"}, {"error"}, {"error", "disk_full"}, {"log", "severity"})
    return line if isinstance(line, dict) and set(line) in messages else None


def _named_library(scratch: Path) -> str:
    """Make a folder with a link libtensorrt_rtx.so to the wheel's library, which has a versioned name only."""
    spec = find_spec("tensorrt_rtx_libs")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for library in sorted(Path(folder).glob("libtensorrt_rtx.so*")):
            (scratch / "lib").mkdir(exist_ok=True)
            (scratch / "lib" / "libtensorrt_rtx.so").symlink_to(library)
            return str(scratch / "lib")
    return ""
