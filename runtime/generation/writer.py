"""`TextWriter`: the body of `Engine.generate`, from ids or texts to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lfx.errors import InputError, LfxError
from lfx.runtime.generation import search
from lfx.runtime.generation.graphs import GraphGenerator
from lfx.runtime.generation.inputs import encode_texts, is_texts, prepare_inputs
from lfx.runtime.generation.model import Int64, StoppableGenerator, TextGenerator
from lfx.runtime.generation.rows import generate_rows, join_rows
from lfx.runtime.generation.settings import GenerationSettings, resolve
from lfx.runtime.inputs import Feeds, seqlen_of
from lfx.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextWriter:
    """Generates text with a model; see `Engine.generate` for the arguments and errors of its methods.

    Attributes:
        defaults: entries of the checkpoint's generation_config.json.
        token_budget: largest number of tokens of a batch of the encoder, padding included.
        on_step: called before each step of the decoder; an error that it raises ends the search.
    """

    model: GraphGenerator
    defaults: Mapping[str, Any]
    token_budget: int
    on_step: Callable[[], None] | None = None

    def settings(self, options: Mapping[str, Any], *, stream: bool = False) -> GenerationSettings:
        """Check the options of a call, and return them with the checkpoint's defaults."""
        decoder = self.model.spec
        settings = resolve(
            options,
            self.defaults,
            vocab_size=int(next(spec.shape[-1] for spec in decoder.outputs if spec.name == "logits")),
            max_tokens=decoder.max_tokens,
            decoder_start_token_id=decoder.decoder_start_token_id,
        )
        if stream and settings.num_beams > 1:
            raise InputError(
                f"num_beams {settings.num_beams} cannot be streamed, since beams change until the end; give "
                "num_beams=1, or stream=False"
            )
        return settings

    def prepare(
        self,
        inputs: Any,
        masks: tuple[Any, Any],
        open_tokenizer: Callable[[], Tokenizer],
        *,
        truncate: bool,
        keep_errors: bool,
    ) -> list[Feeds | LfxError]:
        """The encoder's inputs of ids or texts.

        Args:
            masks: attention mask and global attention mask.
            open_tokenizer: called if the inputs are texts.
            keep_errors: return the error of a sequence in its place; do not raise it.
        """
        if is_texts(inputs):
            inputs = encode_texts(inputs, masks, open_tokenizer, truncate=truncate, keep_errors=keep_errors)
        mask, global_mask = masks
        return prepare_inputs(inputs, mask, global_mask, self.model.signature, keep_errors=keep_errors)

    def stream(self, sequences: Sequence[Feeds | LfxError], settings: GenerationSettings) -> Iterator[Int64]:
        """Yield the next token of each row, as they come."""
        return search.stream(self._searched, cast("Sequence[Feeds]", sequences), settings)

    def write(self, sequences: Sequence[Feeds | LfxError], settings: GenerationSettings) -> Int64:
        """Generate the rows of all sequences, as one array."""
        prepared = cast("Sequence[Feeds]", sequences)
        if len({seqlen_of(feeds) for feeds in prepared}) == 1:
            return search.generate(self._searched, prepared, settings)
        rows = cast("list[Int64]", self._rows(prepared, settings, keep_errors=False))
        return join_rows(rows, settings.fill_token_id)

    def write_each(
        self,
        sequences: Sequence[Feeds | LfxError],
        settings: GenerationSettings,
        indices: Sequence[int] | None = None,
    ) -> list[Int64 | LfxError]:
        """Generate the rows of each sequence, or return its error; `indices` as for `search.generate`."""
        return self._rows(sequences, settings, keep_errors=True, indices=indices)

    @property
    def _searched(self) -> TextGenerator:
        return self.model if self.on_step is None else StoppableGenerator(self.model, self.on_step)

    def _rows(
        self,
        sequences: Sequence[Feeds | LfxError],
        settings: GenerationSettings,
        *,
        keep_errors: bool,
        indices: Sequence[int] | None = None,
    ) -> list[Int64 | LfxError]:
        return generate_rows(
            self._searched,
            sequences,
            settings,
            self.token_budget,
            self.model.encoder.supports_shape,
            pad=self.model.signature.may_pad,
            keep_errors=keep_errors,
            indices=indices,
        )
