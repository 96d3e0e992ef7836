"""The page at /: used in headless Chromium at the widths of a desktop and a phone."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lfx.runtime.serve.app import PAGE
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.serve.running import Running, running

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
DOCUMENT = "the lazy dog jumps over the quick brown fox. " * 6 + "\n\nthe fox is quick\n\n" + "brown " * 40 + "x" * 200
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> the fox"


def chromium() -> str:
    """The path of a Chromium. CI installs one, so on Linux a missing one is a failure."""
    found = os.environ.get("LFX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and sys.platform == "linux":
        pytest.fail("no Chromium was found: apt-get install chromium, or name one in LFX_CHROMIUM")
    if found is None:
        pytest.skip("no Chromium was found; name one in LFX_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The tests may run as root, for whom Chromium's sandbox does not work.
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser, server: Running) -> Iterator[Page]:
    """The page, open. Afterwards: no outside request, no error on the console, no horizontal scroll."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    opened = context.new_page()
    asked: list[str] = []
    problems: list[str] = []
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: problems.append(dialog.message))
    opened.goto(server.address)
    opened.wait_for_selector("#model option", state="attached")
    yield opened
    assert all(url.startswith((server.address, "data:")) for url in asked), asked
    expected = getattr(opened, "expected_problems", 0)
    assert len(problems) == expected, problems
    assert opened.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    if folder := os.environ.get("LFX_SCREENSHOTS"):
        name = re.sub(r"\W+", "-", request.node.name)
        opened.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    context.close()


def use(page: Page, model: str, text: str, **fields: str) -> str:
    """Fill in the form, run, and return the text of the answers."""
    page.select_option("#model", model)
    page.fill("#text", text)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.check("#truncate")
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")
    assert page.is_hidden("#error"), page.inner_text("#error")
    facts = page.inner_text("#facts")
    assert re.search(r"Latency\s+[\d,]+ ms", facts)
    assert re.search(r"Tokens\s+[\d,]+", facts)
    return page.inner_text("#answers")


@pytest.mark.slow
def test_labels_are_shown(page: Page) -> None:
    answers = use(page, "cls", MARKUP)
    assert re.search(r"LABEL_[01]\s+0\.\d{4}", answers)
    assert page.locator("#answers .bar").count() == 2


@pytest.mark.slow
def test_an_answer_is_highlighted_in_the_document(page: Page) -> None:
    answers = use(page, "qa", f"\U0001f98a {MARKUP} {DOCUMENT[:90]}", question="the quick fox")
    marked = page.inner_text("#answers mark")
    assert marked
    assert marked in answers.splitlines()[0]
    assert MARKUP in answers
    assert page.locator("#answers img, #answers script").count() == 0


@pytest.mark.slow
def test_similar_passages_are_ranked(page: Page) -> None:
    use(page, "emb", DOCUMENT + "\n\n" + MARKUP, question="the fox is quick")
    assert page.locator(".passage").count() == 4
    assert "similarity 1.0000" in page.inner_text(".passage >> nth=0")
    assert "the fox is quick" in page.inner_text(".passage >> nth=0")
    assert page.locator(".passage img").count() == 0


@pytest.mark.slow
def test_labels_of_tokens_choices_and_outputs_are_shown(page: Page) -> None:
    use(page, "ner", "the quick brown fox")
    assert page.locator(".token").count() >= 4
    answers = use(page, "choice", "the fox", choices="jumps\n\nsleeps " + "y" * 100)
    assert "jumps" in answers
    assert page.locator("#answers .bar").count() == 2
    assert "pooler_output: 32 numbers" in use(page, "org/bare", "the fox")


@pytest.mark.slow
def test_a_refusal_is_shown(page: Page) -> None:
    page.fill("#text", "fox " * 500)
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert "502 tokens, above the model's maximum 128" in page.inner_text("#error")
    page.expected_problems = 1  # type: ignore[attr-defined]  # Chromium's line on the console for status 413


@pytest.mark.slow
def test_a_key_is_asked_for(browser: Browser, bundle: MakeBundle) -> None:
    with running({"cls": bundle("text-classification")}, api_key="sesame") as server:
        page = browser.new_page()
        page.goto(server.address)
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        assert "LABEL_" in use(page, "cls", "the fox")
        page.close()


@pytest.mark.slow
def test_a_text_is_written_as_its_tokens_come(browser: Browser, led_bundle: MakeLed) -> None:
    with running({"org/led": led_bundle()[1]}) as server:
        page = browser.new_page()
        page.goto(server.address)
        page.wait_for_selector("#model option", state="attached")
        with server.client() as client:
            body = {"inputs": MARKUP, "parameters": {"num_beams": 1}}
            expected = client.post("/generate", json=body).json()["generated_text"]
        assert use(page, "org/led", MARKUP).split() == expected.split()
        assert re.search(r"New tokens\s+\d+", page.inner_text("#facts"))
        assert page.locator("#answers img, #answers script").count() == 0
        page.close()


def test_the_page_is_one_file_that_may_load_nothing_else(server: Running) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://", text)
    assert "innerHTML" not in text
    with server.client() as client:
        reply: Any = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
