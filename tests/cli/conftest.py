"""Fixtures for the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.forked import Commands, commands


@pytest.fixture(scope="session")
def forked() -> Iterator[Commands]:
    """Commands in copies of a process that has imported torch."""
    with commands() as opened:
        yield opened
