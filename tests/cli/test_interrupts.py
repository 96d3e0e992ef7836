"""A signal interrupts an export, which says so and leaves nothing half-written."""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lfx.manifest import MANIFEST, Manifest
from tests.cli.commands import ENVIRONMENT, Done, Forked, run
from tests.marks import fast_if

# A signal, the step of the export in which it is sent, and the longest wait after the step began, in seconds (of CPU
# time, except while torch is being imported).
INTERRUPTS = [
    (signal.SIGINT, "importing torch", 1.0),
    (signal.SIGTERM, "tracing", 0.8),
    (signal.SIGINT, "writing", 0.05),
    (signal.SIGTERM, "comparing: batch", 0.05),  # over an older bundle
]
STEPS = [f"{number.name} {step}" for number, step, _ in INTERRUPTS]


@dataclass(frozen=True)
class Interrupted:
    """The outcome of an interrupted export, and its folder."""

    done: Done
    folder: Path


def _interrupt(
    forked: Forked, model: Path, folder: Path, number: signal.Signals, step: str, wait_s: float
) -> Interrupted:
    """Interrupt an export; the one that is interrupted while it imports torch has a process of its own."""
    seconds = float(np.random.default_rng().uniform(1e-3, wait_s))
    arguments = ["export", "--model", str(model), "--output", "bundle"]
    if step == "importing torch":
        # Started as by the installed script. Under `python -m`, CPython itself exits with 130 if the interrupt passed
        # through exec() of source text, which torch calls while tracing, even if the interrupt was caught.
        command = [sys.executable, "-c", "from lfx.cli import main; main()", *arguments]
        with subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            seen = ""
            for line in process.stderr:
                seen += line
                if step in line:
                    break
            time.sleep(seconds)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=120)
        return Interrupted(Done(process.returncode, stdout, seen + stderr), folder)
    return Interrupted(forked.run(arguments, folder, (step, number, seconds)), folder)


@pytest.fixture(scope="module")
def interrupted(workspace: Path, reviews: Path, forked: Forked) -> Callable[[str], Interrupted]:
    """interrupted(name) -> an interrupted export into an empty folder; the last one replaces an older bundle."""
    model = workspace / "checkpoints" / "tiny-reviews"

    @functools.cache
    def outcome(name: str) -> Interrupted:
        folder = workspace / name
        folder.mkdir()
        if name == STEPS[-1]:
            shutil.copytree(reviews, folder / "bundle")
        return _interrupt(forked, model, folder, *INTERRUPTS[STEPS.index(name)])

    return outcome


in_a_copy = fast_if(lambda name: "importing torch" not in name)  # see _interrupt


@in_a_copy
@pytest.mark.parametrize("name", STEPS)
def test_an_interrupted_export_says_so_and_exits_1(name: str, interrupted: Callable[[str], Interrupted]) -> None:
    done = interrupted(name).done
    assert done.error() == "error: interrupted; nothing half-written was left"
    assert done.stdout == ""


@in_a_copy
@pytest.mark.parametrize("name", STEPS[:-1])
def test_an_interrupted_export_leaves_nothing(name: str, interrupted: Callable[[str], Interrupted]) -> None:
    assert list(interrupted(name).folder.iterdir()) == []


def test_an_interrupted_export_keeps_the_older_bundle(interrupted: Callable[[str], Interrupted], reviews: Path) -> None:
    folder = interrupted(STEPS[-1]).folder
    assert [path.name for path in folder.iterdir()] == ["bundle"]
    assert (folder / "bundle" / MANIFEST).read_text() == (reviews / MANIFEST).read_text()
    Manifest.read(folder / "bundle").verify(folder / "bundle")


SWALLOWED = """
import os, pathlib, sys, time, types

class Garbage:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0.05)  # the handler runs here, where Python ignores what it raises

def export(model, output, *, progress, **options):
    progress("tracing")
    Garbage()
    for _ in range(20):
        time.sleep(0.1)
    progress("writing")
    pathlib.Path(output).mkdir()
    return pathlib.Path(output)

sys.modules["lfx.export"] = types.ModuleType("lfx.export")
sys.modules["lfx.export"].export = export
sys.argv = ["lfx", "export", "--model", "x", "--output", "bundle"]
from lfx.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_in_a_finalizer_still_stops_the_export(number: signal.Signals, tmp_path: Path) -> None:
    code = SWALLOWED.format(number=int(number))
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.error() == "error: interrupted; nothing half-written was left"
    assert list(tmp_path.iterdir()) == []


CHANGED = """
import os, sys, time, types

def export(model, output, *, progress, **options):
    try:
        os.kill(os.getpid(), {number})
        time.sleep(5)
    except KeyboardInterrupt:
        raise RecursionError("partially imported module")

sys.modules["lfx.export"] = types.ModuleType("lfx.export")
sys.modules["lfx.export"].export = export
sys.argv = ["lfx", "export", "--model", "x", "--output", "bundle"]
from lfx.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_turns_into_another_error_is_still_an_interrupt(
    number: signal.Signals, tmp_path: Path
) -> None:
    # Seen while torch was being imported: the command ended with "RecursionError ... please report it".
    done = run([sys.executable, "-c", CHANGED.format(number=int(number))], tmp_path)
    assert done.error() == "error: interrupted; nothing half-written was left"
    assert list(tmp_path.iterdir()) == []
