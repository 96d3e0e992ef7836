"""`lfx explain`: its page holds what was measured, stays small, and treats the document as text alone."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lfx.cli import cli
from lfx.cli.explain_page import LONGEST, TOP, page
from lfx.errors import ArtifactError, InputError
from lfx.runtime.strongest import Spans, Strongest
from lfx.runtime.tokenizer import TokenText
from tests.conftest import MakeBundle

ATTACKS = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(2)>',
    "{{data}}{{script_hash}}",
    "\u2028&lt;\\u003c</SCRIPT >",
)


def weights(seqlen: int, layers: int, heads: int) -> Strongest:
    """Random weights and spans, which compression gains little on."""
    random = np.random.default_rng(0)

    def spans(top: int, *shape: int) -> Spans:
        shape = (*shape, seqlen, top)
        length = random.integers(1, 9, shape)
        start = np.arange(seqlen)[:, None] + random.integers(-256, 256, shape)  # in the window of longformer-base-4096
        return Spans(np.clip(start, 0, seqlen - 8), length, -np.sort(-random.random(shape, np.float32)))

    def floats() -> Any:
        return random.random((layers, heads, seqlen), np.float32)

    parts = (spans(TOP[0], layers, heads), spans(TOP[1], layers), spans(TOP[2]))
    return Strongest(0, np.array([0]), floats(), floats(), *parts)


def tokens(texts: list[str]) -> list[TokenText]:
    return [TokenText("", "<s>", special=True), *(TokenText(" ", text, special=False) for text in texts)]


class Elements(HTMLParser):
    """The elements of a page: tag and attributes of each, and the content of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        tag = self.elements[-1][0] if self.elements else ""
        self.content.append((tag, data)) if tag in ("script", "style") and data.strip() else None
        self.text += data


def scripts(text: str) -> list[str]:
    return [content for tag, content in Elements(text).content if tag == "script"]


