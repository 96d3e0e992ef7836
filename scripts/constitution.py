"""The articles of examples/constitution.txt, and questions that one of them answers."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "examples" / "constitution.txt"
# Question -> the article that answers it.
QUESTIONS = {
    "How can the Constitution be amended?": "Article V",
    "What is treason?": "Article III, Section 3",
    "May the government establish a religion or limit free speech?": "Amendment I",
    "Is it allowed to keep and bear arms?": "Amendment II",
    "May soldiers be quartered in a private house?": "Amendment III",
    "What protects citizens from unreasonable searches?": "Amendment IV",
    "Is cruel punishment allowed?": "Amendment VIII",
    "When was slavery abolished?": "Amendment XIII",
    "May Congress collect an income tax?": "Amendment XVI",
    "When was alcohol prohibited?": "Amendment XVIII",
    "Do women have the right to vote?": "Amendment XIX",
    "How many terms may a President serve?": "Amendment XXII",
    "Can eighteen year olds vote?": "Amendment XXVI",
}


def articles() -> dict[str, str]:
    """Return the text of each section of an article, of each article without sections, and of each amendment."""
    found: dict[str, list[str]] = {}
    article = name = ""
    for line in filter(None, map(str.strip, DOCUMENT.read_text(encoding="utf-8").splitlines())):
        if heading := re.fullmatch(r"(ARTICLE|Amendment) ([IVX]+)", line):
            article = name = f"{heading[1].capitalize()} {heading[2]}"
        elif (heading := re.fullmatch(r"Section (\d+)\.", line)) and article.startswith("Article"):
            name = f"{article}, Section {heading[1]}"
        elif name:
            found.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}
