"""`lfx convert`: the summary, JSON, and the errors of wrong use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lfx.cli import cli
from lfx.errors import ExportError
from tests.encoders import save_tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa for text classification."""
    return save_tiny_encoder(tmp_path_factory.mktemp("model") / "roberta", "Roberta", "ForSequenceClassification")


def lfx(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_summary_says_up_to_which_length_the_two_are_equal(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    done = lfx("convert", "--model", model, "--output", folder, "--max-seqlen", 200, "--attention-window", 16)
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first == (
        f"{folder}: LongformerForSequenceClassification, up to 200 tokens, attention window 16; equal to the original "
        "up to 9 tokens"
    )
    assert second.startswith("logits: largest error ")
    assert "against the original in float64" in second
    steps = [line for line in done.stderr.splitlines() if "comparing: batch" not in line]
    assert steps == [
        "… importing torch",
        "… loading the checkpoint",
        "… copying the tokenizer",
        "… converting the weights",
        "… writing",
        "… comparing: loading the Longformer",
    ]


def test_json_has_the_comparison_and_each_layer_its_window(model: Path, tmp_path: Path) -> None:
    options = ("--max-seqlen", 200, "--attention-window", "8,24", "--json")
    done = lfx("convert", "--model", model, "--output", tmp_path / "made", *options)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    comparison = result.pop("comparison")
    assert result == {
        "output": str(tmp_path / "made"),
        "architecture": "LongformerForSequenceClassification",
        "max_seqlen": 200,
        "attention_window": [8, 24],
        "equal_seqlen": 5,
    }
    assert comparison["passed"] is True
    assert comparison["reference"] == "the original in float64"
    assert [case["seqlen"] for case in comparison["cases"]] == [1, 2, 4, 5, 5]
    assert json.loads((tmp_path / "made" / "config.json").read_text())["attention_window"] == [8, 24]


def test_the_defaults_are_4096_tokens_and_a_window_of_512(model: Path, tmp_path: Path) -> None:
    done = lfx("convert", "--model", model, "--output", tmp_path / "made", "--json")
    result = json.loads(done.stdout)
    assert (result["max_seqlen"], result["attention_window"]) == (4096, [512, 512])
    assert result["equal_seqlen"] == 40  # all that the original takes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--output'"),
        (["--output", ""], "it is empty"),
        (["--output", "made", "--max-seqlen", "0"], "0 is not in the range 1<=x<=65536"),
        (["--output", "made", "--max-seqlen", "65537"], "65537 is not in the range"),
        (["--output", "made", "--attention-window", "wide"], "'wide' is no even number, such as 512"),
        (["--output", "made", "--attention-window", "16,"], "'16,' is no even number"),
        (["--output", "made", "--attention-window", "-16"], "'-16' is no even number"),
        (["--output", "made", "--attention-window", "16", "--attention-window", "8"], "is given more than once"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lfx("convert", "--model", model, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("window", "message"), [("15", "attention_window 15 is odd"), ("16,16,16", "has 3 entries for 2 layers")]
)
def test_a_window_that_does_not_fit_is_one_line(model: Path, tmp_path: Path, window: str, message: str) -> None:
    done = lfx("convert", "--model", model, "--output", tmp_path / "made", "--attention-window", window)
    assert isinstance(done.exception, ExportError)
    assert message in str(done.exception)
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
