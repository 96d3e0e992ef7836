"""Runs a model over a file of documents (JSONL or Parquet), and writes one row per document or window."""

from __future__ import annotations

from lfx.runtime.documents.formats import is_documents
from lfx.runtime.documents.rows import Summary
from lfx.runtime.documents.run import MAX_WINDOWS, encoded, run_documents

__all__ = ["MAX_WINDOWS", "Summary", "encoded", "is_documents", "run_documents"]
