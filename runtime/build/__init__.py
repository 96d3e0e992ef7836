"""A bundle in, a TensorRT plan out."""

from __future__ import annotations

from lfx.runtime.build.builder import Options, build_engine

__all__ = ["Options", "build_engine"]
