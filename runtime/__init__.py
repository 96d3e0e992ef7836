"""Runs bundles, ONNX files and TensorRT plans. Imports numpy and the backend in use, never torch."""

from __future__ import annotations

from lfx.runtime.batcher import Batcher
from lfx.runtime.build import build_engine
from lfx.runtime.engine import Engine
from lfx.runtime.signing import Verified, verify

__all__ = ["Batcher", "Engine", "Verified", "build_engine", "verify"]
