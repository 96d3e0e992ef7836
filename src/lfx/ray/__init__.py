"""Runs documents through Engines in a Ray cluster. Needs the extra [ray], which is imported on first use."""

from __future__ import annotations

from lfx.ray.batches import Documents
from lfx.ray.cluster import PoolSize
from lfx.ray.engine import EngineOptions
from lfx.ray.job import map_documents
from lfx.ray.serving import deployment

__all__ = ["Documents", "EngineOptions", "PoolSize", "deployment", "map_documents"]
