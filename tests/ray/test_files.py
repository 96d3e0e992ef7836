"""The options, the input and the output of `lfx map`, without Ray."""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import sys
from pathlib import Path

import click
import pytest

from lfx.cli import cli
from lfx.errors import InputError
from lfx.manifest import Manifest
from lfx.ray.engine import DocumentEngine, EngineOptions
from lfx.ray.inputs import Inputs, check_apart, local_source
from lfx.ray.journal import JOURNAL, Parts
from lfx.ray.parts import Columns, encode, join
from tests.conftest import MakeBundle, MakeLed
from tests.runtime.test_import import lfx_without

HEADER = {"map": 1, "model": "a"}


def write_lines(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"text": "{path.name} {i}"}}\n' for i in range(count)))


def test_any_range_of_documents_is_read_across_files(tmp_path: Path) -> None:
    for name, count in (("b.jsonl", 3), ("a/z.ndjson", 2), ("c.JSONL", 0), ("d.jsonl", 4)):
        write_lines(tmp_path / name, count)
    inputs = Inputs(str(tmp_path))
    assert inputs.documents == 9
    everything = list(inputs.read(0, 9))
    assert [place[:2] for place in everything] == [
        *(("a/z.ndjson", n) for n in (1, 2)),
        *(("b.jsonl", n) for n in (1, 2, 3)),
        *(("d.jsonl", n) for n in (1, 2, 3, 4)),
    ]
    for start in range(10):
        for stop in range(start, 10):
            assert list(inputs.read(start, stop)) == everything[start:stop]


def test_the_digest_is_of_names_sizes_times_and_counts(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 3)
    before = Inputs(str(tmp_path)).digest
    assert Inputs(str(tmp_path)).digest == before
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert Inputs(str(tmp_path)).digest != before


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "b.jsonl", 2)
    documents = tmp_path / "documents"
    write_lines(documents / "a.jsonl", 1)
    (documents / "2024").symlink_to(tmp_path / "data")
    (documents / "c.jsonl").symlink_to(tmp_path / "data" / "b.jsonl")
    (documents / ".hidden").symlink_to(documents)
    assert Inputs(str(documents)).documents == 5


def test_the_depth_of_the_folders_is_not_limited_by_the_stack(tmp_path: Path) -> None:
    write_lines(tmp_path.joinpath(*["d"] * 200, "a.jsonl"), 2)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert Inputs(str(tmp_path)).documents == 2
    finally:
        sys.setrecursionlimit(limit)


def test_a_folder_that_cannot_be_listed_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "a.jsonl", 1)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl is a link to a file or folder that does not exist; fetch it"):
        Inputs(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "2024").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(InputError, match="2024 is a link to a file or folder that does not exist; fetch it"):
        Inputs(str(tmp_path))
    (tmp_path / "2024").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(InputError, match="loop is a link to a folder that it lies in; remove it"):
        Inputs(str(tmp_path))
    (tmp_path / "loop").unlink()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl is no file; remove it"):
        Inputs(str(tmp_path))
    (tmp_path / "pipe.jsonl").unlink()
    (tmp_path / "private").mkdir()
    listed = Path.iterdir

    def refuse(folder: Path) -> object:  # root may read everything
        if folder.name == "private":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="private cannot be read: Permission denied; make it readable"):
        Inputs(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "has no files of documents, whose names end with one of .jsonl"),
        ("notes.txt", "is no folder, and its name ends with none of .jsonl, .ndjson, .parquet"),
        ("missing.jsonl", "does not exist, or is no file"),
        ("ftp://host/a.jsonl", "ftp://host/a.jsonl cannot be read: Unrecognized filesystem type"),
    ],
)
def test_an_input_without_documents_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "notes.txt").write_text("x")
    source = name if "://" in name else str(tmp_path / name)
    with pytest.raises(InputError, match=reason):
        Inputs(source)


def test_fields_that_no_run_reads_have_no_value(tmp_path: Path) -> None:
    line = '{"id": 7, "text": "a", "html": "<p>a</p>"}'
    (tmp_path / "a.jsonl").write_text(f"{line}\nx\n[1]\n")
    first, second, third = (document for _, _, document in Inputs(str(tmp_path)).read(0, 3))
    assert first == {"id": 7, "text": "a", "html": None}
    assert isinstance(second, InputError) and third == [1]


