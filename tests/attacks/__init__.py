"""Threats as programs: each file is named for what lfx refuses, and its `attack(folder)` returns the refusal.

An attack builds its threat inside `folder`, tries it through lfx's own functions, and raises AssertionError if it
succeeds. `python -m tests.attacks` runs them all, `python -m tests.attacks NAME` one.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import shutil
import tempfile
from pathlib import Path

from lfx.errors import LfxError
from lfx.export import export
from tests.models import tiny_model, tiny_tokenizer

NAMES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if path.stem[:5] not in ("__ini", "__mai", "test_")
)


def run(name: str, folder: Path) -> str:
    """Run one attack in an empty folder.

    Returns:
        lfx's one-line refusal.
    Raises:
        AssertionError: the attack succeeded.
    """
    refusal = importlib.import_module(f"tests.attacks.{name}").attack(folder)
    assert isinstance(refusal, str), f"{name} was not refused"
    return refusal


def make_bundle(folder: Path, task: str = "feature-extraction") -> Path:
    """A bundle of a tiny random model in a new folder, to spoil."""
    return shutil.copytree(_bundle(task), folder)


@functools.cache
def _bundle(task: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export(tiny_model(task), folder / "bundle", tokenizer=tiny_tokenizer())


def refused(function: object, *arguments: object, **options: object) -> str:
    """Call a function that must raise an error of lfx's own; returns its message."""
    assert callable(function)
    try:
        function(*arguments, **options)
    except LfxError as error:
        message = str(error)
        assert message and "\n" not in message, message
        return message
    raise AssertionError(f"{getattr(function, '__name__', function)} did not refuse it")
