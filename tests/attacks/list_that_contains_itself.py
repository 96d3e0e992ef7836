"""Ids that are a list that contains itself, or a string, whose items are strings again without end."""

from __future__ import annotations

from collections import UserString
from pathlib import Path

from lfx.runtime import Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """A list that contains itself; a UserString; a range too long to be copied."""
    circle: list[object] = []
    circle.append(circle)
    with Engine(make_bundle(folder / "bundle")) as engine:
        refused(engine.run, UserString("ids"))
        refused(engine.run, range(2 * 10**9))
        return refused(engine.run, circle)