def test_a_uri_of_a_folder_on_this_machine_is_its_path(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "two words"
    write_lines(folder / "a.jsonl", 2)
    parquet.write_table(pyarrow.table({"text": ["x"], "html": ["y"]}), folder / "b.parquet")
    assert local_source(folder.as_uri()) == str(folder)
    assert local_source("s3://bucket/folder") == "s3://bucket/folder"
    with pytest.raises(InputError, match="cannot be read"):
        local_source("file:///two words")
    documents = list(Inputs(folder.as_uri()).read(0, 3))  # through pyarrow, as of s3://
    assert documents == list(Inputs(str(folder)).read(0, 3))
    assert documents[2] == ("b.parquet", 1, {"text": "x"})


@pytest.mark.parametrize(("source", "output"), [("in", "in/out"), ("out/in", "out"), ("in", "in")])
def test_an_output_inside_the_input_is_refused(source: str, output: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one contains the other"):
        check_apart(str(tmp_path / source), tmp_path / output)
    check_apart(str(tmp_path / "input"), tmp_path / "input2")


def test_complete_parts_are_kept_and_damaged_ones_are_not(tmp_path: Path) -> None:
    with Parts(tmp_path / "out", HEADER, "jsonl") as parts:
        for number in (2, 0, 1, 3, 4):
            parts.write(number, b"row %d\n" % number, 1, number % 2)
    (tmp_path / "out" / "part-00000001.jsonl").write_bytes(b"row 9\n")
    for number in (3, 4):
        parts.path(number).unlink()
    os.mkfifo(parts.path(4))  # opening it would wait for a writer
    with Parts(tmp_path / "out", HEADER, "jsonl") as parts:
        assert parts.complete == {2: {"documents": 1, "refused": 0, "bytes": 6}, 0: parts.complete[0]}
        parts.write(1, b"row 1\n", 1, 1)
    with Parts(tmp_path / "out", HEADER, "jsonl") as parts:
        assert sorted(parts.complete) == [0, 1, 2]


def test_a_journal_that_is_cut_anywhere_keeps_the_parts_before(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Parts(output, HEADER, "jsonl") as parts:
        for number in range(3):
            parts.write(number, b"row\n", 1, 0)
    whole = (output / JOURNAL).read_bytes()
    for size in range(len(whole)):
        (output / JOURNAL).write_bytes(whole[:size])
        with Parts(output, HEADER, "jsonl") as parts:
            assert len(parts.complete) == max(whole[:size].count(b"\n") - 1, 0)
            for number in {0, 1, 2} - parts.complete.keys():
                parts.write(number, b"row\n", 1, 0)
        with Parts(output, HEADER, "jsonl") as parts:
            assert sorted(parts.complete) == [0, 1, 2]


def test_an_output_of_others_is_refused(tmp_path: Path) -> None:
    for name, content in (("other", b"x"), (JOURNAL, b"something\n"), (JOURNAL, b"some")):
        folder = tmp_path / f"{name}{len(content)}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=r"not of lfx map|another version of lfx|is no journal of lfx"):
            Parts(folder, HEADER, "jsonl")
        assert (folder / name).read_bytes() == content
    with Parts(tmp_path / "out", HEADER, "jsonl"), pytest.raises(InputError, match="another run is writing"):
        Parts(tmp_path / "out", HEADER, "jsonl")
    with pytest.raises(InputError, match="has results of a run with another model; run it with the same options"):
        Parts(tmp_path / "out", {**HEADER, "model": "b"}, "jsonl")


def test_a_run_whose_journal_was_removed_as_it_was_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed(descriptor: int) -> bool:
        (tmp_path / "out" / JOURNAL).unlink()
        return True

    monkeypatch.setattr("lfx.ray.journal.try_lock", removed)
    with pytest.raises(InputError, match="another run is writing"):
        Parts(tmp_path / "out", HEADER, "jsonl")


def test_a_journal_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out" / JOURNAL).symlink_to(victim)
    with pytest.raises(InputError, match="cannot be opened"):
        Parts(tmp_path / "out", HEADER, "jsonl")
    assert victim.read_text() == "precious"


def test_the_journal_has_one_line_of_json_for_each_part(tmp_path: Path) -> None:
    with Parts(tmp_path / "out", HEADER, "parquet") as parts:
        parts.write(0, b"content", 256, 3)
    header, part = map(json.loads, (tmp_path / "out" / JOURNAL).read_text().splitlines())
    assert header == HEADER
    assert {**part, "sha256": ""} == {"part": 0, "documents": 256, "refused": 3, "bytes": 7, "sha256": ""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "b", "--max-windows", "3"], "--max-windows needs --stride"),
        (["--model", "b", "--gpus", "1"], "--gpus reserves GPUs that nothing uses: give --provider cuda, or a plan"),
        (["--model", "b.plan"], "the model runs on a GPU, which Ray hides from actors without one: give --gpus 1"),
        (["--model", "b", "--provider", "cuda"], "give --gpus 1"),
        (["--model", "b", "--format", "csv"], "'csv' is not one of 'parquet', 'jsonl'"),
        ([], "Missing option '--model'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict_each_other_are_wrong_usage(options: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        cli.main(["map", "in.jsonl", "out", *options], standalone_mode=False)
    assert message in caught.value.format_message()


TASKS = {
    "feature-extraction": {"text": "the fox"},
    "sentence-embedding": {"text": "the fox"},
    "text-classification": {"text": "the fox"},
    "token-classification": {"text": "the fox"},
    "fill-mask": {"text": "the <mask> fox"},
    "question-answering": {"text": "the fox", "pair": "the quick brown fox"},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stride", [None, 4])
def test_a_part_in_parquet_has_the_rows_of_any_task(task: str, stride: int | None, bundle: MakeBundle) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    engine = DocumentEngine(EngineOptions(bundle(task), threads=1, stride=stride))
    rows, summary = engine.rows([TASKS[task], {**TASKS[task], "id": "é"}, InputError("broken"), {"id": {"a": [1]}}])
    placed = [{"file": "a", **row} for row in rows]
    table = parquet.read_table(io.BytesIO(encode(placed, engine.columns, "parquet")))
    assert table.schema == engine.columns.schema()
    joined = parquet.read_table(
        io.BytesIO(join([encode([row], engine.columns, "parquet") for row in placed], "parquet"))
    )
    assert joined == table
    written = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    for row, other in zip(rows, written, strict=True):
        assert set(other) == {"file", *row} - ({"outputs"} if not row.get("outputs") else set())
        assert other.get("answers", []) == [pytest.approx(answer) for answer in row.get("answers", [])]
        assert other["line"] == row["line"]
    assert [row["error"] for row in written[-2:]] == [
        "broken",
        "the document has the fields id; give either text or input_ids",
    ]
    assert [row.get("id") for row in written if row.get("id")] == ["é"] * (len(rows) // 2 - 1) + ['{"a": [1]}']
    assert summary.windows == len(rows) - 2


def test_a_part_in_parquet_has_the_texts_that_a_model_writes(led_bundle: MakeLed) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    model = led_bundle()[1]
    engine = DocumentEngine(EngineOptions(model, threads=1))
    rows, _ = engine.rows([{"text": "the fox"}])
    assert rows[0].keys() == {"line", "tokens", "new_tokens", "summary"}
    without_tokenizer = Columns.of(Manifest.read(model).signature, has_tokenizer=False, has_windows=False)
    ids_row = {"line": 0, "tokens": 3, "new_tokens": 2, "output_ids": [2, 5, 6]}
    for row, columns in ((rows[0], engine.columns), (ids_row, without_tokenizer)):
        table = parquet.read_table(io.BytesIO(encode([{"file": "a", **row}], columns, "parquet")))
        written = {name: value for name, value in table.to_pylist()[0].items() if value is not None}
        assert written == {"file": "a", **row}


def test_a_missing_extra_is_refused_in_one_line_with_the_cure(bundle: MakeBundle, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 1)
    folder = str(bundle())
    done = lfx_without(("ray",), "map", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--model", folder)
    assert done.stderr == "error: ray is not installed; install it with: pip install 'longformer-lfx[ray]'\n"
    assert (done.returncode, done.stdout) == (1, "")
