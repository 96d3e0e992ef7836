"""`BatchRunner`: runs prepared sequences in a backend, and returns the outputs that a caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LfxError
from lfx.runtime.backends.interface import Backend
from lfx.runtime.inputs import Feeds, seqlen_of, stack
from lfx.runtime.metrics import Metrics
from lfx.runtime.outputs import OutputRequest, check_outputs
from lfx.runtime.ragged import Row, run_rows

# Values are arrays, or lists of arrays, one for each sequence; with `device_outputs` on a GPU, DLPack objects.
Outputs = dict[str, NDArray[Any] | list[NDArray[Any]]]


@dataclass(frozen=True)
class BatchRunner:
    """Runs prepared sequences.

    Attributes:
        request: the outputs to return.
        metrics: counts the batches.
        pad_token_id: of the model.
        token_budget: largest number of tokens of a batch of sequences of different lengths, padding included.
    """

    backend: Backend
    request: OutputRequest
    metrics: Metrics
    pad_token_id: int
    token_budget: int

    def run(self, sequences: Sequence[Feeds]) -> Outputs:
        """Run sequences as one batch if they have one length, else as `run_rows`; see `Engine.run` for the outputs."""
        if len({seqlen_of(feeds) for feeds in sequences}) == 1:
            return dict(self._infer(stack(sequences, self.pad_token_id)))
        if self.request.on_device:
            raise InputError("the sequences have different lengths; run each length on its own for device_outputs")
        rows: list[Any] = self.run_rows(sequences)
        outputs: Outputs = {}
        for spec in self.request.signature.outputs:
            arrays = [row[spec.name] for row in rows]
            outputs[spec.name] = arrays if "sequence" in spec.shape else np.stack(arrays)
        return outputs

    def run_rows(self, sequences: Sequence[Feeds | LfxError], *, keep_errors: bool = False) -> list[Any]:
        """Run sequences in batches of similar lengths; see `lfx.runtime.ragged.run_rows`."""
        return run_rows(
            sequences,
            self._infer,
            self.request.signature,
            self.token_budget,
            self.backend.supports_shape,
            keep_errors=keep_errors,
        )

    def _infer(self, feeds: Feeds) -> Row:
        request = self.request
        outputs = self.backend.infer(feeds, request.names, on_device=request.on_device)
        check_outputs(outputs, request.signature, len(feeds["input_ids"]))
        self.metrics.computed_batch(feeds)
        return request.convert(outputs)
