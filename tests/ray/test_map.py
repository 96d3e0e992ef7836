"""`map_documents`, `lfx map` and `lfx.ray` in a cluster of two machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

import lfx.ray
from lfx.errors import ArtifactError, InputError, LfxError
from lfx.ray.actor import DocumentActor, Piece
from lfx.ray.cluster import PoolSize
from lfx.ray.engine import EngineOptions
from lfx.ray.inputs import Document
from lfx.ray.job import Progress, map_documents
from lfx.ray.journal import JOURNAL
from lfx.runtime import Engine
from lfx.runtime.documents import run_documents
from lfx.runtime.tokenizer import Tokenizer
from tests.conftest import MakeBundle, SmallDisk

pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
ONE, TWO = PoolSize(actors=1), PoolSize(actors=2)


def write_documents(path: Path, count: int) -> Path:
    """Documents of 1 to 23 words, some of them broken."""
    lines = []
    for i in range(count):
        text = " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1 + i % 23))
        document: dict[str, Any] = {"id": f"document {i}", "text": text}
        lines.append(json.dumps({"id": i} if i % 97 == 5 else document))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows of all parts in the order of the parts, without the columns that are null."""
    rows: list[dict[str, Any]] = []
    for path in sorted(output.glob("part-*")):
        if path.suffix == ".parquet":
            found = parquet.read_table(path).to_pylist()
            rows += [{name: value for name, value in row.items() if value is not None} for row in found]
        else:
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def rows_of_run(model: Path, source: Path, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of `lfx run`, with the name of the file."""
    with Engine(model, threads=1) as engine:
        tokenizer = Tokenizer(model, engine.signature)
        run_documents(engine, tokenizer, source, folder / "run.jsonl", **options)
    return [{"file": source.name, **json.loads(line)} for line in (folder / "run.jsonl").read_text().splitlines()]


def actor_process() -> psutil.Process:
    """The process of the actor that started last. Ray names it after its class; the system keeps 15 characters."""
    processes = psutil.process_iter(["name", "create_time"])
    actors = [process for process in processes if str(process.info["name"]).startswith("ray::DocumentAc")]
    return max(actors, key=lambda process: process.info["create_time"])


def small_parts(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Make parts of fewer documents, so that a few documents make several."""
    monkeypatch.setattr("lfx.ray.job.CHUNK", size)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_the_rows_are_those_of_lfx_run(file_format: str, bundle: MakeBundle, tmp_path: Path) -> None:
    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 600)
    options, errors = EngineOptions(model), list[str]()
    summary, facts = map_documents(
        source, tmp_path / "out", options, TWO, file_format=file_format, report=errors.append
    )
    expected = rows_of_run(model, source, tmp_path)
    if file_format == "parquet":  # ids are text there, since one column has one type
        expected = [{**row, "id": str(row["id"])} for row in expected]
    assert rows_of(tmp_path / "out") == expected
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        JOURNAL,
        *(f"part-{number:08}.{file_format}" for number in range(3)),
    ]
    assert (summary.documents, summary.refused, summary.resumed_at) == (600, 7, 0)
    assert summary.tokens == sum(row.get("tokens", 0) for row in expected)
    assert facts["backend"].startswith("onnxruntime")
    assert "in.jsonl:6: the document has the fields id; give either text or input_ids" in errors


def test_windows_and_all_files_of_a_folder_are_in_the_order_of_file_and_line(
    bundle: MakeBundle, tmp_path: Path
) -> None:
    model, folder = bundle("text-classification"), tmp_path / "in"
    write_documents(folder / "b.jsonl", 40)
    write_documents(folder / "a" / "c.jsonl", 30)
    table = parquet.read_table  # the same documents as Parquet
    import pyarrow

    rows = [json.loads(line) for line in (folder / "b.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": row.get("text")} for row in rows]), folder / "z.parquet")
    for hidden in ("_lfx_map.jsonl", ".x.jsonl", "notes.txt"):
        (folder / hidden).write_text("not a document\n")
    options = EngineOptions(model, stride=8)
    map_documents(folder, tmp_path / "out", options, TWO)
    written = rows_of(tmp_path / "out")
    places = [(row["file"], row["line"], row.get("window", 0)) for row in written]
    assert places == sorted(places)
    counts = {name: len({row["line"] for row in written if row["file"] == name}) for name, _, _ in places}
    assert counts == {"a/c.jsonl": 30, "b.jsonl": 40, "z.parquet": 40}
    schemas = {table(path).schema for path in (tmp_path / "out").glob("*.parquet")}
    assert len(schemas) == 1
    for row, other in zip(
        (row for row in written if row["file"] == "b.jsonl"),
        rows_of_run(model, folder / "b.jsonl", tmp_path, stride=8),
        strict=True,
    ):
        assert row["line"] == other["line"]
        if "outputs" in other:
            assert row["outputs"]["logits"] == pytest.approx(other["outputs"]["logits"], abs=1e-5)


