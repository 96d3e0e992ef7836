"""The pages agree with the code and with the records."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lfx.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_table_agrees_with_the_records() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for name, command in cli.commands.items():
        assert f"`lfx {name}`" in text
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert option in text, f"lfx {name} {option}"


def test_the_page_of_commands_has_all_choices_of_an_option() -> None:
    text = (ROOT / "docs" / "commands.md").read_text().replace("\\|", "|")
    for name, command in cli.commands.items():
        (row,) = re.findall(rf"^\| `lfx {name}` \|.*$", text, re.MULTILINE)
        for parameter in command.params:
            shown = re.search(rf"`{parameter.opts[0]} ([^`]+\|[^`]+)`", row)
            if shown and isinstance(parameter.type, click.Choice):
                assert set(shown[1].split("|")) == set(parameter.type.choices), f"lfx {name} {parameter.opts[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_shows_the_two_commands_and_the_peers_first() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:45])
    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert "optimum-onnx" in first_screen


def test_the_page_of_what_works_names_tests_that_exist() -> None:
    """In a row of docs/forms.md, a name in snake case is a test of one of the files that the row links to."""
    page = ROOT / "docs" / "forms.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ") and "../tests/" in line]
    assert len(rows) > 20
    for row in rows:
        files = re.findall(r"\]\((\.\./tests/[^)]+)\)", row)
        text = "".join((page.parent / file).read_text() for file in files)
        for name in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){2,})`", row.rpartition(" | ")[2]):
            assert f"def test_{name}(" in text, name
