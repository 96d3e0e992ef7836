"""The command-line options of an Engine, shared by the commands that open one."""

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
        "--backend",
        default="auto",
        show_default=True,
        help="Choose the backend: auto, onnxruntime, openvino, reference or tensorrt.",
    ),
    click.option(
        "--provider",
        default="cpu",
        show_default=True,
        help="Choose ONNX Runtime's execution provider: cpu, cuda or tensorrt.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        help="Set the number of threads of the backend.  [default: the backend's]",
    ),
    click.option(
        "--precision",
        help="Set the OpenVINO compute precision, overriding the bundle's: fp32 or bf16.  [default: the bundle's]",
    ),
)
_KERNELS_OPTION = click.option(
    "--kernels",
    default="auto",
    show_default=True,
    help="Choose what runs attention: fused (lfx's kernels), function (standard ops) or auto.",
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an Engine to a command, which gets one argument: `open_engine(path)` returns the Engine."""

    @functools.wraps(command)
    def with_engine(
        *, backend: str, provider: str, threads: int | None, precision: str | None, kernels: str, **others: Any
    ) -> Any:
        def open_engine(model: Path) -> Engine:
            from lfx.runtime import Engine

            return Engine(model, backend, provider=provider, threads=threads, precision=precision, kernels=kernels)

        return command(open_engine=open_engine, **others)

    return add_engine_options(_KERNELS_OPTION(with_engine))


def add_engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an Engine to a command, which gets their values: backend, provider, threads, precision."""
    for option in reversed(_ENGINE_OPTIONS):
        command = option(command)
    return command
