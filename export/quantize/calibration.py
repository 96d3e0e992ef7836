"""The windows of the user's text that calibrate an int8 model, and those that judge it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import quantization as ortq

from lfx.errors import ExportError
from lfx.manifest import sha256
from lfx.runtime.documents import encoded, is_documents
from lfx.runtime.inputs import prepare
from lfx.signature import Signature

SHORTEST = 64  # tokens of a window that a short text is cut into
Feeds = dict[str, NDArray[np.int64]]


def read_calibration(
    source: Path, signature: Signature, folder: Path, samples: int
) -> tuple[list[Feeds], dict[str, Any]]:
    """The windows of a calibration file as graph inputs, and what they were."""
    limited = signature
    lengths = [len(window.ids) for window in encoded(source, limited, folder)]
    if len(lengths) < samples and not is_documents(source):  # of a short text, more windows and shorter ones
        shorter = max(sum(lengths) // samples, SHORTEST)
        limited = dataclasses.replace(signature, max_seqlen=min(shorter, signature.max_seqlen or shorter))
        lengths = [len(window.ids) for window in encoded(source, limited, folder)]
    if len(lengths) < 2:
        raise ExportError(
            f"{source} gives {len(lengths)} windows of text; 2 are needed at least, to calibrate and to judge"
        )
    # Read again, so that only the chosen windows are kept.
    wanted = set(np.linspace(0, len(lengths) - 1, min(samples, len(lengths))).astype(int).tolist())
    chosen = [window.ids for i, window in enumerate(encoded(source, limited, folder)) if i in wanted]
    feeds = [dict(prepare(ids, None, None, signature).feeds) for ids in chosen]
    about = {"file": source.name, "sha256": sha256(source), "windows": len(chosen), "tokens": sum(map(len, chosen))}
    return feeds, about


class CalibrationReader(ortq.CalibrationDataReader):  # type: ignore[misc]
    """Hands the windows to the quantizer."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next window; None at the end."""
        return next(self._feeds, None)
