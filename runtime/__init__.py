"""ONNX or plan → answers. Imports numpy and the backend in use, never torch."""

from __future__ import annotations

from lfx.runtime.builder import build_engine
from lfx.runtime.engine import Engine

__all__ = ["Engine", "build_engine"]
