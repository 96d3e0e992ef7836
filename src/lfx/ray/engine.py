"""An Engine together with all that turns documents into rows, and the options that make one in any process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfx import __version__
from lfx.checks import file_path, whole_number
from lfx.errors import InputError
from lfx.ray.parts import Columns
from lfx.runtime import Engine
from lfx.runtime.batching import TOKEN_BUDGET
from lfx.runtime.documents.rows import Runner, Summary
from lfx.runtime.documents.run import MAX_WINDOWS, row_options
from lfx.runtime.postprocess import Postprocessor
from lfx.runtime.ragged import check_cuttable
from lfx.runtime.text_files import TOKENIZER, text_folder
from lfx.runtime.tokenizer import open_tokenizer


@dataclass(frozen=True)
class EngineOptions:
    """The options of `Engine` and of `run_documents`; an instance can be sent to another process.

    Args:
        model: a bundle or a plan, whose path must be the same on every machine; or a repository of the hub, which each
            machine fetches.
        backend, provider, threads, precision, token_budget: as for `lfx.runtime.Engine`.
        stride, max_windows: as for `lfx.runtime.documents.run_documents`.
        tokenizer: folder of the tokenizer. Default: the model's, if it has one.
    """

    model: str | Path
    backend: str = "auto"
    provider: str = "cpu"
    threads: int | None = None
    precision: str | None = None
    token_budget: int = TOKEN_BUDGET
    stride: int | None = None
    max_windows: int = MAX_WINDOWS
    tokenizer: str | Path | None = None


class DocumentEngine:
    """An Engine that takes documents and gives rows.

    Args:
        options: what to open.
    Attributes:
        columns: columns of the rows.
        facts: what decides the rows of an input, as JSON types.
    Raises:
        InputError: an option is out of range, or the model does not run documents.
        ArtifactError: the model or its tokenizer is missing or broken.
        DependencyError: the backend is not installed.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._engine = engine = Engine(
            options.model,
            options.backend,
            provider=options.provider,
            threads=options.threads,
            precision=options.precision,
            token_budget=options.token_budget,
        )
        model = engine.path
        if engine.signature.has_choices:
            raise InputError("documents are not run for multiple-choice; use Engine.run")
        if engine.signature.output_attentions:
            check_cuttable(engine.signature)
        stride = None if options.stride is None else whole_number(options.stride, "stride", 1)
        max_windows = whole_number(options.max_windows, "max_windows", 1)
        asked = None if options.tokenizer is None else file_path(options.tokenizer, "tokenizer")
        has_tokenizer = asked is not None or (text_folder(model, engine.text_source) / TOKENIZER).exists()
        tokenizer = open_tokenizer(model, engine.text_source, engine.signature, asked) if has_tokenizer else None
        postprocessor = None if tokenizer is None else Postprocessor(tokenizer)
        self._runner = engine, tokenizer, postprocessor, stride, max_windows
        self.columns = Columns.of(engine.signature, tokenizer is not None, stride is not None)
        self.facts = {"lfx": __version__, **row_options(Runner(*self._runner, Summary()))}

    def rows(self, documents: Iterable[Any]) -> tuple[list[dict[str, Any]], Summary]:
        """Run documents, as `run_documents` does.

        Args:
            documents: an iterable of documents, or errors in their place.
        Returns:
            The rows, whose `line` is the document's index from 0, and the counts of windows and tokens.
        Raises:
            LfxError: the engine fails on every input.
        """
        summary = Summary()
        return list(Runner(*self._runner, summary).rows(enumerate(documents))), summary
