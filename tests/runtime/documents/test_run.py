"""`run_documents`: a row for each line, errors of bad lines, and resumed runs that give the same file."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lfx.errors import InputError
from lfx.runtime import Engine
from lfx.runtime.documents import run as documents
from lfx.runtime.documents import run_documents
from lfx.runtime.documents.journal import journal_path
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import NULL_BYTE, MakeBundle
from tests.marks import fast_if

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
CLASSIFIER = "text-classification"


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of 1 to 60 words."""
    random = np.random.default_rng(seed)
    return [{"id": f"d{i}", "text": " ".join(random.choice(WORDS, random.integers(1, 61)))} for i in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    """Write JSONL; a string is written as a line unchanged."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def engine(bundle: MakeBundle) -> Any:
    """A classifier."""
    with Engine(bundle(CLASSIFIER)) as opened:
        yield opened


@pytest.fixture
def tokenizer(bundle: MakeBundle, engine: Engine) -> Tokenizer:
    """The tokenizer of the classifier."""
    return Tokenizer(bundle(CLASSIFIER), engine.signature)


def test_each_document_gets_the_row_that_it_gets_alone(engine: Engine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", texts(40))
    summary = run_documents(engine, tokenizer, source, tmp_path / "out.jsonl")
    written = rows(tmp_path / "out.jsonl")
    assert (summary.documents, summary.refused, summary.windows) == (40, 0, 40)
    assert [row["line"] for row in written] == list(range(1, 41))
    for row, document in zip(written, texts(40), strict=True):
        ids = tokenizer.encode(document["text"]).ids
        assert (row["id"], row["tokens"]) == (document["id"], len(ids))
        logits = engine.run(ids)["logits"]
        np.testing.assert_allclose(row["outputs"]["logits"], logits[0], rtol=0, atol=1e-5)
        assert row["answers"][0]["label"] == f"LABEL_{int(logits[0].argmax())}"
    assert summary.tokens == sum(row["tokens"] for row in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


BAD: dict[str, tuple[Any, str]] = {
    "broken": ('{"text": "fox"', "broken JSON"),
    "empty": ("", "empty line"),
    "a list": ([1], "the document is list; give an object with text or input_ids"),
    "a wrong field": ({"body": "fox"}, "the document has the fields body; give either text or input_ids"),
    "nothing": ({}, "the document has the fields none; give either text or input_ids"),
    "both": ({"text": "fox", "input_ids": [5]}, "give either text or input_ids"),
    "no string": ({"text": 5}, "text .* must be a string"),
    "blank": ({"text": "  "}, "text not empty"),
    "too long": ({"text": "fox " * 500}, r"above the model's maximum 128"),
    "an id too large": ({"input_ids": [5, 99]}, "99"),
    "ids that are none": ({"input_ids": [1.5]}, "input_ids must be a list of at least one whole number"),
    "no ids": ({"input_ids": []}, "input_ids must be a list of at least one whole number"),
    "padding": ({"input_ids": [5, 6, 1], "attention_mask": [1, 1, 0]}, "attention_mask must be a 1 for each"),
    "a short mask": ({"input_ids": [5, 6], "attention_mask": [1]}, "attention_mask must be a 1 for each"),
    "global tokens": ({"input_ids": [5, 6], "global_attention_mask": [0, 1]}, "differs from the task's global tokens"),
    "deep": ("[" * 100000, "broken JSON"),
}


def test_bad_lines_are_reported_by_file_and_line_and_the_rest_is_run(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines: list[Any] = []
    for bad, _ in BAD.values():
        lines += [{"text": "the fox"}, bad]
    source = write(tmp_path / "in.jsonl", lines)
    reported: list[str] = []
    summary = run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", report=reported.append)
    written = rows(tmp_path / "out.jsonl")
    assert (summary.documents, summary.refused) == (2 * len(BAD), len(BAD))
    for i, (_, reason) in enumerate(BAD.values()):
        good, bad = written[2 * i], written[2 * i + 1]
        assert "error" not in good and good["outputs"]["logits"] == written[0]["outputs"]["logits"]
        assert set(bad) == {"line", "error"}
        assert reported[i] == f"{source}:{2 * i + 2}: {bad['error']}"
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(bad["error"])


def test_masks_that_a_document_is_run_with_may_be_given(engine: Engine, tmp_path: Path) -> None:
    masks = {"attention_mask": [1, 1, 1], "global_attention_mask": [1, 0, 0]}
    documents = [{"input_ids": [0, 5, 2]}, {"input_ids": [0, 5, 2], **masks}, {"text": "fox", "attention_mask": [0]}]
    summary = run_documents(engine, None, write(tmp_path / "in.jsonl", documents), tmp_path / "out.jsonl")
    first, second, third = rows(tmp_path / "out.jsonl")
    assert first["outputs"] == second["outputs"]
    assert summary.refused == 1 and "no tokenizer" in third["error"]


def test_bytes_that_are_not_utf8_are_one_bad_line(engine: Engine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "fox"}\n')
    assert run_documents(engine, tokenizer, tmp_path / "in.jsonl", tmp_path / "out.jsonl").refused == 1
    assert [row.get("error") for row in rows(tmp_path / "out.jsonl")] == ["not UTF-8", None]


@pytest.mark.parametrize("stride", [1, 50, 126])
def test_long_documents_become_windows_that_cover_all_tokens(
    stride: int, engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = " ".join(np.random.default_rng(0).choice(WORDS, 150))
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    windows = tokenizer.windows(text, None, stride)
    for number, window in enumerate(windows):
        start = number * stride
        assert window.ids[1:-1] == whole[start : start + 126]  # without the special tokens
    assert (len(windows) - 1) * stride + len(windows[-1].ids) - 2 == len(whole)
    source = write(tmp_path / "in.jsonl", [{"text": text}, {"text": "fox"}])
    run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=stride)
    written = rows(tmp_path / "out.jsonl")
    assert [(row["line"], row["window"]) for row in written] == [*((1, k) for k in range(len(windows))), (2, 0)]
    assert len(tokenizer.encode("the fox").ids) == 4  # the tokenizer is unchanged


def test_a_stride_that_would_skip_tokens_is_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"stride 127 does not fit: a window has room for 126 tokens .* give 1 to 126"):
        tokenizer.windows("fox " * 200, None, 127)


def test_each_window_of_a_document_begins_with_the_question(bundle: MakeBundle, tmp_path: Path) -> None:
    with Engine(bundle("question-answering")) as engine:
        tokenizer = Tokenizer(bundle("question-answering"), engine.signature)
        question, document = "the quick fox", "the lazy dog jumps over " * 40
        windows = tokenizer.windows(question, document, 60)
        start = tokenizer.encode(question, "dog").ids[:5]
        assert len(windows) > 2
        assert all(window.ids[:5] == start for window in windows)
        source = write(tmp_path / "in.jsonl", [{"text": question, "pair": document}, {"text": question}])
        summary = run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=60)
        assert (summary.refused, summary.windows) == (1, len(windows))
        assert all("answer" in row["answers"][0] for row in rows(tmp_path / "out.jsonl")[:-1])


@pytest.mark.parametrize("stride", [None, 60])
def test_a_question_about_an_empty_document_is_refused(stride: int | None, bundle: MakeBundle, tmp_path: Path) -> None:
    with Engine(bundle("question-answering"), threads=1) as engine:
        tokenizer = Tokenizer(bundle("question-answering"), engine.signature)
        source = write(tmp_path / "in.jsonl", [{"text": "the fox", "pair": pair} for pair in ("", "  ", "dog")])
        assert run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=stride).refused == 2
        *refused, answered = rows(tmp_path / "out.jsonl")
        assert {row["error"] for row in refused} == {
            "the document, given as pair, has no tokens, so the question has no answer in it"
        }
        assert answered["answers"][0]["answer"] == "dog"


def test_documents_of_ids_need_no_tokenizer(engine: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"input_ids": [0, 5, 6, 2]}, {"text": "fox"}])
    assert run_documents(engine, None, source, tmp_path / "out.jsonl").refused == 1
    first, second = rows(tmp_path / "out.jsonl")
    np.testing.assert_allclose(first["outputs"]["logits"], engine.run([0, 5, 6, 2])["logits"][0], atol=1e-5)
    assert "no tokenizer" in second["error"]


def test_parquet_in_and_out(engine: Engine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [d["text"] for d in texts(20)] + [None], "id": list(range(21))})
    parquet.write_table(table, tmp_path / "in.parquet")
    write(tmp_path / "in.jsonl", [*({**d, "id": i} for i, d in enumerate(texts(20))), {"id": 20}])
    for name in ("in.parquet", "in.jsonl"):
        for out in (f"{name}.parquet", f"{name}.jsonl"):
            assert run_documents(engine, tokenizer, tmp_path / name, tmp_path / out).refused == 1
    expected = rows(tmp_path / "in.jsonl.jsonl")
    assert [r.get("outputs") for r in rows(tmp_path / "in.parquet.jsonl")] == [r.get("outputs") for r in expected]
    columns = parquet.read_table(tmp_path / "in.parquet.parquet").to_pylist()
    assert [row["id"] for row in columns] == list(range(21))
    assert columns[3]["outputs"]["logits"] == expected[3]["outputs"]["logits"]
    assert columns[20]["outputs"] is None and columns[20]["error"]


@pytest.mark.parametrize(
    ("source", "output", "reason"),
    [
        ("in.txt", "out.jsonl", r"none of \.jsonl, \.ndjson, \.parquet"),
        ("in.jsonl", "out.csv", r"none of \.jsonl, \.ndjson, \.parquet"),
        ("none.jsonl", "out.jsonl", "does not exist"),
        ("in.jsonl", "in.jsonl", "it is the input"),
        ("in.jsonl", "no/out.jsonl", "its folder does not exist"),
        ("in.parquet", "out.jsonl", "cannot be read as Parquet"),
        ("x" * 5000, "out.jsonl", "the input .* cannot be opened: File name too long"),
        ("in.jsonl", "x" * 5000 + ".jsonl", "output .* cannot be opened: File name too long"),
        ("in.jsonl", "x" * 244 + ".jsonl", "the journal of this run, cannot be opened: .*File name too long"),
        ("a\0.jsonl", "out.jsonl", f"the input .* cannot be opened: {NULL_BYTE}"),
        ("in.jsonl", "a\0.jsonl", f"output .* cannot be opened: {NULL_BYTE}"),
    ],
)
def test_bad_paths_are_refused(
    source: str, output: str, reason: str, engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    for name in ("in.jsonl", "in.txt", "in.parquet"):
        write(tmp_path / name, texts(1))
    with pytest.raises(InputError, match=reason):
        run_documents(engine, tokenizer, tmp_path / source, tmp_path / output)


def test_the_input_is_refused_as_the_output_under_another_mount_too(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path, mount: Callable[..., None]
) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    write(tmp_path / "in" / "in.jsonl", texts(1))
    mount("--bind", tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="it is the input"):
        run_documents(engine, tokenizer, tmp_path / "in" / "in.jsonl", tmp_path / "out" / "in.jsonl")


def test_a_mounted_output_is_refused_before_the_work(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(1)), tmp_path / "out.jsonl"
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    with pytest.raises(InputError, match="it is a mount point, which cannot be replaced; mount its folder instead"):
        run_documents(engine, tokenizer, source, output)


@pytest.mark.parametrize("name", ["in.JSONL", "in.ndjson"])
def test_other_suffixes_of_the_formats_are_accepted(
    name: str, engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write(tmp_path / name, texts(3))
    assert run_documents(engine, tokenizer, source, tmp_path / "out.NDJSON").documents == 3
    assert [row["line"] for row in rows(tmp_path / "out.NDJSON")] == [1, 2, 3]


@fast_if(lambda cut: cut in (200, 20000))
@pytest.mark.parametrize("cut", [1, 7, 200, 4000, 20000])
def test_a_run_that_was_stopped_anywhere_resumes_to_the_same_file(
    cut: int, engine: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 16)
    source = write(tmp_path / "in.jsonl", [*texts(50), "broken", *texts(20, seed=1)])
    run_documents(engine, tokenizer, source, tmp_path / "expected.jsonl")
    expected = (tmp_path / "expected.jsonl").read_bytes()

    def stop(step: str) -> None:
        if step.startswith("64"):
            raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_documents(engine, tokenizer, source, output, progress=stop)
    assert not output.exists()
    partial = tmp_path / ".out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-cut])  # as a killed process may leave it
    summary = run_documents(engine, tokenizer, source, output)
    assert summary.resumed_at in range(0, 64, 16)
    assert (summary.documents, summary.refused) == (71, 1)
    assert output.read_bytes() == expected
    assert not partial.exists()


def test_a_journal_of_another_input_or_stride_is_not_resumed(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 4)

    def stop(step: str) -> None:
        raise KeyboardInterrupt

    for change in ("input", "stride"):
        source = write(tmp_path / "in.jsonl", texts(9))
        with pytest.raises(KeyboardInterrupt):
            run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", progress=stop)
        if change == "input":
            write(source, texts(9, seed=5))
        stride = 50 if change == "stride" else None
        with pytest.raises(InputError, match=f"finished documents of a run with another {change}; "):
            run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=stride)
        journal_path(tmp_path / "out.jsonl").unlink()
        assert run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=stride).resumed_at == 0


def test_a_stopped_run_is_not_resumed_with_other_kernels(bundle: MakeBundle, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.jsonl"

    def stop(step: str) -> None:
        raise KeyboardInterrupt

    with Engine(bundle(CLASSIFIER), kernels="fused", threads=1) as engine:
        tokenizer = Tokenizer(bundle(CLASSIFIER), engine.signature)
        with pytest.raises(KeyboardInterrupt):
            run_documents(engine, tokenizer, source, output, progress=stop)
        with (
            Engine(bundle(CLASSIFIER), kernels="function", threads=1) as other,
            pytest.raises(InputError, match="finished documents of a run with another kernels; run it with the same"),
        ):
            run_documents(other, tokenizer, source, output)
        assert run_documents(engine, tokenizer, source, output).resumed_at == 3


def command(bundle: Path, folder: Path, *options: str) -> list[str]:
    """The command `lfx run` on a file of documents."""
    arguments = ["run", str(bundle), "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    return [sys.executable, "-m", "lfx.cli", *arguments, *options]


@pytest.mark.slow
def test_the_command_killed_at_random_points_ends_with_the_same_file(bundle: MakeBundle, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", texts(3000))
    subprocess.run(command(bundle(CLASSIFIER), tmp_path), check=True, capture_output=True)
    expected = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    partial = tmp_path / ".out.jsonl.partial"
    for share in sorted(np.random.default_rng(0).uniform(0.0, 0.8, 4)):
        process = subprocess.Popen(
            command(bundle(CLASSIFIER), tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not partial.exists() or partial.stat().st_size <= share * len(expected):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(bundle(CLASSIFIER), tmp_path), check=True, capture_output=True)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_the_command_reports_its_counts_and_exits_1_if_lines_were_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", texts(5))
    done = subprocess.run(command(bundle(CLASSIFIER), tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 documents, 0 refused" in done.stdout
    assert "tokens/s" in done.stdout
    write(tmp_path / "in.jsonl", [*texts(5), {"text": ""}])
    done = subprocess.run(command(bundle(CLASSIFIER), tmp_path, "--json"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["refused"] == 1
    assert f"{tmp_path / 'in.jsonl'}:6: text" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 6 documents were refused; ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--input", "in.jsonl"], "documents need --output FILE.jsonl or FILE.parquet"),
        (["--input", "in.jsonl", "--output", "o.jsonl", "--pair", "x"], "and no --pair"),
        (["--text", "fox", "--stride", "5"], "--stride is for documents"),
        (["--text", "fox", "--max-windows", "5"], "--max-windows needs --stride"),
    ],
)
def test_options_that_do_not_apply_are_usage_errors(options: list[str], reason: str, bundle: MakeBundle) -> None:
    arguments = [sys.executable, "-m", "lfx.cli", "run", str(bundle(CLASSIFIER)), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert reason in " ".join(done.stderr.split())


ODD: dict[str, tuple[str, str]] = {
    "a surrogate as id": (r'{"id": "\ud800", "input_ids": [3, 4]}', "id is str, which JSON cannot hold"),
    "a surrogate as field": (r'{"\ud800": 1}', r"fields \\ud800"),
    "a surrogate as text": (r'{"text": "a \ud800 b"}', "the text is not UTF-8"),
    "an infinite id": ('{"id": 1e999, "input_ids": [3, 4]}', "id is float, which JSON cannot hold: .*; make it text"),
}


@pytest.mark.parametrize("stride", [None, 8])
@pytest.mark.parametrize("name", ODD)
def test_no_odd_document_stops_a_run(bundle: MakeBundle, tmp_path: Path, name: str, stride: int | None) -> None:
    line, reason = ODD[name]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "input_ids": [3, 4]}\n' + line + '\n{"id": "a", "input_ids": [3, 4]}\n')
    folder = bundle("text-classification")
    with Engine(folder, threads=1) as engine:
        done = run_documents(engine, Tokenizer(folder, engine.signature), source, output, stride=stride)
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert (done.documents, done.refused, len(rows)) == (3, 1, 3)
    assert re.search(reason, rows[1]["error"])


def test_ids_of_two_types_are_written_to_parquet_as_text(bundle: MakeBundle, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"id": 1, "input_ids": [3, 4]}\n{"id": "a", "input_ids": [3, 4]}\n')
    with Engine(bundle("text-classification"), threads=1) as engine:
        run_documents(engine, None, source, output)
    assert parquet.read_table(output).column("id").to_pylist() == ["1", "a"]


def test_a_second_run_of_the_same_output_is_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input_ids": [3, 4]}\n' * 300)
    second: list[str] = []

    def again(_: str) -> None:
        with (
            Engine(bundle("text-classification"), threads=1) as other,
            pytest.raises(InputError, match="another run is writing"),
        ):
            run_documents(other, None, source, output)
        second.append("refused")

    with Engine(bundle("text-classification"), threads=1) as engine:
        run_documents(engine, None, source, output, progress=again)
    assert second
    assert len(output.read_text().splitlines()) == 300


def test_the_rows_of_another_model_or_tokenizer_are_not_resumed(own_bundle: MakeBundle, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "the fox"}\n' * 300)
    folder = own_bundle("text-classification")
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with Engine(folder, threads=1) as engine:
        with pytest.raises(KeyboardInterrupt):
            run_documents(engine, Tokenizer(folder, engine.signature), source, output, progress=stop)
        with pytest.raises(InputError, match="finished documents of a run with another tokenizer; "):
            run_documents(engine, Tokenizer(other, engine.signature), source, output)
    copy = tmp_path / "copy"
    copy.mkdir()
    model = onnx.load(str(folder / "model.onnx"))
    model.doc_string = "another"
    onnx.save(model, str(copy / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    with Engine(copy / "model.onnx", threads=1) as engine:
        with pytest.raises(InputError, match="finished documents of a run with another model; "):
            run_documents(engine, Tokenizer(folder, engine.signature), source, output)
        journal_path(output).unlink()
        assert run_documents(engine, Tokenizer(folder, engine.signature), source, output).resumed_at == 0


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": True}, {"stride": "x"}, {"stride": 1.5}, {"stride": -1}])
@pytest.mark.parametrize("name", ["stride", "max_windows"])
def test_options_that_are_no_whole_numbers_are_refused(
    options: dict[str, Any], name: str, engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", texts(1))
    wrong: Any = {"stride": 5, name: options["stride"]}
    with pytest.raises(InputError, match=rf"{name} .*give a whole number, 1 or more"):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", **wrong)
    with pytest.raises(InputError, match="generation is 5; give a dict of options"):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", generation=5)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("name", ["progress", "report"])
def test_a_callback_that_is_no_function_is_refused(
    name: str, engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    wrong: Any = {name: 5}
    source = write(tmp_path / "in.jsonl", texts(1))
    with pytest.raises(InputError, match=f"{name} is 5; give a function"):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", **wrong)


def test_a_document_of_too_many_windows_is_refused_by_number(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents_of = {"text": "the " * 140}, {"text": "the " * 141}
    source = write(tmp_path / "in.jsonl", list(documents_of))
    summary = run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=1, max_windows=15)
    assert (summary.refused, summary.windows) == (1, 15)
    reason = "the document gives 16 windows, above the 15 allowed; give a larger --stride, or --max-windows 16"
    assert rows(tmp_path / "out.jsonl")[-1] == {"line": 2, "error": reason}
    run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", stride=126)
    assert documents.MAX_WINDOWS == 4096


def test_the_command_bounds_windows(bundle: MakeBundle, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"text": "the " * 200}])
    arguments = command(bundle(CLASSIFIER), tmp_path, "--stride", "1", "--max-windows", "3")
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "in.jsonl:1: the document gives 75 windows, above the 3 allowed" in done.stderr


def rewrite(source: Path) -> None:
    """Write other documents with the same size and modification time."""
    status = source.stat()
    source.write_text(source.read_text().replace("the", "fox"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(source: Path) -> None:
    """Replace the file by another of the same name."""
    other = source.with_name("other")
    other.write_text(source.read_text() + "{}\n")
    other.replace(source)


@pytest.mark.parametrize("change", [rewrite, replaced, Path.unlink])
def test_an_input_that_changes_during_a_run_is_an_error_and_its_rows_are_dropped(
    change: Callable[[Path], None],
    engine: Engine,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 4)
    source, output = write(tmp_path / "in.jsonl", texts(12)), tmp_path / "out.jsonl"

    def between_chunks(step: str) -> None:
        if step.startswith("4 "):
            change(source)

    with pytest.raises(
        InputError, match=r"in\.jsonl was changed or removed during the run, .* two versions .* run again"
    ):
        run_documents(engine, tokenizer, source, output, progress=between_chunks)
    assert not output.exists()
    assert not (tmp_path / ".out.jsonl.partial").exists()


def test_a_change_of_the_input_is_detected_at_the_next_chunk(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 4)
    source, steps = write(tmp_path / "in.jsonl", texts(40)), []

    def between_chunks(step: str) -> None:
        steps.append(step)
        replaced(source)

    with pytest.raises(InputError, match="changed or removed"):
        run_documents(engine, tokenizer, source, tmp_path / "out.jsonl", progress=between_chunks)
    assert steps == ["4 documents"]


def test_a_full_disk_keeps_completed_chunks(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.jsonl"

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="make room on its disk, and give the same"):
        patched.setattr(documents, "write_rows", full)
        run_documents(engine, tokenizer, source, output)
    assert run_documents(engine, tokenizer, source, output).resumed_at == 3


def test_documents_for_calibration_are_read_one_by_one(engine: Engine, tmp_path: Path, bundle: MakeBundle) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "the " * 300}, {"input_ids": [5]}, {"text": ""}])
    windows = documents.encoded(source, engine.signature, bundle(CLASSIFIER))
    assert [len(next(windows).ids) for _ in range(4)] == [128, 128, 50, 1]
    with pytest.raises(InputError, match=r"in\.jsonl:3: text"):
        next(windows)