def test_an_input_of_pyarrows_file_systems_is_read(bundle: MakeBundle, tmp_path: Path) -> None:
    import pyarrow

    write_documents(tmp_path / "in" / "a.jsonl", 20)
    parquet.write_table(pyarrow.table({"input_ids": [[5, 6], [7]]}), tmp_path / "in" / "b.parquet")
    map_documents((tmp_path / "in").as_uri(), tmp_path / "out", EngineOptions(bundle("text-classification")), ONE)
    rows = rows_of(tmp_path / "out")
    assert [(row["file"], row["line"]) for row in rows] == [
        *(("a.jsonl", n) for n in range(1, 21)),
        *(("b.parquet", n) for n in (1, 2)),
    ]
    assert [row["tokens"] for row in rows[-2:]] == [2, 1]


def test_a_stopped_run_makes_the_missing_parts_only(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, 16)
    model, source, output = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 90), tmp_path / "out"

    def stop(state: Progress) -> None:
        if state.documents >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_documents(source, output, EngineOptions(model), ONE, file_format="jsonl", progress=stop)
    kept = {path: path.stat().st_ino for path in output.glob("part-*")}
    assert len(kept) == 2
    map_documents(source, tmp_path / "whole", EngineOptions(model), ONE, file_format="jsonl")
    with (output / JOURNAL).open("ab") as journal:  # a kill in the middle of a line
        journal.write(b'{"part": 2, "docum')
    truncated = sorted(kept)[1]
    truncated.write_bytes(truncated.read_bytes()[:-9])
    summary, _ = map_documents(source, output, EngineOptions(model), TWO, file_format="jsonl")
    assert (summary.documents, summary.resumed_at) == (90, 16)
    first = sorted(kept)[0]
    assert first.stat().st_ino == kept[first]
    for path in (tmp_path / "whole").glob("part-*"):
        assert (output / path.name).read_bytes() == path.read_bytes()
    again, _ = map_documents(source, output, EngineOptions(model), ONE, file_format="jsonl")
    assert (again.resumed_at, again.tokens) == (90, 0)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "stride": (lambda _: {"stride": 9}, "another stride; run it with the same options"),
    "input": (lambda source: write_documents(source, 21) and {}, "another input; run it"),
    "format": (lambda _: {"file_format": "parquet"}, "another format; run it"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_output_of_other_options_is_refused(name: str, bundle: MakeBundle, tmp_path: Path) -> None:
    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 20)
    map_documents(source, tmp_path / "out", EngineOptions(model), ONE, file_format="jsonl")
    before = (tmp_path / "out" / "part-00000000.jsonl").read_bytes()
    change, reason = CHANGES[name]
    options = change(source)
    file_format = options.pop("file_format", "jsonl")
    with pytest.raises(InputError, match=reason):
        map_documents(source, tmp_path / "out", EngineOptions(model, **options), ONE, file_format=file_format)
    assert (tmp_path / "out" / "part-00000000.jsonl").read_bytes() == before


def test_an_input_that_changes_during_the_run_is_an_error(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, 16)
    source = write_documents(tmp_path / "in.jsonl", 100)
    with pytest.raises(InputError, match=r"in\.jsonl in .* was changed during the run"):
        map_documents(
            source,
            tmp_path / "out",
            EngineOptions(bundle("text-classification")),
            ONE,
            progress=lambda state: None if state.documents else os.utime(source, (1, 1)),
        )


