"""The options of commands that open an Engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lfx.runtime import Engine

    OpenEngine = Callable[[Path], Engine]

_ENGINE_OPTIONS = (
    click.option(
        "--backend", default="auto", show_default=True, help="auto, onnxruntime, openvino, reference or tensorrt."
    ),
    click.option("--provider", default="cpu", show_default=True, help="Of ONNX Runtime: cpu, cuda or tensorrt."),
    click.option(
        "--threads", type=click.IntRange(1, 1024), help="Threads of one run.  [default: the backend's choice]"
    ),
    click.option(
        "--precision", help="Of OpenVINO's arithmetic, whatever the bundle's is: fp32 or bf16.  [default: the bundle's]"
    ),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of an Engine, as one argument `open_engine`: a function of the model's path."""

    @functools.wraps(command)
    def with_engine(*, backend: str, provider: str, threads: int | None, precision: str | None, **others: Any) -> Any:
        def open_engine(model: Path) -> Engine:
            from lfx.runtime import Engine

            return Engine(model, backend, provider=provider, threads=threads, precision=precision)

        return command(open_engine=open_engine, **others)

    found: Callable[..., Any] = with_engine
    for option in reversed(_ENGINE_OPTIONS):
        found = option(found)
    return found
