"""`map_documents` and the classes of `lfx.ray` with Ray replaced by calls in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lfx.ray
import lfx.ray.job
from lfx.errors import InputError
from lfx.ray.engine import DocumentEngine, EngineOptions
from lfx.ray.job import map_documents
from tests.conftest import MakeBundle
from tests.ray.test_map import TWO, rows_of, rows_of_run, write_documents
from tests.ray.test_pool import FakeRay

pyarrow = pytest.importorskip("pyarrow")


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_the_rows_of_a_map_are_those_of_lfx_run(
    file_format: str, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def connected(address: str | None) -> Iterator[FakeRay]:
        yield FakeRay()

    monkeypatch.setattr(lfx.ray.job, "connected", connected)
    monkeypatch.setattr(lfx.ray.job, "machines", lambda ray: [{"CPU": 3.0}])
    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 300)
    options = EngineOptions(model, threads=1)
    summary, facts = map_documents(source, tmp_path / "out", options, TWO, file_format=file_format)
    expected = rows_of_run(model, source, tmp_path)
    if file_format == "parquet":  # ids are text there, since one column has one type
        expected = [{**row, "id": str(row["id"])} for row in expected]
    assert rows_of(tmp_path / "out") == expected
    assert (summary.documents, summary.refused, summary.resumed_at) == (300, 4, 0)
    assert facts["backend"].startswith("onnxruntime")
    again, _ = map_documents(source, tmp_path / "out", options, TWO, file_format=file_format)
    assert (again.documents, again.resumed_at) == (300, 300)


def test_a_tokenizer_that_is_no_path_is_refused(bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match="tokenizer is 5; give a path"):
        DocumentEngine(EngineOptions(bundle(), tokenizer=5))  # type: ignore[arg-type]


def test_a_multiple_choice_model_is_refused(bundle: MakeBundle) -> None:
    with pytest.raises(InputError, match="documents are not run for multiple-choice"):
        DocumentEngine(EngineOptions(bundle("multiple-choice")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"options": "my-bundle"},
            r"options and size are str and PoolSize; give EngineOptions\(model\)",
        ),
        ({"size": 2}, "options and size are EngineOptions and int"),
        ({"source": None}, "the input is None; give a path or a URI"),
        ({"options": EngineOptions(5)}, "the model is 5; give a path"),  # type: ignore[arg-type]
        ({"options": EngineOptions("model", tokenizer=5)}, "the tokenizer is 5; give a path"),  # type: ignore[arg-type]
        ({"output": "/dev/null"}, "/dev/null cannot be written: it is no folder"),
        ({"output": "/no/such/folder"}, "/no/such/folder cannot be written: it is no folder, or the folder that it is"),
    ],
)
def test_wrong_arguments_are_refused_before_ray_starts(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lfx.ray.job, "_model_of_actors", lambda model, address: model)
    monkeypatch.setattr(lfx.ray.job, "connected", lambda address: pytest.fail("Ray was started"))
    source = write_documents(tmp_path / "in.jsonl", 1)
    arguments = {
        "source": source,
        "output": tmp_path / "out",
        "options": EngineOptions("model"),
        "size": TWO,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        map_documents(**arguments)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": np.array([[5, 6], [7, 8]])},  # as Ray gives ids of one length in batch_format="numpy"
        ["the fox"],
        pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]),
    ],
    ids=["array of two axes", "list", "two columns of one name"],
)
def test_a_batch_that_is_no_table_of_documents_is_refused(batch: Any, bundle: MakeBundle) -> None:
    documents = lfx.ray.Documents(bundle("text-classification"), threads=1)
    with pytest.raises(
        InputError, match=r'pyarrow makes no table of documents .*; give map_batches batch_format="pyarrow"'
    ):
        documents(batch)


def test_options_of_a_deployment_that_are_no_dict_are_refused() -> None:
    with pytest.raises(InputError, match="actor is 2; give a dict"):
        lfx.ray.deployment("model", actor=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "actor",
    [
        {"num_replica": 2},
        {"num_replicas": -1},
        {"ray_actor_options": 4},
        {"ray_actor_options": {"num_cpu": 4}},
        {"ray_actor_options": {"num_cpus": "4"}},
        {"ray_actor_options": {"num_cpus": -1}},
    ],
    ids=str,
)
def test_options_that_ray_serve_does_not_take_are_refused(actor: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"actor is .*, which serve\.deployment does not take: "):
        lfx.ray.deployment("model", actor=actor)


def test_a_deployment_may_have_another_name() -> None:
    assert lfx.ray.deployment("model", actor={"name": "embedder"})._bound_deployment.name == "embedder"
    assert lfx.ray.deployment("model")._bound_deployment.name == "lfx"


def test_a_replica_takes_as_many_requests_as_run_together() -> None:
    made = lfx.ray.deployment("model", actor={"name": "own"})
    assert (made._bound_deployment.name, made._bound_deployment.max_ongoing_requests) == ("own", 256)
    other = lfx.ray.deployment("model", actor={"max_ongoing_requests": 7})
    assert other._bound_deployment.max_ongoing_requests == 7


def test_a_batch_of_a_dataset_gets_the_columns_of_lfx_run(bundle: MakeBundle, tmp_path: Path) -> None:
    model, source = bundle("text-classification"), write_documents(tmp_path / "in.jsonl", 40)
    texts = [json.loads(line).get("text") for line in source.read_text().splitlines()]
    documents = lfx.ray.Documents(str(model), threads=1)
    batch = pyarrow.table({"key": range(40), "text": texts})
    results = documents(batch).to_pylist()
    assert set(results[0]) == {"key", "tokens", "answers", "outputs", "error"}
    for row, (key, other) in zip(results, enumerate(rows_of_run(model, source, tmp_path)), strict=True):
        assert row["key"] == key
        assert (row["error"] is None) == ("error" not in other)
        if "outputs" in other:
            assert row["outputs"]["logits"] == pytest.approx(other["outputs"]["logits"])
            assert row["answers"] == other["answers"]
    alone = documents(batch.select(["text"]))
    assert alone.equals(documents(batch).drop_columns(["key"]))
    with pytest.raises(InputError, match="the dataset has a column 'tokens', the name of a result; rename it"):
        documents(batch.append_column("tokens", batch["key"]))
    (padded,) = documents(pyarrow.table({"input_ids": [[5, 6, 1]], "attention_mask": [[1, 1, 0]]})).to_pylist()
    assert "attention_mask must be a 1 for each" in padded["error"]


def test_a_column_of_any_type_is_kept(bundle: MakeBundle) -> None:
    documents = lfx.ray.Documents(str(bundle("text-classification")), threads=1, stride=100)
    texts = pyarrow.array(["the fox", "quick " * 300])
    for column in (
        pyarrow.array(["ab", "c" * 20], pyarrow.string()),
        pyarrow.array(["ab", "c" * 20], pyarrow.string_view()),
        pyarrow.array([["ab"], ["c" * 20]], pyarrow.list_(pyarrow.string_view())),
    ):
        kept = documents(pyarrow.table({"text": texts, "other": column}))["other"]
        assert kept.type == column.type
        assert kept.to_pylist() == [column[0].as_py(), *[column[1].as_py()] * (len(kept) - 1)]
        assert len(kept) > 2
    assert documents(pyarrow.table({"text": texts, "other": column}).slice(0, 0)).num_rows == 0


class Serve(ModuleType):
    """The functions of `ray.serve` that a deployment calls; documents run one by one."""

    @staticmethod
    def batch(**_: Any) -> Callable[[Any], Any]:
        def one_by_one(together: Any) -> Any:
            async def run_one(document: Any) -> Any:
                (rows,) = await together([document])
                return rows

            return run_one

        return one_by_one


class Request:
    """A request of Starlette's."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def body(self) -> bytes:
        return self._content


def test_a_service_answers_with_rows(bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfx.ray.serving import Service

    monkeypatch.setitem(sys.modules, "ray.serve", Serve("ray.serve"))
    service = Service(bundle("text-classification"), threads=1)

    def ask(body: bytes) -> tuple[int, Any]:
        reply = asyncio.run(service(Request(body)))
        return reply.status_code, json.loads(reply.body)

    status, (row,) = ask(b'{"text": "the fox", "id": 7}')
    assert (status, row["id"]) == (200, 7)
    assert row["answers"][0]["label"].startswith("LABEL_")
    status, ((good,), (bad,)) = ask(b'[{"text": "the fox"}, {}]')
    assert status == 200
    assert good["outputs"] == row["outputs"]
    assert bad["error"].startswith("the document has the fields none")
    status, error = ask(b"{")
    assert (status, "the body is no JSON" in error["error"]) == (400, True)
    assert ask(b"{}")[0] == 400
