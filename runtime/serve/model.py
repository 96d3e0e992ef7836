"""A served model: its Engine, Batcher, tokenizer and postprocessor."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import InputError, LengthError, LfxError
from lfx.runtime import Batcher, Engine
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.batching import TOKEN_BUDGET
from lfx.runtime.generation.rows import without_padding
from lfx.runtime.inputs import pad_choices, prepare
from lfx.runtime.outputs import output_bytes
from lfx.runtime.postprocess import Postprocessor, answer_outputs
from lfx.runtime.serve.limits import WaitingOutputs
from lfx.runtime.serve.settings import BYTES_PER_TOKEN, NO_LIMIT_TOKENS, OTHER_BYTES, Settings
from lfx.runtime.serve.writing import TokenTexts, Written, WrittenToken, decoded
from lfx.runtime.text_files import TOKENIZER, text_folder
from lfx.runtime.tokenizer import Encoded, Tokenizer, encode_ids, open_tokenizer
from lfx.signature import SENTENCE_EMBEDDING, TASKS, TEXT_GENERATION


@dataclass(frozen=True)
class Input:
    """One input of a request: a text with its pair or choices, or ids with their masks.

    Attributes:
        text: the text; the question, for question answering.
        pair: the document of a question, or the second text of a pair.
        choices: the choices after `text`, for multiple choice.
        ids: the model's ids, special tokens included: (seqlen,), or (choices, seqlen).
        attention_mask, global_attention_mask: for ids, of their shape; see `Engine.run`.
        prompt: text that is put before `text`; None = the checkpoint's default prompt.
        truncate: whether a text that is longer than the model takes is cut, as `Tokenizer.truncate` does.
        outputs: names of the outputs that the reply has; those of the answers are computed too. None = all.
    """

    text: str | None = None
    pair: str | None = None
    choices: Sequence[str] | None = None
    ids: Any = None
    attention_mask: Any = None
    global_attention_mask: Any = None
    prompt: str | None = None
    truncate: bool = False
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Prepared:
    """An input that was tokenized and submitted to the Batcher.

    Attributes:
        encoded: the encoding of the text; for multiple choice, of the first choice.
        tokens: number of real tokens.
        truncated: whether the text was cut.
        output_bytes: of its outputs with a sequence axis.
        positions: of the real tokens among the ids that the client gave; None if no id is masked.
    """

    encoded: Encoded
    tokens: int
    truncated: bool
    output_bytes: int
    positions: NDArray[np.int64] | None = None


class ServedModel:
    """One model of the server. Thread-safe.

    Raises:
        LfxError: the model or its tokenizer cannot be opened.
    """

    def __init__(self, name: str, path: str, settings: Settings) -> None:
        self.name = name
        self.engine = Engine(
            path,
            settings.backend,
            provider=settings.provider,
            threads=settings.threads,
            precision=settings.precision,
            token_budget=settings.token_budget or TOKEN_BUDGET,
        )
        self.signature = self.engine.signature
        self._max_choices, self._max_beams = settings.max_inputs, settings.max_beams
        self._tokenizer: Tokenizer | None = None
        self._postprocessor: Postprocessor | None = None
        folder = None if settings.tokenizer is None else Path(settings.tokenizer)
        if folder is not None or (text_folder(self.engine.path, self.engine.text_source) / TOKENIZER).exists():
            self._tokenizer = open_tokenizer(self.engine.path, self.engine.text_source, self.signature, folder)
            self._tokenizer.lets_threads_run = True  # a long text takes seconds, and the event loop must go on
            self._postprocessor = Postprocessor(self._tokenizer)
        self._generation: Mapping[str, Any] = {}
        if self.has_tokenizer and self.signature.task == TEXT_GENERATION:
            with contextlib.suppress(LfxError):  # each text has the error, and other routes are answered
                # Read now, as the model is: the files may be replaced before the first text.
                self._generation = self.engine.text_writer().defaults
        self.waiting_outputs = WaitingOutputs()
        self.engine.warm_up()
        # The Service takes a request while fewer than max_pending texts are in progress; it has up to max_inputs texts.
        max_pending = settings.max_pending + settings.max_inputs
        self.batcher = Batcher(self.engine, max_delay_ms=settings.max_delay_ms, max_pending=max_pending)

    @property
    def identity(self) -> str:
        """Digests of the model and of its tokenizer, and its options of generation, which decide the answers."""
        tokenizer = self._tokenizer.sha256 if self._tokenizer is not None else ""
        return f"{self.engine.identity} {tokenizer} {json.dumps(self._generation, sort_keys=True)}"

    @property
    def largest_body(self) -> int:
        """Default limit of the body of a request for one text, in bytes."""
        return (self.signature.max_seqlen or NO_LIMIT_TOKENS) * BYTES_PER_TOKEN + OTHER_BYTES

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model takes texts."""
        return self._tokenizer is not None

    @property
    def has_answers(self) -> bool:
        """Whether it has answers, such as labels, beside its outputs."""
        return self.has_tokenizer and bool(answer_outputs(self.signature))

    def describe(self) -> dict[str, Any]:
        """Inputs, outputs and limits of the model, as JSON types."""
        needs_pair = TASKS[self.signature.task].needs_pair
        return {
            "name": self.name,
            "task": self.signature.task,
            "takes_texts": self.has_tokenizer,
            "needs_pair": needs_pair and not self.signature.has_choices,
            "needs_choices": self.signature.has_choices,
            "max_seqlen": self.signature.max_seqlen,
            "precision": self.engine.precision,
            "backend": self.engine.backend,
            "outputs": [
                {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in self.signature.outputs
            ],
        }

    def submit(self, item: Input) -> tuple[Prepared, Future[Outputs]]:
        """Tokenize an input and submit it to the Batcher; returns it with a future of the model's outputs.

        Raises:
            LengthError: the input has more tokens than the model takes.
            InputError: the model cannot take it for another reason.
            OverloadError: too many inputs are waiting.
        """
        if item.ids is not None:
            return self._submit_ids(item)
        if item.text is None:
            raise InputError("an input has neither text nor ids; give one of them")
        if item.attention_mask is not None or item.global_attention_mask is not None:
            raise InputError("an input has a mask and no ids; give ids, or leave the mask out")
        if self.signature.has_choices:
            return self._submit_choices(item)
        if item.choices is not None:
            raise InputError(f"{self.signature.task} takes no choices; leave them out")
        if TASKS[self.signature.task].needs_pair and item.pair is None:
            raise InputError(f"{self.signature.task} needs the question as text, and the document as pair")
        encoded, truncated = self._encode(item.text, item.pair, item)
        future = self._enqueue(item, encoded.ids)
        return Prepared(encoded, len(encoded.ids), truncated, self._output_bytes(item, encoded.ids)), future

    def _enqueue(self, item: Input, *arrays: Any) -> Future[Outputs]:
        """Submit ids and masks to the Batcher, for the outputs that the reply needs."""
        return self.batcher.submit(*arrays, outputs=self._needed_outputs(item))

    def _needed_outputs(self, item: Input) -> tuple[str, ...] | None:
        if item.outputs is None:
            return None
        needed = answer_outputs(self.signature) if self.has_answers else ()
        return tuple(dict.fromkeys((*item.outputs, *needed))) or None

    def _output_bytes(self, item: Input, ids: Any) -> int:
        names = self._needed_outputs(item)
        signature = self.signature if names is None else self.signature.with_outputs(names)
        *choices, seqlen = np.shape(ids)
        return output_bytes(signature, seqlen, math.prod(choices))

    def check_special_tokens(self, sequences: Sequence[Sequence[int]]) -> None:
        """Check that ids begin and end with the model's special tokens, which ids of another tokenizer do not.

        Raises:
            InputError: those of a sequence do not.
        """
        if self._tokenizer is None or not sequences:
            return
        before, after = self._tokenizer.ends()
        if any(list(ids[: len(before)]) != before or list(ids[len(ids) - len(after) :]) != after for ids in sequences):
            raise InputError(
                f"ids do not begin with {before} and end with {after}, the model's special tokens, so they may be of "
                "another tokenizer; give texts (LangChain: check_embedding_ctx_length=False), or the model's ids"
            )

    def _submit_ids(self, item: Input) -> tuple[Prepared, Future[Outputs]]:
        if item.text is not None or item.pair is not None or item.choices is not None:
            raise InputError("an input has both ids and a text; give one of them")
        if item.prompt:
            raise InputError("prompt is put before a text, and an input has ids; leave it out, or give texts")
        if not self.signature.has_choices and any(isinstance(token, list) for token in item.ids):
            raise InputError("ids contain a list; give each sequence as an input of its own")
        if self.signature.has_choices:
            self._check_choices(len(item.ids))
        future = self._enqueue(item, item.ids, item.attention_mask, item.global_attention_mask)
        shape = np.shape(item.ids)  # that of the mask may be of one sequence in a list
        mask = np.ones(shape, int) if item.attention_mask is None else np.reshape(item.attention_mask, shape)
        first = (item.ids[0], mask[0]) if self.signature.has_choices else (item.ids, mask)
        encoded, positions = encode_ids(*first)
        return Prepared(encoded, int(mask.sum()), False, self._output_bytes(item, item.ids), positions), future

    def _submit_choices(self, item: Input) -> tuple[Prepared, Future[Outputs]]:
        assert item.text is not None
        if not item.choices or item.pair is not None:
            raise InputError(f"{self.signature.task} needs the prompt as text, and a list of choices")
        self._check_choices(len(item.choices))
        encoded = [self._encode(item.text, choice, item) for choice in item.choices]
        ids, mask = pad_choices([choice.ids for choice, _ in encoded], self.signature.pad_token_id)
        truncated = any(cut for _, cut in encoded)
        prepared = Prepared(encoded[0][0], int(mask.sum()), truncated, self._output_bytes(item, ids))
        return prepared, self._enqueue(item, ids, mask)

    def _check_choices(self, count: int) -> None:
        if count > self._max_choices:
            raise LengthError(f"an input has {count} choices, above the {self._max_choices} that this server takes")

    def _encode(self, text: str, pair: str | None, item: Input) -> tuple[Encoded, bool]:
        """Tokenize a text; returns its encoding, and whether it was cut."""
        if self._tokenizer is None:
            raise InputError(f"the model {self.name} has no tokenizer; give ids")
        if item.prompt is not None and self.signature.task != SENTENCE_EMBEDDING:
            raise InputError(f"{self.signature.task} takes no prompt; leave it out")
        try:
            return self._tokenizer.encode(text, pair, prompt=item.prompt), False
        except LengthError as error:
            if item.truncate:
                return self._tokenizer.truncate(text, pair, prompt=item.prompt), True
            reason = str(error).partition(";")[0]
            raise LengthError(f"{reason}; shorten it, or give truncate: true to have it cut") from error

    def answers(self, prepared: Prepared, outputs: Outputs) -> list[dict[str, Any]]:
        """The answers of the task: see `Postprocessor.answers`. Empty for a model without a tokenizer.

        An answer to a question also has `start` and `end`, its range of characters in the document.

        Raises:
            ArtifactError: an answer has an id that the tokenizer does not have.
        """
        if self._postprocessor is None:
            return []
        return self._postprocessor.answers_of_request(prepared.encoded, outputs, prepared.positions)

    def generate(
        self,
        text: str,
        options: Mapping[str, Any],
        is_cancelled: Callable[[], bool],
        *,
        truncate: bool,
        on_token: Callable[[WrittenToken], None] | None = None,
    ) -> Written:
        """Write a text; see `Engine.generate`.

        Args:
            is_cancelled: asked before each step of the decoder; if it is true, the text is given up.
            on_token: called with each token as it comes.
        Raises:
            LengthError: the input has more tokens than the model takes.
            InputError: an option is not supported, there are too many beams, or any beams with `on_token`; the model
                has no tokenizer; or the text is given up.
            ArtifactError: the model wrote an id that the tokenizer does not have.
        """

        def check() -> None:
            if is_cancelled():
                raise InputError("the request was cancelled")

        with self.engine.metrics.call():
            writer = self.engine.text_writer(check)
            settings = writer.settings({**options, "num_return_sequences": 1})
            if settings.num_beams > self._max_beams:
                raise InputError(
                    f"num_beams {settings.num_beams} is above the {self._max_beams} that this server takes"
                )
            if settings.num_beams > 1 and on_token is not None:
                raise InputError(
                    f"num_beams {settings.num_beams} cannot be streamed, since beams change until the end; give "
                    "num_beams: 1, or ask /generate"
                )
            encoded, _ = self._encode(text, None, Input(text, truncate=truncate))
            assert self._tokenizer is not None
            sequences = prepare(encoded.ids, None, None, self.signature)
            if on_token is None:
                ids: list[int] = without_padding(writer.write(sequences, settings)[0], settings).tolist()[1:]
            else:
                texts, ids = TokenTexts(self._tokenizer), []
                for column in writer.stream(sequences, settings):
                    ids.append(int(column[0]))
                    is_last = ids[-1] in settings.eos_token_ids or 1 + len(ids) == settings.max_length
                    on_token(texts.add(ids[-1], last=is_last))
            ended = bool(ids) and ids[-1] in settings.eos_token_ids
            return Written(ids, decoded(self._tokenizer, ids), len(encoded.ids), ended)

    def written_tokens(self, ids: Sequence[int]) -> list[WrittenToken]:
        """The tokens of a text that `generate` wrote."""
        assert self._tokenizer is not None
        texts = TokenTexts(self._tokenizer)
        return [texts.add(token, last=i == len(ids)) for i, token in enumerate(ids, 1)]

    def raw_scores(self, outputs: Outputs) -> list[dict[str, Any]]:
        """The label and the logit of each class, best first."""
        logits: NDArray[Any] = np.asarray(outputs["logits"])[0]
        label = self._postprocessor.label if self._postprocessor is not None else "LABEL_{}".format
        return [{"label": label(int(i)), "score": float(logits[i])} for i in np.argsort(-logits)]

    def close(self) -> None:
        """Complete the pending requests, and free the model."""
        self.batcher.close()
        self.engine.close()
