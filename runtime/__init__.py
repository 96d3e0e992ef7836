"""ONNX or plan → answers. Imports numpy and the backend in use, never torch."""

from __future__ import annotations

from lfx.runtime.batcher import Batcher
from lfx.runtime.builder import build_engine
from lfx.runtime.engine import Engine

__all__ = ["Batcher", "Engine", "build_engine"]
