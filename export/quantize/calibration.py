"""Reading windows of text, for calibration of an int8 model and for measuring its accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import quantization as ortq

from lfx.errors import ExportError
from lfx.manifest import sha256
from lfx.parity import Arrays
from lfx.runtime.documents import encoded, is_documents
from lfx.runtime.inputs import prepare
from lfx.signature import Signature

SHORTEST = 64  # shortest window, in tokens, that a text is cut into to get more windows
Feeds = dict[str, NDArray[np.int64]]


def read_calibration(
    source: Path, signature: Signature, folder: Path, samples: int, *, unlisted: bool = False
) -> tuple[list[Feeds], dict[str, Any]]:
    """Read windows of a calibration file as graph inputs.

    Args:
        source: a text file, .jsonl or .parquet.
        folder: holds the tokenizer.
        samples: largest number of windows, spread evenly over the file.
        unlisted: as for `lfx.runtime.tokenizer.Tokenizer`.
    Returns:
        The windows, and the manifest's entry `calibration`: file, SHA-256, number of windows and of tokens.
    Raises:
        ExportError: the file has fewer than two windows.
        InputError: the file cannot be read, or the model cannot take a document in it.
    """
    limited = signature
    lengths = [len(window.ids) for window in encoded(source, limited, folder, unlisted=unlisted)]
    if len(lengths) < samples and not is_documents(source):  # cut a short text into more, shorter windows
        shorter = max(sum(lengths) // samples, SHORTEST)
        limited = dataclasses.replace(signature, max_seqlen=min(shorter, signature.max_seqlen or shorter))
        lengths = [len(window.ids) for window in encoded(source, limited, folder, unlisted=unlisted)]
    if len(lengths) < 2:
        raise ExportError(
            f"{source} gives {len(lengths)} windows of text; give a text of 2 or more: one calibrates, one measures "
            "the accuracy"
        )
    # Read the file again, so that only the chosen windows are in memory.
    indices = set(np.linspace(0, len(lengths) - 1, min(samples, len(lengths))).astype(int).tolist())
    window_ids = [
        window.ids for i, window in enumerate(encoded(source, limited, folder, unlisted=unlisted)) if i in indices
    ]
    feeds = [prepare(ids, None, None, signature)[0] for ids in window_ids]
    about = {
        "file": source.name,
        "sha256": sha256(source),
        "windows": len(window_ids),
        "tokens": sum(map(len, window_ids)),
    }
    return feeds, about


class CalibrationReader(ortq.CalibrationDataReader):  # type: ignore[misc]
    """Iterates over the inputs of a graph, in the interface of ONNX Runtime's quantizer."""

    def __init__(self, feeds: Iterable[Arrays]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Arrays | None:
        """Return the next inputs, or None after the last ones."""
        return next(self._feeds, None)