def test_a_killed_actor_is_replaced_and_no_row_is_lost(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, 32)
    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 400)
    lines, killed = list[str](), list[int]()

    def kill(state: Progress) -> None:
        if state.documents >= 64 and not killed:
            victim = actor_process()
            killed.append(victim.pid)
            victim.kill()

    map_documents(
        source, tmp_path / "out", EngineOptions(model), ONE, file_format="jsonl", progress=kill, report=lines.append
    )
    monkeypatch.undo()
    map_documents(source, tmp_path / "whole", EngineOptions(model), ONE, file_format="jsonl")
    places = [(row["line"], row.get("error")) for row in rows_of(tmp_path / "out")]
    assert places == [(row["line"], row.get("error")) for row in rows_of(tmp_path / "whole")]
    assert killed
    assert "an actor ended: its process was killed; its documents run again" in lines


def test_the_rows_of_a_machine_that_is_gone_come_from_another(
    cluster: Any, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(DocumentActor):  # so that all actors start before the documents are done
        def run(self, documents: list[Document]) -> Piece:
            time.sleep(0.3)
            return super().run(documents)

    small_parts(monkeypatch, 8)
    monkeypatch.setattr("lfx.ray.pool.DocumentActor", Slow)
    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 400)
    node = cluster.add_node(num_cpus=1, num_gpus=0)
    lines, gone = list[str](), list[bool]()

    def remove(state: Progress) -> None:
        if state.actors == 4 and state.documents >= 16 and not gone:
            gone.append(True)
            cluster.remove_node(node, allow_graceful=False)

    options = EngineOptions(model)
    size = PoolSize(actors=4)
    map_documents(source, tmp_path / "out", options, size, file_format="jsonl", progress=remove, report=lines.append)
    assert [row["line"] for row in rows_of(tmp_path / "out")] == list(range(1, 401))
    assert sum("error" in row for row in rows_of(tmp_path / "out")) == 5
    assert gone
    assert any(line.startswith("an actor ended: its") for line in lines), lines