def parts(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The two data scripts of a page: the JSON, and each section of the weights."""
    meta = json.loads(scripts(text)[0])
    data = gzip.decompress(base64.b64decode(scripts(text)[1]))
    sections, offset = {}, 0
    for name, size in meta["sections"]:
        sections[name] = np.frombuffer(data[offset : offset + size], np.uint8)
        offset += size
    assert offset == len(data)
    return meta, sections


def test_a_page_of_4096_tokens_12_layers_and_12_heads_is_below_5_megabytes() -> None:
    text = page("Attention of x", "", tokens(["token"] * 4095), weights(4096, 12, 12), [])
    assert len(text.encode()) < 5_000_000
    meta, sections = parts(text)
    assert len(meta["tokens"]) == 4096
    for name, count in (("model", 12), ("layer", 6), ("head", 1)):  # each head has its strongest span at least
        assert {f"{name}{rank}_weight" for rank in range(count)} <= sections.keys()
    assert len(sections["head0_weight"]) == 4096 * 144


def test_the_page_holds_the_weights_and_spans() -> None:
    source = weights(300, 3, 2)
    meta, sections = parts(page("title", "facts", tokens(["a"] * 299), source, [{"label": "b", "score": 0.25}]))
    assert (meta["layers"], meta["heads"], meta["anchor"], meta["is_global"]) == (3, 2, 0, [0])
    assert meta["tokens"][:2] == [["", "<s>", 1], [" ", "a"]]
    assert meta["answers"] == [["0.250", "b"]]
    for name, expected in (("to_anchor", source.to_anchor), ("of_anchor", source.of_anchor)):
        stored = (sections[name].reshape(3, 2, 300) / 255) ** 2
        np.testing.assert_allclose(stored, expected, atol=0.005)
    for name, spans in (("model", source.model), ("layer", source.layers), ("head", source.heads)):
        for rank in range(spans.start.shape[-1]):
            shape = spans.start.shape[:-1]
            low, high, length, weight = (
                sections[f"{name}{rank}_{part}"].astype(np.int64).reshape(shape)
                for part in ("low", "high", "length", "weight")
            )
            np.testing.assert_array_equal((low + 256 * high + np.arange(300)) % LONGEST, spans.start[..., rank])
            np.testing.assert_array_equal(length, spans.length[..., rank])
            np.testing.assert_allclose((weight / 255) ** 2, spans.weight[..., rank], atol=0.005)


def test_no_text_becomes_markup_or_script() -> None:
    plain = page("title", "facts", tokens(["a", "b"]), weights(9, 1, 1), [])
    answers = [{"label": attack, "score": 0.5} for attack in ATTACKS]
    attacked = page(ATTACKS[0], ATTACKS[1], tokens(list(ATTACKS)), weights(9, 1, 1), answers)
    assert [tag for tag, _ in Elements(attacked).elements] == [tag for tag, _ in Elements(plain).elements]
    assert scripts(attacked)[2:] == scripts(plain)[2:]
    assert len(scripts(attacked)) == 3
    meta, _ = parts(attacked)
    assert [text for _, text, *_ in meta["tokens"][1:]] == list(ATTACKS)
    assert [texts for _, *texts in meta["answers"]] == [[attack] for attack in ATTACKS]
    assert attacked.count("<h1>") == 1
    assert "<h1>&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;</h1>" in attacked


def test_the_policy_allows_the_pages_own_script_alone_and_no_request() -> None:
    text = page("title", "facts", tokens(["a"]), weights(9, 1, 1), [])
    elements = Elements(text)
    (policy,) = [a["content"] for tag, a in elements.elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for tag, content in (("script", scripts(text)[2]), ("style", next(c for t, c in elements.content if t == "style"))):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert not any({"src", "href", "style", "onclick"} & attributes.keys() for _, attributes in elements.elements)
    assert not re.search(r"https?:|innerHTML|\burl\(|@import|fetch\(", text)


def test_a_text_that_is_too_long_for_a_page_is_refused() -> None:
    with pytest.raises(InputError, match=r"the text has 65,537 tokens, above the 65,536 of a page"):
        page("title", "", tokens(["a"] * LONGEST), weights(9, 1, 1), [])


def lfx(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["explain", *map(str, arguments)])


def test_the_command_writes_one_page(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = bundle("text-classification", global_attention="first", output_attentions=True)
    done = lfx(folder, "--text", "the quick\n\nbrown <b>fox</b>", "--output", tmp_path / "x.html", "--json")
    assert done.exit_code == 0, done.exception
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["bytes"] == (tmp_path / "x.html").stat().st_size
    meta, sections = parts((tmp_path / "x.html").read_text())
    assert len(meta["tokens"]) == printed["tokens"]
    assert "".join(before + text for before, text, *_ in meta["tokens"][1:-1]) == "the quick\n\nbrown <b>fox</b>"
    assert meta["tokens"][0] == ["", "<s>", 1]
    assert meta["is_global"] == [0]
    assert {label for _, label in meta["answers"]} == {"LABEL_0", "LABEL_1"}
    to_all = (sections["of_anchor"].reshape(2, 2, -1) / 255.0) ** 2
    np.testing.assert_allclose(to_all.sum(axis=-1), 1.0, atol=0.05)


def test_the_best_choice_and_the_document_of_a_question_are_shown(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = bundle("multiple-choice", opset=21, inline_functions=True, output_attentions=True)
    choices = ("--pair", "fox", "--pair", "the lazy dog jumps")
    done = lfx(folder, "--text", "the quick", *choices, "--output", tmp_path / "x.html")
    assert done.exit_code == 0, done.exception
    meta, _ = parts((tmp_path / "x.html").read_text())
    best = int(meta["answers"][0][1])
    shown = "".join(before + text for before, text, *special in meta["tokens"] if not special)
    assert shown == "the quick" + choices[2 * best + 1]
    assert f"choice {best} of 2" in meta["facts"]
    folder = bundle("question-answering", max_global=3, output_attentions=True)
    done = lfx(folder, "--text", "fox", "--pair", "the lazy dog jumps", "--output", tmp_path / "y.html")
    assert done.exit_code == 0, done.exception
    meta, _ = parts((tmp_path / "y.html").read_text())
    assert [meta["tokens"][i][1] for i in meta["is_global"]] == ["<s>", "fox"]
    assert len(meta["answers"]) == 1


def test_a_bundle_without_attention_outputs_says_how_to_export_one(bundle: MakeBundle, tmp_path: Path) -> None:
    done = lfx(bundle(), "--text", "fox", "--output", tmp_path / "x.html")
    assert isinstance(done.exception, ArtifactError)
    assert "lfx export --model … --output-attentions" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_text_above_the_models_maximum_is_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = bundle("text-classification", global_attention="first", output_attentions=True)
    done = lfx(folder, "--text", "fox " * 200, "--output", tmp_path / "x.html")
    assert isinstance(done.exception, InputError)
    assert "above the model's maximum 128" in str(done.exception)
    assert lfx(folder, "--output", tmp_path / "x.html").exit_code == 2
    assert not list(tmp_path.iterdir())
