"""A Ray Serve deployment of a model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfx.checks import parse_json, shown
from lfx.errors import InputError, one_line, require
from lfx.ray.engine import DocumentEngine, EngineOptions

_TOGETHER = 256  # documents of a run


class Service:
    """Answers HTTP requests: a document in, its rows out, as `lfx run` has them.

    Documents that arrive within 5 ms run together.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._engine = DocumentEngine(EngineOptions(model, **options))
        batch = require("ray.serve", "ray").batch(max_batch_size=_TOGETHER, batch_wait_timeout_s=0.005)
        self._run_one = batch(self._run_together)  # takes one document, and returns its rows

    async def __call__(self, request: Any) -> Any:
        """Answer a request whose body is a document, or a list of documents, in JSON."""
        try:
            body = parse_json(await request.body())
        except ValueError as error:  # also for bytes that are not UTF-8
            return _answer({"error": f"the body is no JSON: {one_line(error)}"}, 400)
        if isinstance(body, list):
            return _answer(await asyncio.gather(*map(self._run_one, body)), 200)
        rows = await self._run_one(body)
        return _answer(rows, 400 if "error" in rows[0] else 200)

    async def _run_together(self, documents: list[Any]) -> list[list[dict[str, Any]]]:
        rows, _ = await asyncio.to_thread(self._engine.rows, documents)
        grouped: list[list[dict[str, Any]]] = [[] for _ in documents]
        for row in rows:
            grouped[row.pop("line")].append(row)
        return grouped


def deployment(model: str | Path, *, actor: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Make a Ray Serve application of a model: `serve.run(lfx.ray.deployment("my-bundle"))`.

    Args:
        model, options: as for `lfx.ray.EngineOptions`.
        actor: options of `serve.deployment`, such as {"num_replicas": 2, "ray_actor_options": {"num_cpus": 4}}.
    Raises:
        InputError: `model` is no path, or `actor` no dict of options that Ray Serve takes.
        DependencyError: Ray Serve is not installed.
    """
    if not isinstance(actor, Mapping | None):
        raise InputError(f"actor is {shown(actor)}; give a dict of options of serve.deployment, or leave it out")
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model is {shown(model)}; give a path")
    serve = require("ray.serve", "ray")
    try:
        # Ray lets a replica have 5 requests by default, so that no more would run together. Serve checks
        # ray_actor_options when it gets the class.
        make = serve.deployment(**{"name": "lfx", "max_ongoing_requests": _TOGETHER, **(actor or {})})(Service)
    except (TypeError, ValueError) as error:
        raise InputError(f"actor is {shown(actor)}, which serve.deployment does not take: {one_line(error)}") from error
    return make.bind(str(model), **options)


def _answer(content: Any, status: int) -> Any:
    return require("starlette.responses", "ray").JSONResponse(content, status)