def test_a_document_that_ends_its_actors_is_one_refused_row(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mortal(DocumentActor):
        def run(self, documents: list[Document]) -> Piece:
            if any(document["id"] == "document 6" for _, _, document in documents):
                os._exit(1)
            return super().run(documents)

    small_parts(monkeypatch, 4)
    monkeypatch.setattr("lfx.ray.pool.DocumentActor", Mortal)
    source = write_documents(tmp_path / "in.jsonl", 14)
    summary, _ = map_documents(source, tmp_path / "out", EngineOptions(bundle("text-classification")), ONE)
    rows = rows_of(tmp_path / "out")
    assert [row["line"] for row in rows] == list(range(1, 15))
    assert rows[6]["error"] == "2 actors ended while they ran this document: its process was killed"
    assert rows[6]["id"] == "document 6"
    assert [row["line"] for row in rows if "error" in row] == [6, 7]
    assert summary.refused == 2


def test_a_full_disk_is_a_clear_line_and_the_same_call_goes_on(
    bundle: MakeBundle, tmp_path: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, 32)
    disk = small_disk()
    source = write_documents(tmp_path / "in.jsonl", 200)
    (disk / "filler").write_bytes(b"x" * 100_000)
    options = EngineOptions(bundle("text-classification"))
    with pytest.raises(InputError, match=r"out cannot be written: .*No space left .*; make room on its disk"):
        map_documents(source, disk / "out", options, ONE, file_format="jsonl")
    kept = len(rows_of(disk / "out"))
    (disk / "filler").unlink()
    summary, _ = map_documents(source, disk / "out", options, ONE, file_format="jsonl")
    assert summary.resumed_at == kept
    assert [row["line"] for row in rows_of(disk / "out")] == list(range(1, 201))


def test_a_model_that_cannot_be_opened_is_its_own_error(bundle: MakeBundle, tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in.jsonl", 3)
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        map_documents(source, tmp_path / "out", EngineOptions("nowhere"), ONE)
    options = EngineOptions(bundle("text-classification"), backend="nonsense")
    with pytest.raises(LfxError, match="nonsense"):
        map_documents(source, tmp_path / "out", options, ONE)
    assert not (tmp_path / "out").exists()


def test_actors_with_different_models_are_refused(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(DocumentActor):
        def open(self, options: EngineOptions, file_format: str) -> Any:
            facts, columns = super().open(options, file_format)
            return {**facts, "model": str(os.getpid())}, columns

    small_parts(monkeypatch, 4)
    monkeypatch.setattr("lfx.ray.pool.DocumentActor", Other)
    source = write_documents(tmp_path / "in.jsonl", 2000)
    with pytest.raises(LfxError, match="two actors have opened models that differ in model; give all machines"):
        map_documents(source, tmp_path / "out", EngineOptions(bundle("text-classification")), TWO)


def run_map(cluster: Any, *arguments: str | Path) -> list[str]:
    """The command line of `lfx map` in the cluster."""
    code = "import sys; sys.argv[0] = 'lfx'; from lfx.cli import main; main()"
    return [sys.executable, "-P", "-c", code, "map", *map(str, arguments), "--address", cluster.address]


def test_the_command_prints_nothing_of_rays_and_runs_no_code_of_its_folder(
    cluster: Any, bundle: MakeBundle, tmp_path: Path
) -> None:
    source = write_documents(tmp_path / "in.jsonl", 5)
    command = run_map(cluster, source, tmp_path / "out", "--model", bundle("text-classification"), "--json")
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('code of the current folder was run')")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["documents"], printed["refused"]) == (5, 0)
    assert all(line.startswith("… ") for line in done.stderr.splitlines()), done.stderr
    assert len(rows_of(tmp_path / "out")) == 5


def test_a_killed_job_goes_on_with_what_is_missing(cluster: Any, bundle: MakeBundle, tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in.jsonl", 4000)
    command = run_map(cluster, source, tmp_path / "out", "--model", bundle("text-classification"), "--actors", "1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        for line in job.stderr:
            if line.startswith("… 512 of"):
                job.send_signal(signal.SIGKILL)
                break
    kept = len(list((tmp_path / "out").glob("part-*")))
    assert 2 <= kept < 16
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert f"{256 * kept:,} in an earlier run" in done.stdout or "in an earlier run" in done.stdout
    assert [row["line"] for row in rows_of(tmp_path / "out")] == list(range(1, 4001))


def test_a_dataset_of_ray_data_gets_the_columns_of_lfx_run(bundle: MakeBundle, tmp_path: Path) -> None:
    import ray

    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 40)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    made = datetime(2026, 1, 1)  # a column that is kept may be of any type
    items = [{"key": i, "id": made, "text": row.get("text")} for i, row in enumerate(rows)]
    progress = ray.data.DataContext.get_current()
    progress.enable_progress_bars = False
    dataset = ray.data.from_items(items, override_num_blocks=1).map_batches(
        lfx.ray.Documents,
        fn_constructor_args=[str(model)],
        fn_constructor_kwargs={"threads": 1},
        batch_format="pyarrow",
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    results = sorted(dataset.take_all(), key=lambda row: row["key"])
    expected = rows_of_run(model, source, tmp_path)
    assert [row["key"] for row in results] == list(range(40))
    assert all(row["id"] == made for row in results)
    assert set(results[0]) == {"key", "id", "tokens", "answers", "outputs", "error"}
    for row, other in zip(results, expected, strict=True):
        assert (row["error"] is None) == ("error" not in other)
        if "outputs" in other:
            assert row["outputs"]["logits"] == pytest.approx(other["outputs"]["logits"])
            assert row["answers"] == other["answers"]


def test_a_deployment_of_ray_serve_answers_with_rows(bundle: MakeBundle) -> None:
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(lfx.ray.deployment(bundle("text-classification"), threads=1))

        def ask(body: bytes) -> Any:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/", data=body)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        (row,) = ask(b'{"text": "the fox", "id": 7}')
        assert row["id"] == 7
        assert row["answers"][0]["label"].startswith("LABEL_")
        (good,), (bad,) = ask(b'[{"text": "the fox"}, {}]')
        assert good["outputs"] == row["outputs"]
        assert bad["error"].startswith("the document has the fields none")
        for body, reason in ((b"{", "the body is no JSON"), (b"{}", "the document has the fields none")):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(body)
            assert caught.value.code == 400
            assert reason in caught.value.read().decode()
    finally:
        serve.shutdown()
