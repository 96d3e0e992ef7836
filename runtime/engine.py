"""`Engine` loads a bundle, an ONNX file or a plan, and runs it."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from lfx.checks import flag, one_of, whole_number
from lfx.errors import InputError, LfxError
from lfx.runtime.batch_runner import BatchRunner, Outputs
from lfx.runtime.batching import TOKEN_BUDGET
from lfx.runtime.embedding import SENTENCE_OUTPUT, check_task, embedding_size, encode_texts
from lfx.runtime.generation import GenerationSettings, GraphGenerator, TextWriter
from lfx.runtime.generation.defaults import defaults_of
from lfx.runtime.generation.graphs import check_graphs
from lfx.runtime.inputs import Feeds, Int64, prepare, prepare_each
from lfx.runtime.metrics import Metrics
from lfx.runtime.open_model import OpenModel
from lfx.runtime.outputs import OutputRequest, request_outputs
from lfx.runtime.ragged import Row
from lfx.runtime.streaming import AHEAD, iterator_of, stream_rows
from lfx.runtime.tokenizer import Tokenizer, open_tokenizer
from lfx.runtime.warm_up import padding_batch, warm_up_shapes

MAX_THREADS = 1024
ON_ERROR = ("raise", "return")


class Engine(OpenModel):
    """A loaded Longformer. Thread-safe, and a context manager.

    An Engine works only in the process that made it: in a forked child every run raises LfxError; make a new Engine
    there. An Engine can be pickled for spawned processes, which open the same path with the same options.

    Args:
        path: a bundle, an ONNX file that `lfx export` wrote, or a plan that `lfx build-engine` wrote; or, where there
            is no such path, a repository of the Hugging Face hub: "org/name", or "org/name@revision". Bundles and plans
            are checked against the digests in their manifest.
        backend: "onnxruntime", "openvino", "reference" (the onnx package's reference evaluator, slow), "tensorrt"
            (plans only), or "auto". Default: "auto": TensorRT for a plan; OpenVINO if `precision` is given, and for a
            bf16 model on the CPU, since ONNX Runtime has few bf16 kernels there; otherwise ONNX Runtime.
        provider: ONNX Runtime's execution provider: "cpu", "cuda" or "tensorrt"; an error if it is not available.
            Default: "cpu".
        threads: number of CPU threads of one run, 1 to 1,024. Default: the backend's own, or the cores that this
            process may use if the machine has more.
        precision: OpenVINO compute precision, "fp32" or "bf16", overriding the bundle's. bf16 needs a CPU with AMX, or
            with AVX-512 and bf16. Default: the bundle's.
        kernels: what runs the attention nodes. "fused": lfx's own kernels; "function": the bodies of the nodes, in
            standard ops; "auto": the kernels, where the backend has one for every attention node. A plan has those
            that it was built with. Default: "auto".
        token_budget: largest number of tokens, padding included, of a batch of sequences of different lengths, 1 or
            more. A longer sequence runs alone. Default: 8,192.
    Attributes:
        path: absolute path of the bundle, ONNX file or plan; of a repository, in the hub's cache.
        signature: inputs, outputs and limits of the model.
        manifest: manifest of the bundle or the plan; None for a single ONNX file.
        backend: name, version and device of the backend.
        precision: the argument, or the model's own.
        threads: the argument.
        kernels: what runs the attention nodes, "fused" or "function".
        metrics: the Engine's counters; see `lfx.runtime.metrics`.
    Raises:
        InputError: an argument has another type or is out of range.
        ArtifactError: a file is missing, truncated, changed or no model, or the hub does not give it.
        DependencyError: the backend, provider, precision or kernels are not known, not installed, or cannot run this
            model.
    """

    def __init__(
        self,
        path: str | Path,
        backend: str = "auto",
        *,
        provider: str = "cpu",
        threads: int | None = None,
        precision: str | None = None,
        kernels: str = "auto",
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        if threads is not None:
            threads = whole_number(threads, "threads", 1, MAX_THREADS)
        self.token_budget = whole_number(token_budget, "token_budget", low=1)
        super().__init__(path, backend, provider, threads, precision, kernels)
        self.metrics = Metrics()
        self._tokenizer: Tokenizer | None = None
        self._generation_defaults: dict[str, Any] | None = None
        options: dict[str, Any] = {"provider": provider, "threads": threads, "precision": precision, "kernels": kernels}
        self._reopen = functools.partial(type(self), self.path, backend, token_budget=self.token_budget, **options)

    @overload
    def run(
        self,
        ids: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        device_outputs: bool = False,
        on_error: Literal["raise"] = "raise",
    ) -> Outputs: ...

    @overload
    def run(
        self,
        ids: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        device_outputs: bool = False,
        on_error: Literal["return"],
    ) -> list[Row | LfxError]: ...

    def run(
        self,
        ids: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        device_outputs: bool = False,
        on_error: str = "raise",
    ) -> Outputs | list[Row | LfxError]:
        """Run one batch.

        Args:
            ids: one sequence of integers (a batch of one), a list of sequences, or an integer array
                (batch, seqlen), with ids from 0 to vocab_size - 1 and a seqlen from 1 to the model's maximum. For
                multiple choice: (choices, seqlen) or (batch, choices, seqlen). The graph pads to whole windows itself.
            attention_mask: same shape as ids; 1 = real token, 0 = padding. Default: all 1.
            global_attention_mask: same shape as ids; 1 = attends globally. Default: the task's own rule,
                `signature.default_global`.
            outputs: names of the outputs to return; the others are not copied from the backend. Default: all.
            output_dtype: "float32" or "float16": floating-point outputs are converted to it on the host, batch by
                batch; a number that float16 cannot hold becomes infinite. Default: the model's own, float32.
            device_outputs: leave the outputs on the device that computes them, for sequences of one length. On a GPU
                each is an object with `__dlpack__`, for torch.from_dlpack or cupy.from_dlpack, in memory of its own
                that is freed with the last reference; the run has finished when `run` returns. On the CPU each is an
                array, which has `__dlpack__` too. Default: False.
            on_error: "raise", or "return": a sequence that the model cannot take, or whose batch fails in the backend,
                gets its error, and the others are run. Default: "raise".
        Returns:
            Output name -> value, batch axis first. If all sequences have one length, each value is an array, such as
            last_hidden_state (batch, seqlen, hidden) float32. Sequences of different lengths run in batches of
            neighbouring lengths, see `token_budget`. Then the value of an output per token is a list of arrays, each of
            its sequence's own length; outputs per sequence are stacked. The caller owns all arrays.

            With on_error="return" a list with one item for each sequence: what `stream` yields for it, or its error.
        Raises:
            InputError: the model cannot take a length, shape, dtype, mask value or token id; an output or another
                option is not known; or the Engine is closed.
            ArtifactError: an output has another number of axes or rows than the signature says.
            LfxError: the Engine was made before a fork, or the backend failed.
        Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
        """
        with self.metrics.call():
            one_of(on_error, "on_error", ON_ERROR, InputError)
            request = request_outputs(self.signature, outputs, output_dtype, device_outputs)
            runner = self._runner(request)
            if on_error == "raise":
                return runner.run(prepare(ids, attention_mask, global_attention_mask, self.signature))
            if request.on_device:
                raise InputError("device_outputs is for sequences of one length, with on_error='raise'")
            sequences = prepare_each(ids, attention_mask, global_attention_mask, self.signature)
            return runner.run_rows(sequences, keep_errors=True)

    def embed(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        truncate: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> NDArray[np.float32]:
        """Compute the sentence embeddings of texts, in batches of neighbouring lengths; see `token_budget`.

        Args:
            texts: one text, or any number of texts.
            prompt: is put before each text; may be empty. Default: the default prompt of the checkpoint's
                config_sentence_transformers.json, if it has one.
            truncate: cut a text of more tokens than the model's maximum (see `Tokenizer.truncate`); otherwise such a
                text is an error.
            tokenizer: Default: the one in the bundle; for a plan the bundle is looked for beside it.
        Returns:
            (number of texts, dimensions) float32, in the order given. One text is a batch of one.
        Raises:
            InputError: the model has another task, `texts` holds something else than texts, a text is too long or
                cannot be tokenized (the message has its index from 0), or the Engine is closed.
            ArtifactError: there is no tokenizer, or it is broken.
            LfxError: the Engine was made before a fork, or the backend failed.
        """
        with self.metrics.call():
            self.check_usable()
            check_task(self.signature)
            ids = encode_texts(texts, self._open_tokenizer(tokenizer), prompt=prompt, truncate=truncate)
            size = embedding_size(self.signature)
            rows = [row[SENTENCE_OUTPUT] for row in self.stream(ids, outputs=[SENTENCE_OUTPUT])]
            return np.stack(rows).astype(np.float32, copy=False) if rows else np.zeros((0, size), np.float32)

    async def run_async(
        self,
        ids: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        device_outputs: bool = False,
    ) -> Outputs:
        """`run` in a thread, for asyncio. For many concurrent requests see `lfx.runtime.Batcher`."""
        options: Any = {"outputs": outputs, "output_dtype": output_dtype, "device_outputs": device_outputs}
        run = functools.partial(self.run, ids, attention_mask, global_attention_mask, **options)
        results: Outputs = await asyncio.to_thread(run)
        return results

    def run_together(
        self,
        requests: Sequence[Feeds],
        *,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        on_error: str = "raise",
    ) -> list[Any]:
        """Run prepared sequences in batches of similar lengths; see `lfx.runtime.Batcher`.

        Args:
            outputs, output_dtype: as for `run`.
            on_error: "raise", or "return": the sequences of a batch that fails in the backend get its error. Default:
                "raise".
        Returns:
            For each sequence, what `run` returns for it alone: arrays with a batch axis of 1; or its LfxError.
        Raises:
            InputError: the Engine is closed, or an output or another option is not known.
            LfxError: the Engine was made before a fork, or the backend failed.
        """
        one_of(on_error, "on_error", ON_ERROR, InputError)
        request = request_outputs(self.signature, outputs, output_dtype)
        rows = self._runner(request).run_rows(requests, keep_errors=on_error == "return")
        return [
            row if isinstance(row, LfxError) else {name: array[None] for name, array in row.items()} for row in rows
        ]

    def warm_up(self, shapes: Iterable[tuple[int, int]] | None = None) -> None:
        """Run batches of padding ids, so that memory, kernels and CUDA graphs are ready before the first real batch.

        The metrics do not count these batches.

        Args:
            shapes: (batch, seqlen) of each batch, both 1 or more. Default: (1, 1) and (1, max_seqlen), or (1, 4096) for
                a model without a limit; a plan skips those that no profile takes.
        Raises:
            InputError: a shape is out of range or does not fit in memory; or the Engine is closed.
            LfxError: the Engine was made before a fork, or the backend failed.
        """
        self.check_usable()
        for batch, seqlen in warm_up_shapes(shapes, self.signature, self.supports_shape):
            self._open().infer(padding_batch(batch, seqlen, self.signature))

    @overload
    def generate(
        self,
        inputs: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        truncate: bool = False,
        tokenizer: Tokenizer | None = None,
        stream: Literal[False] = False,
        on_error: Literal["raise"] = "raise",
        **options: Any,
    ) -> Int64: ...

    @overload
    def generate(
        self,
        inputs: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        truncate: bool = False,
        tokenizer: Tokenizer | None = None,
        stream: Literal[True],
        on_error: Literal["raise"] = "raise",
        **options: Any,
    ) -> Iterator[Int64]: ...

    @overload
    def generate(
        self,
        inputs: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        truncate: bool = False,
        tokenizer: Tokenizer | None = None,
        stream: Literal[False] = False,
        on_error: Literal["return"],
        **options: Any,
    ) -> list[Int64 | LfxError]: ...

    def generate(
        self,
        inputs: Any,
        attention_mask: Any = None,
        global_attention_mask: Any = None,
        *,
        truncate: bool = False,
        tokenizer: Tokenizer | None = None,
        stream: bool = False,
        on_error: str = "raise",
        **options: Any,
    ) -> Int64 | Iterator[Int64] | list[Int64 | LfxError]:
        """Write a text for each sequence, such as the summary of a document.

        Rows end on their own, and a row that has ended costs nothing. Sequences of different lengths run in batches of
        neighbouring lengths, see `token_budget`.

        Args:
            inputs: ids as for `run`; or one text, or a list of texts.
            attention_mask, global_attention_mask: as for `run`, of ids. Default: all tokens are real, and the first one
                attends globally.
            truncate: cut a text of more tokens than the encoder's maximum (see `Tokenizer.truncate`); otherwise such a
                text is an error.
            tokenizer: of texts. Default: the one in the bundle.
            stream: return an iterator over the tokens, as they come. All sequences run in one batch.
            on_error: "raise", or "return": a sequence that the model cannot take, or whose batch fails, gets its error,
                and the others are run. Default: "raise".
            options: names, meanings and defaults of Hugging Face's `generate`; defaults of the checkpoint are in its
                generation_config.json, and None turns an option off. Length: max_new_tokens, max_length, min_length,
                min_new_tokens. Beams: num_beams, num_return_sequences, length_penalty, early_stopping (True, False or
                "never"). Sampling: do_sample, temperature, top_k, top_p, and seed, a number that repeats the same
                tokens. Rules: no_repeat_ngram_size, encoder_no_repeat_ngram_size, repetition_penalty, bad_words_ids,
                forced_bos_token_id, forced_eos_token_id. Tokens: decoder_start_token_id, eos_token_id (one or several),
                pad_token_id, bos_token_id.
        Returns:
            (sequences * num_return_sequences, tokens) int64 from the start token on, padded on the right with the pad
            token; the rows of a sequence are neighbours. With stream=True an iterator over the columns of that array
            after the first: (rows,) int64, the next token of each row, or the pad token for a row that has ended. With
            on_error="return" a list: for each sequence the array of its rows, or its error.
        Raises:
            InputError: the model writes no texts; the encoder cannot take an input; an option is not known or not
                supported, or out of range; beams or on_error="return" with stream=True; or the Engine is closed.
            ArtifactError: there is no tokenizer, or generation_config.json is broken.
            LfxError: the logits are not finite, the Engine was made before a fork, or the backend failed.
        """
        with self.metrics.call():
            keep_errors = one_of(on_error, "on_error", ON_ERROR, InputError) == "return"
            if flag(stream, "stream") and keep_errors:
                raise InputError(
                    "on_error 'return' is not for stream=True, whose columns have no place for an error; leave one of "
                    "them out"
                )
            flag(truncate, "truncate")
            if not isinstance(tokenizer, Tokenizer | None):
                raise InputError(f"tokenizer is {type(tokenizer).__name__}; give a Tokenizer, or leave it out")
            writer = self.text_writer()
            settings = writer.settings(options, stream=stream)
            masks, open_tokenizer = (attention_mask, global_attention_mask), lambda: self._open_tokenizer(tokenizer)
            sequences = writer.prepare(inputs, masks, open_tokenizer, truncate=truncate, keep_errors=keep_errors)
            if stream:
                return writer.stream(sequences, settings)
            return writer.write_each(sequences, settings) if keep_errors else writer.write(sequences, settings)

    def generation_settings(self, /, **options: Any) -> GenerationSettings:
        """Check the options of `generate`, and return them with the checkpoint's defaults.

        Raises:
            InputError, ArtifactError: what `generate` raises for them.
        """
        return self.text_writer().settings(options)

    def text_writer(self, on_step: Callable[[], None] | None = None) -> TextWriter:
        """The parts of `generate`. `on_step` is called before each step; an error that it raises ends the search."""
        self.check_usable()
        encoder, decoder = check_graphs(self._graphs, self.signature)
        if self._generation_defaults is None:
            self._generation_defaults = defaults_of(self.path, self.text_source)
        model = GraphGenerator(encoder, decoder, self.signature, self.metrics.computed_batch)
        return TextWriter(model, self._generation_defaults, self.token_budget, on_step)

    def _open_tokenizer(self, given: Tokenizer | None) -> Tokenizer:
        if given is not None:
            return given
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.path, self.text_source, self.signature)
        return self._tokenizer

    def _runner(self, request: OutputRequest) -> BatchRunner:
        return BatchRunner(self._open(), request, self.metrics, self.signature.pad_token_id, self.token_budget)

    @overload
    def stream(
        self,
        documents: Iterable[Any],
        *,
        ahead: int = AHEAD,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        on_error: Literal["raise"] = "raise",
    ) -> Iterator[Row]: ...

    @overload
    def stream(
        self,
        documents: Iterable[Any],
        *,
        ahead: int = AHEAD,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        on_error: Literal["return"],
    ) -> Iterator[Row | LfxError]: ...

    def stream(
        self,
        documents: Iterable[Any],
        *,
        ahead: int = AHEAD,
        outputs: Iterable[str] | None = None,
        output_dtype: Any = None,
        on_error: str = "raise",
    ) -> Iterator[Row] | Iterator[Row | LfxError]:
        """Run more sequences than fit in memory, in batches of neighbouring lengths.

        Args:
            documents: an iterable of sequences of integers, (seqlen,); for multiple choice (choices, seqlen).
            ahead: number of documents that are read, sorted by length and run at a time, 1 or more. Default: 256. The
                same documents in the same order form the same batches, so their results are bitwise equal.
            outputs, output_dtype: as for `run`.
            on_error: "raise", or "return": a document that the model cannot take, or whose batch fails in the backend,
                gets its error, and the others are run. Default: "raise".
        Yields:
            For each document, in the order given: output name -> array, without the batch axis; with on_error="return",
            its LfxError where it has one.
        Raises:
            InputError: at once, if `ahead` is out of range, an output or another option is not known, `documents` is
                not iterable or the Engine is closed. While iterating, if the model cannot take a document: the message
                has its index from 0, and no document that was read together with it is run. Errors that `documents`
                raises pass through.
            LfxError: the Engine was made before a fork, or the backend failed.
        """
        ahead = whole_number(ahead, "ahead", 1, sys.maxsize)
        one_of(on_error, "on_error", ON_ERROR, InputError)
        request = request_outputs(self.signature, outputs, output_dtype)
        self.check_usable()
        iterator, open_runner = iterator_of(documents), functools.partial(self._runner, request)
        return stream_rows(iterator, ahead, self.signature, open_runner, keep_errors=on_error == "return")
