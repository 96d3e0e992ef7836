"""Builds a TensorRT plan from a bundle."""

from __future__ import annotations

from lfx.runtime.build.builder import Options, build_engine

__all__ = ["Options", "build_engine"]
