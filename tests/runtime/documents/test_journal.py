"""The journal: complete chunks of the same run are resumed, other content is dropped, other files are left alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfx.errors import InputError, LfxError
from lfx.runtime import Engine
from lfx.runtime.documents import run as documents
from lfx.runtime.documents import run_documents
from lfx.runtime.documents.journal import Journal, journal_path, read_header
from tests.conftest import MakeBundle

HEADER = {"journal": 2, "input": "a", "stride": 1}
CHUNK = 4


def stopped(output: Path, chunks: int = 2) -> Path:
    """Write the journal of a killed run: complete chunks of three documents and rows of one more; returns its path."""
    with Journal(output, HEADER, CHUNK) as journal:
        for chunk in range(chunks):
            for line in range(3):
                journal.write({"line": 3 * chunk + line + 1, "id": '{"chunk": {"done": 9}}\n{"chunk": {"done": 9}}'})
            journal.end_chunk(3, 1)
        journal.write({"line": 3 * chunks + 1})
    return journal_path(output)


def reopened(output: Path, header: dict[str, Any] = HEADER) -> tuple[int, int, list[int]]:
    """The counts of a journal that is opened again, and the lines of its rows."""
    with Journal(output, header, CHUNK) as journal:
        return journal.documents, journal.refused, [json.loads(row)["line"] for row in journal.rows()]


def test_complete_chunks_are_resumed_and_the_rest_is_truncated(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stopped(output)
    assert reopened(output) == (6, 2, [1, 2, 3, 4, 5, 6])
    with Journal(output, HEADER, CHUNK) as journal:
        journal.write({"line": 7})
        journal.end_chunk(1, 0)
    assert reopened(output) == (7, 2, [1, 2, 3, 4, 5, 6, 7])


def test_finished_documents_of_another_run_are_not_lost(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    whole = stopped(output).read_bytes()
    for header, differing in (
        ({**HEADER, "input": "b", "stride": 2}, "input, stride"),
        ({**HEADER, "stride": 2}, "stride"),
        ({**HEADER, "generation": {}}, "generation"),
        ({**HEADER, "input": "b", "generation": None}, "input, generation"),
        ({key: HEADER[key] for key in ("journal", "input")}, "stride"),
    ):
        with pytest.raises(InputError, match=f"partial has finished documents of a run with another {differing}; run"):
            reopened(output, header)
        assert journal_path(output).read_bytes() == whole


@pytest.mark.parametrize("first", [b"", b'{"jour', b'{"journal": ', json.dumps({**HEADER, "input": "b"}).encode()])
def test_a_journal_without_finished_documents_is_emptied(first: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rows = stopped(output, chunks=0).read_bytes().partition(b"\n")[2]
    journal_path(output).write_bytes(first + b"\n" * (len(first) > 12) + rows * (len(first) > 12))
    assert reopened(output) == (0, 0, [])
    assert journal_path(output).read_text() == json.dumps(HEADER) + "\n"


def test_a_journal_truncated_anywhere_keeps_its_complete_chunks(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    whole = stopped(output).read_bytes()
    seen = set()
    for length in range(len(whole)):
        journal_path(output).write_bytes(whole[:length])
        done, refused, lines = reopened(output)
        assert (refused, lines) == (done // 3, list(range(1, done + 1)))
        seen.add(done)
    assert seen == {0, 3, 6}


def test_chunks_from_a_changed_byte_on_are_dropped(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    whole = stopped(output).read_bytes()
    second = whole.index(b'{"line": 4')
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1
        journal_path(output).write_bytes(changed)
        header, end = len(json.dumps(HEADER)) + 1, whole.rindex(b'{"line": 7')
        try:
            done = reopened(output)[0]
        except InputError:  # the header is another run's, or none
            assert position < header
            assert journal_path(output).read_bytes() == changed
            continue
        assert done == (0 if position < second else 3 if position < end else 6)


def test_two_runs_without_locks_do_not_mix_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.runtime.documents.journal.try_lock", lambda descriptor: True)
    output = tmp_path / "out.jsonl"
    with Journal(output, HEADER, CHUNK) as first, Journal(output, HEADER, CHUNK) as second:
        first.write({"line": 1})
        first.end_chunk(1, 0)
        second.write({"line": 1})
        with pytest.raises(LfxError, match=r"another process wrote to .*out\.jsonl\.partial, the journal of this run"):
            second.end_chunk(1, 0)
        with pytest.raises(LfxError, match="another process wrote"):
            list(first.rows())
    assert reopened(output) == (1, 0, [1])


def test_a_run_that_opened_the_journal_as_another_one_removed_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    path = stopped(output)

    def other_ends(descriptor: int) -> bool:
        path.unlink()
        return True

    monkeypatch.setattr("lfx.runtime.documents.journal.try_lock", other_ends)
    with pytest.raises(InputError, match=r"another run is writing .*out\.jsonl"):
        Journal(output, HEADER, CHUNK)


@pytest.mark.parametrize("content", [b"no JSON", b"[1]\n", b"\xff\n", b""])
def test_a_journal_without_a_header_has_no_options_of_a_stopped_run(content: bytes, tmp_path: Path) -> None:
    path = journal_path(tmp_path / "out.jsonl")
    path.write_bytes(content)
    assert read_header(tmp_path / "out.jsonl") == {}


def test_rows_that_another_process_changed_are_not_written(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, HEADER, CHUNK) as journal:
        journal.write({"line": 1})
        journal.end_chunk(1, 0)
        changed = journal.path.read_bytes().replace(b'"line": 1', b'"line": 2')
        journal.path.write_bytes(changed)  # of the same size
        with pytest.raises(LfxError, match="another process wrote"):
            list(journal.rows())


def test_rows_that_a_forked_child_flushes_are_noticed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, HEADER, CHUNK) as journal:
        journal.write({"line": 1})
        child = os.fork()
        if child == 0:
            journal._file.close()  # writes the child's copy of the buffer
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(LfxError, match="another process wrote"):
            journal.end_chunk(1, 0)


def sealed_marker(before: bytes, **changes: Any) -> bytes:
    """A marker with the correct digest."""
    chunk = {"done": 3, "refused": 0, "sha256": hashlib.sha256(before).hexdigest(), **changes}
    return (json.dumps({"chunk": chunk}) + "\n").encode()


MARKERS: dict[str, Callable[[bytes], bytes]] = {
    "done a string": lambda before: sealed_marker(before, done="3"),
    "done true": lambda before: sealed_marker(before, done=True),
    "done a float": lambda before: sealed_marker(before, done=3.0),
    "done NaN": lambda before: sealed_marker(before, done=float("nan")),
    "done negative": lambda before: sealed_marker(before, done=-3),
    "done nothing": lambda before: sealed_marker(before, done=0),
    "done above a chunk": lambda before: sealed_marker(before, done=CHUNK + 1),
    "done enormous": lambda before: sealed_marker(before, done=10**400),
    "refused null": lambda before: sealed_marker(before, refused=None),
    "refused above done": lambda before: sealed_marker(before, refused=4),
    "a foreign digest": lambda before: sealed_marker(b""),
    "a digest of another type": lambda before: sealed_marker(before, sha256=5),
    "one field more": lambda before: sealed_marker(before, more=1),
    "a list": lambda before: b'{"chunk":[]}\n',
    "deep": lambda before: b'{"chunk":' + b"[" * 100_000 + b"\n",
    "no JSON": lambda before: b'{"chunk": {"done": 3, "refu\n',
    "no UTF-8": lambda before: b'{"chunk": "\xff"}\n',
    "no end of line": lambda before: sealed_marker(before)[:-1],
}


@pytest.mark.parametrize("name", MARKERS)
def test_chunks_from_a_foreign_marker_on_are_dropped(name: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stopped(output, chunks=1)
    assert reopened(output)[0] == 3
    before = journal_path(output).read_bytes() + b'{"line": 4}\n{"line": 5}\n{"line": 6}\n'
    journal_path(output).write_bytes(before + MARKERS[name](before))
    assert reopened(output) == (3, 1, [1, 2, 3])
    journal_path(output).write_bytes(before + sealed_marker(before))  # with a correct marker the same rows are kept
    assert reopened(output)[0] == 6


@pytest.mark.parametrize(
    "rows",
    [
        b"",
        b'{"line": 4}\n{"line": 6}\n',
        b'{"line": 4}\n{"line": 5}\n{"line": 7}\n',
        b"garbage\n",
        b"[1]\n",
        b'{"id": 4}\n',
    ],
    ids=["none", "one is missing", "another line", "no JSON", "no object", "no line"],
)
def test_chunks_whose_rows_are_of_other_documents_are_dropped(rows: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stopped(output, chunks=1)
    assert reopened(output)[0] == 3
    before = journal_path(output).read_bytes() + rows
    journal_path(output).write_bytes(before + sealed_marker(before))
    assert reopened(output) == (3, 1, [1, 2, 3])


def test_a_journal_with_more_documents_than_the_input_is_dropped(bundle: MakeBundle, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input_ids": [3, 4]}\n' * 2)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with Engine(bundle("text-classification"), threads=1) as engine:
        with pytest.raises(KeyboardInterrupt):
            run_documents(engine, None, source, output, progress=stop)
        before = journal_path(output).read_bytes() + b"".join(b'{"line": %d}\n' % line for line in (3, 4, 5))
        journal_path(output).write_bytes(before + sealed_marker(before))
        assert run_documents(engine, None, source, output).resumed_at == 0
    assert [json.loads(row)["line"] for row in output.read_text().splitlines()] == [1, 2]


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def folder(path: Path, victim: Path) -> None:
    path.mkdir()


def fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [link, hard_link, folder, fifo])
def test_a_foreign_file_of_the_journal_s_name_is_left_alone(
    make: Callable[[Path, Path], None], bundle: MakeBundle, tmp_path: Path
) -> None:
    source, output, victim = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "victim"
    source.write_text('{"input_ids": [3, 4]}\n')
    victim.write_text("mine\n")
    make(journal_path(output), victim)
    with (
        Engine(bundle("text-classification"), threads=1) as engine,
        pytest.raises(InputError, match=r"out\.jsonl\.partial, the journal .* cannot be opened: .*; remove it"),
    ):
        run_documents(engine, None, source, output)
    assert victim.read_text() == "mine\n"
    assert not output.exists()


def test_links_at_the_output_and_beside_it_keep_their_targets(bundle: MakeBundle, tmp_path: Path) -> None:
    source, output, victim = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "victim"
    source.write_text('{"input_ids": [3, 4]}\n')
    victim.write_text("mine\n")
    output.symlink_to(victim)
    (tmp_path / ".out.jsonl.ready").symlink_to(victim)
    with Engine(bundle("text-classification"), threads=1) as engine:
        run_documents(engine, None, source, output)
    assert victim.read_text() == "mine\n"
    assert not output.is_symlink()
    assert json.loads(output.read_text())["line"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "victim", ".out.jsonl.ready"}


def test_a_run_of_many_groups_and_chunks_resumes_to_the_same_file(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 3)
    monkeypatch.setattr("lfx.runtime.documents.rows.AHEAD", 8)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lengths = [5, 400, 3, 7, 130, 700, 9, 2]
    source.write_text("".join(json.dumps({"text": "the fox " * (n // 2)}) + "\n" for n in lengths))
    bundled = bundle("text-classification")
    with Engine(bundled, threads=1) as engine:
        tokenizer = documents.Tokenizer(bundled, engine.signature)
        run_documents(engine, tokenizer, source, tmp_path / "expected.jsonl", stride=20)
        infer, left = engine._backend.infer, [0]  # type: ignore[union-attr]

        def killed(feeds: Any, *names: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return infer(feeds, *names, **options)

        engine._backend.infer = killed  # type: ignore[union-attr, method-assign]
        for batches in (1, 3, 5, 4):
            left[0] = batches
            with pytest.raises(KeyboardInterrupt):
                run_documents(engine, tokenizer, source, output, stride=20)
        left[0] = 0
        assert run_documents(engine, tokenizer, source, output, stride=20).resumed_at in (3, 6)
    assert output.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
