"""`lfx run` and `lfx bench` on a model that writes texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lfx.cli import cli
from lfx.errors import InputError
from lfx.runtime import Engine, bench
from tests.conftest import MakeBundle, MakeLed

TEXT = "the quick brown fox jumps over the lazy dog"
OPTIONS = ("--generate", "max_new_tokens=6", "--generate", "num_beams=2", "--generate", "early_stopping=true")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_run_prints_the_summary_of_a_text(led_bundle: MakeLed, tmp_path: Path) -> None:
    folder = led_bundle()[1]
    with Engine(folder) as engine:
        tokens = engine.generate(TEXT, max_new_tokens=6, num_beams=2, early_stopping=True)
        expected = engine._open_tokenizer(None).decode(tokens[0].tolist())
    done = run("run", folder, "--text", TEXT, *OPTIONS, "--output", tmp_path / "tokens.npz")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == expected
    assert (np.load(tmp_path / "tokens.npz")["sequences"] == tokens).all()
    printed = json.loads(run("run", folder, "--text", TEXT, *OPTIONS, "--json").stdout)
    assert printed["summary"] == expected
    assert printed["output_ids"] == tokens[0, : 1 + printed["new_tokens"]].tolist()


def test_run_writes_the_summaries_of_documents(led_bundle: MakeLed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    done = run("run", led_bundle()[1], *files, *OPTIONS)
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (
        row["summary"] == json.loads(run("run", led_bundle()[1], "--text", TEXT, *OPTIONS, "--json").stdout)["summary"]
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--generate", "num_beams"), 2, "--generate 'num_beams' is no NAME=VALUE"),
        (("--generate", "=2"), 2, "--generate '=2' is no NAME=VALUE"),
        (("--generate", "top_k=2", "--generate", "top_k=3"), 2, "--generate top_k is given more than once"),
        (("--generate", "beams=2"), 1, "beams is no option of generate"),
        (("--generate", "self=1"), 1, "self is no option of generate"),
        (("--generate", "num_beams=two"), 1, "num_beams is 'two'; give a whole number"),
        (("--generate", "num_beams=2", "--generate", "num_return_sequences=2"), 1, "num_return_sequences 2"),
        (("--pair", "fox"), 1, "takes one text, and no --pair; leave it out"),
    ],
    ids=str,
)
def test_run_refuses_bad_options(arguments: tuple[str, ...], code: int, message: str, led_bundle: MakeLed) -> None:
    done = run("run", led_bundle()[1], "--text", TEXT, *arguments)
    assert done.exit_code == code
    assert message in done.output + str(done.exception)


def test_options_of_generation_are_for_models_that_write_texts(bundle: MakeBundle) -> None:
    done = run("run", bundle(), "--text", TEXT, "--generate", "num_beams=2")
    assert done.exit_code == 1
    assert "options of generation (num_beams) are for models that write texts" in str(done.exception)


def test_bench_measures_prefill_and_decoding_apart(led_bundle: MakeLed) -> None:
    pytest.importorskip("torch")
    sizes = ("--length", 40, "--batch", 2, "--rounds", 2, "--new-tokens", 5)
    checkpoint = led_bundle()[1].parent / "checkpoint"
    done = run("bench", led_bundle()[1], *sizes, "--against", "pytorch", "--source", checkpoint, "--json")
    assert done.exit_code == 0, done.output
    ours, theirs = (json.loads(line) for line in done.stdout.splitlines())
    assert (ours["contender"], theirs["contender"]) == ("lfx onnxruntime", "pytorch")
    for row in (ours, theirs):
        assert (row["seqlen"], row["batch"], row["new_tokens"], row["rounds"]) == (40, 2, 5, 2)
        assert row["prefill_p50_ms"] > 0
        assert row["decode_tokens_per_second"] > 0
    assert "prefill p50 ms" in run("bench", led_bundle()[1], *sizes).output


def test_bench_refuses_options_of_other_tasks(led_bundle: MakeLed, bundle: MakeBundle, tmp_path: Path) -> None:
    done = run("bench", bundle(), "--length", 8, "--new-tokens", 5)
    assert done.exit_code == 1
    assert "--new-tokens is for models that write texts, and this one is for feature-extraction" in str(done.exception)
    done = run("bench", led_bundle()[1], "--length", 8, "--plot", tmp_path / "plot.png")
    assert done.exit_code == 1
    assert "--plot is not drawn for models that write texts" in str(done.exception)


def test_bench_measures_what_the_decoder_has_positions_for(
    led_bundle: MakeLed, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("bench", led_bundle()[1], "--length", 8, "--new-tokens", 65)
    assert done.exit_code == 1
    assert "--new-tokens 65 is above what the decoder has positions for; give at most 64" in str(done.exception)
    measured: list[int] = []
    monkeypatch.setattr(bench, "measure_generation", lambda *sizes, new_tokens, **_: measured.append(new_tokens) or [])
    assert run("bench", led_bundle()[1], "--length", 8, "--json").exit_code == 0
    assert measured == [64]  # the default is 128


def test_rows_have_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def takes(prefill: float, step: float) -> bench.Generate:
        def generate(ids: Any, new_tokens: int, on_token: Any) -> None:
            for i in range(new_tokens):
                clock[0] += prefill if i == 0 else step
                on_token()

        return generate

    contenders = {"one": takes(2.0, 0.5), "other": takes(6.0, 1.0)}
    one, other = bench.measure_generation(contenders, [100], [4], new_tokens=11, rounds=3)
    assert (one["prefill_p50_ms"], one["prefill_tokens_per_second"]) == pytest.approx((2000, 200))
    assert one["decode_tokens_per_second"] == pytest.approx(4 / 0.5)
    assert (other["prefill_times_the_first"], other["decode_times_the_first"]) == pytest.approx((3, 2))


def test_a_contender_that_ends_early_is_an_error() -> None:
    with pytest.raises(InputError, match="short writes 1 tokens where 2 are measured"):
        bench.measure_generation({"short": lambda ids, count, on_token: on_token()}, [8], [1], new_tokens=4)
