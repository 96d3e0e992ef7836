"""The class for `map_batches` of a Ray dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfx.errors import InputError, one_line, require
from lfx.ray.engine import DocumentEngine, EngineOptions
from lfx.runtime.documents.formats import FIELDS, parquet_document

_INPUT_COLUMNS = ("text", "pair", "input_ids")


class Documents:
    """Runs the rows of a Ray dataset as documents.

        dataset.map_batches(
            lfx.ray.Documents, fn_constructor_args=["my-bundle"], batch_format="pyarrow", batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1,
        )

    A batch has the columns text or input_ids, and may have pair. In their place the result has the columns of a row
    of `lfx run`: window (with a stride), tokens, answers, outputs and error; other columns are kept. Documents of
    similar length of a batch run together. Leave Ray a CPU for reading the dataset.

    Args:
        model, options: as for `lfx.ray.EngineOptions`; set threads to the actor's number of CPUs.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._engine = DocumentEngine(EngineOptions(model, **options))

    def __call__(self, batch: Any) -> Any:
        """Run a batch.

        Args:
            batch: a pyarrow table, or what pyarrow makes a table of.
        Returns:
            A pyarrow table, with one row for each document or window, in order.
        Raises:
            InputError: the batch is no table of documents, or has a column of the name of a result.
            LfxError: the engine fails on every input.
        """
        pyarrow = require("pyarrow", "ray")
        try:
            table = batch if isinstance(batch, pyarrow.Table) else pyarrow.table(batch)
            documents = table.select([name for name in FIELDS if name in table.column_names and name != "id"])
        except Exception as error:  # such as for an array of two axes, or for two columns of one name
            raise InputError(
                f"pyarrow makes no table of documents of the batch, a {type(batch).__name__} ({one_line(error, 80)}); "
                'give map_batches batch_format="pyarrow"'
            ) from error
        results = self._engine.columns.results()
        if taken := [name for name, _ in results if name in table.column_names]:
            raise InputError(f"the dataset has a column {taken[0]!r}, the name of a result; rename it")
        rows, _ = self._engine.rows(parquet_document(documents, i) for i in range(table.num_rows))
        lines = pyarrow.array([row["line"] for row in rows], pyarrow.int64())
        kept = [i for i, name in enumerate(table.column_names) if name not in _INPUT_COLUMNS]
        columns = [_taken(table.column(i), lines) for i in kept]
        columns += [pyarrow.array([row.get(name) for row in rows], column_type) for name, column_type in results]
        fields = [*(table.schema.field(i) for i in kept), *(pyarrow.field(*result) for result in results)]
        return pyarrow.table(columns, pyarrow.schema(fields, table.schema.metadata))


def _taken(column: Any, lines: Any) -> Any:
    """The rows of a column by their indices, of any type: pyarrow's `take` has no kernel for views of strings."""
    pyarrow = require("pyarrow", "ray")
    try:
        return column.take(lines)
    except pyarrow.ArrowNotImplementedError:
        chunks = [chunk for i in lines.to_pylist() for chunk in column.slice(i, 1).chunks]
        return pyarrow.chunked_array(chunks, column.type)
