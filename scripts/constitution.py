"""The documents of the demo: the articles of the Constitution and The Federalist, No. 10, and questions about them."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DOCUMENT = EXAMPLES / "constitution.txt"
FEDERALIST = "The Federalist, No. 10"
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
# Questions that the essay answers; it is one document of some 3,500 tokens.
FEDERALIST_QUESTIONS = {
    "Why is a large republic safer from factions than a small one?": FEDERALIST,
    "What causes factions, and how can their effects be controlled?": FEDERALIST,
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


def essay() -> str:
    """Return the whole text of The Federalist, No. 10."""
    return (EXAMPLES / "federalist_10.txt").read_text(encoding="utf-8")
