"""Steps of a benchmark in a process of their own, whose peak memory is that of the step alone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def run_child(module: str, *flags: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark's module as a program, and return the JSON in the last line that it prints.

    Args:
        flags: arguments that are passed unchanged.
        options: name -> value, passed as --name=value.
    """
    command = [sys.executable, "-m", f"scripts.bench.{module}", *flags]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
