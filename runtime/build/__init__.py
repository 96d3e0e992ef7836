"""Builds a TensorRT plan from a bundle."""

from __future__ import annotations

from lfx.runtime.build.arguments import Options
from lfx.runtime.build.builder import build_engine

__all__ = ["Options", "build_engine"]
