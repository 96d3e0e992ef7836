"""`GraphGenerator`: the encoder's and the decoder's ONNX graph of a bundle as a `TextGenerator`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ArtifactError, InputError
from lfx.runtime import forks
from lfx.runtime.backends.interface import TensorBackend
from lfx.runtime.generation.model import Int64
from lfx.runtime.inputs import Feeds, stack
from lfx.signature import HIDDEN_STATES, PAST, PRESENT, TEXT_GENERATION, Decoder, Signature

Tensors = dict[str, Any]  # input name of the decoder -> tensor of the backend


def check_graphs(
    graphs: tuple[TensorBackend, TensorBackend] | None, signature: Signature
) -> tuple[TensorBackend, TensorBackend]:
    """Return the encoder and the decoder of a model that writes texts.

    Raises:
        InputError: the model has another task, or no decoder.
    """
    if signature.task != TEXT_GENERATION:
        raise InputError(
            f"generate needs a model of the task {TEXT_GENERATION}, and this one is for {signature.task}; export an "
            "LED checkpoint, or use Engine.run"
        )
    if graphs is None:
        raise InputError("this Engine has no decoder, so it writes no texts; open the bundle")
    return graphs


class GraphGenerator:
    """Runs the two graphs in a backend; keys and values are passed from run to run as the backend's own tensors.

    Args:
        encoder, decoder: the graphs, loaded into one backend.
        signature: of the bundle.
        on_batch: called with the inputs of each batch that the encoder has run.
    """

    def __init__(
        self,
        encoder: TensorBackend,
        decoder: TensorBackend,
        signature: Signature,
        on_batch: Callable[[Feeds], None] = lambda feeds: None,
    ) -> None:
        assert signature.decoder is not None
        self.encoder, self.decoder, self.signature, self._on_batch = encoder, decoder, signature, on_batch
        self.spec: Decoder = signature.decoder
        self._made_at = forks.generation()

    def encode(self, sequences: Sequence[Feeds], copies: int) -> GraphCache:
        """Run the encoder; see `TextGenerator`.

        Raises:
            LfxError: this process was forked since, or the backend failed.
        """
        forks.check_process(self._made_at, "Engine")
        feeds = stack(sequences, self.signature.pad_token_id)
        outputs = self.encoder.infer_tensors({name: self.encoder.tensor(array) for name, array in feeds.items()})
        self._on_batch(feeds)
        mask = feeds.get("attention_mask", np.ones_like(feeds["input_ids"]))
        return GraphCache(self.decoder, self.spec, outputs, mask, copies)


class GraphCache:
    """The decoder's inputs that stay, and those that each step replaces.

    In a backend that broadcasts, the rows of a batch of one sequence share its keys and values. Otherwise, and in
    larger batches, the rows of a sequence get copies.
    """

    def __init__(self, decoder: TensorBackend, spec: Decoder, encoded: Tensors, mask: Int64, copies: int) -> None:
        self._decoder, self._made_at = decoder, forks.generation()
        batch = len(mask)
        self._encoder: Tensors = {"encoder_attention_mask": decoder.tensor(mask)}
        cross = [item for item in spec.inputs if item.name.startswith(PAST) and ".encoder." in item.name]
        # Names of the keys and values that the decoder makes at its first step.
        self._made: list[str] = []
        if any(item.name == HIDDEN_STATES for item in spec.inputs):
            self._made = [item.name for item in cross]
            self._encoder[HIDDEN_STATES] = encoded["last_hidden_state"]
            for item in cross:
                self._encoder[item.name] = decoder.tensor(np.zeros(_empty_shape(item.shape, batch), item.dtype))
        else:
            for item in cross:
                self._encoder[item.name] = encoded[item.name.replace(PAST, PRESENT, 1)]
        rows = batch * copies
        self._past = {
            item.name: decoder.tensor(np.zeros(_empty_shape(item.shape, rows), item.dtype))
            for item in spec.inputs
            if item.name.startswith(PAST) and ".decoder." in item.name
        }
        # The sequence that each row of the encoder's tensors, and each row that is decoded, belongs to.
        self._encoded_sequences = np.arange(batch)
        self._sequences = np.repeat(self._encoded_sequences, copies)

    def step(self, tokens: Int64) -> NDArray[Any]:
        """Decode the next token of each row; see `Cache`.

        Raises:
            LfxError: this process was forked since, or the backend failed.
        """
        forks.check_process(self._made_at, "Engine")
        self._match_encoder()
        outputs = self._decoder.infer_tensors(
            {"input_ids": self._decoder.tensor(np.ascontiguousarray(tokens)), **self._encoder, **self._past}
        )
        self._past = {name: outputs[name.replace(PAST, PRESENT, 1)] for name in self._past}
        self._encoder |= {name: outputs[name.replace(PAST, PRESENT, 1)] for name in self._made}
        self._made = []
        logits = self._decoder.array(outputs["logits"])
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ArtifactError(
                f"output logits of {tokens.shape[0]} rows of {tokens.shape[1]} tokens has shape {logits.shape}; export "
                "the model again"
            )
        return logits[:, -1]

    def select(self, rows: Int64) -> None:
        """Keep these rows in this order; see `Cache`."""
        if not np.array_equal(rows, np.arange(len(self._sequences))):
            self._take(self._past, rows)
        self._sequences = self._sequences[rows]

    def _match_encoder(self) -> None:
        """Give each row the keys and values of its sequence, if it does not have them already."""
        kept = np.unique(self._sequences)
        wanted = kept if len(kept) == 1 and self._decoder.broadcasts else self._sequences
        if np.array_equal(self._encoded_sequences, wanted):
            return
        first = {sequence: i for i, sequence in reversed(list(enumerate(self._encoded_sequences.tolist())))}
        self._take(self._encoder, np.array([first[sequence] for sequence in wanted.tolist()]))
        self._encoded_sequences = wanted

    def _take(self, tensors: Tensors, rows: Int64) -> None:
        """Replace tensors by copies of some of their rows, one by one: never are all in memory twice."""
        for name in tensors:
            tensors[name] = self._decoder.take(tensors[name], rows)


def _empty_shape(axes: tuple[int | str, ...], rows: int) -> list[int]:
    """The shape of keys or values of no token."""
    return [axis if isinstance(axis, int) else rows if axis == "batch" else 0 for axis in axes]
