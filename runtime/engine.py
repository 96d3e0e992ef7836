"""`Engine` loads a bundle, an ONNX file or a plan, and runs it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import sys
import time
from collections import UserString
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray

from lfx.checks import LARGEST, flag, one_of, shown, whole_number
from lfx.errors import ArtifactError, InputError, LfxError
from lfx.manifest import sha256
from lfx.runtime import backends, forks
from lfx.runtime.batching import TOKEN_BUDGET
from lfx.runtime.embedding import SENTENCE_OUTPUT, check_task, embedding_size, encode_texts
from lfx.runtime.generation import GenerationSettings, GraphGenerator, resolve, search
from lfx.runtime.generation.defaults import read_defaults
from lfx.runtime.generation.inputs import check_task as check_generation_task
from lfx.runtime.generation.inputs import encode_texts as encode_inputs
from lfx.runtime.generation.inputs import is_texts, prepare_inputs
from lfx.runtime.generation.rows import generate_rows, join_rows
from lfx.runtime.inputs import Feeds, Int64, prepare, prepare_each, seqlen_of, stack
from lfx.runtime.loading import load_model
from lfx.runtime.metrics import Metrics
from lfx.runtime.outputs import OutputRequest, request_outputs
from lfx.runtime.ragged import Row, run_rows
from lfx.runtime.tokenizer import Tokenizer, text_folder
from lfx.signature import Signature

MAX_THREADS = 1024
# Number of sequences that `Engine.stream` reads and sorts by length at a time.
AHEAD = 256
ON_ERROR = ("raise", "return")
# Values are arrays, or lists of arrays, one for each sequence; with `device_outputs` on a GPU, DLPack objects.
Outputs = dict[str, NDArray[Any] | list[NDArray[Any]]]


class Engine:
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
        threads: number of CPU threads of one run, 1 to 1,024. Default: the backend's own.
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
        self.threads = threads
        self.metrics = Metrics()
        self._forked = False
        self._tokenizer: Tokenizer | None = None
        model = load_model(path, backend, provider, threads, precision, kernels)
        self.manifest, self.signature = model.manifest, model.signature
        self._files = tuple(model.artifact.files.values()) if model.artifact is not None else ()
        self._backend: backends.Backend | None = model.backend
        self._graphs = model.graphs
        self._generation_defaults: dict[str, Any] | None = None
        self.backend = model.backend.name
        self.kernels = model.kernels
        self.precision = precision or self.signature.precision
        self.path = model.path.absolute()
        self._reopen = functools.partial(
            type(self),
            self.path,
            backend,
            provider=provider,
            threads=threads,
            precision=precision,
            kernels=kernels,
            token_budget=self.token_budget,
        )
        forks.watch(self)

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
        start = time.perf_counter()
        try:
            one_of(on_error, "on_error", ON_ERROR, InputError)
            request = request_outputs(self.signature, outputs, output_dtype, device_outputs)
            backend = self._open()
            results: Outputs | list[Row | LfxError]
            if on_error == "return":
                if request.on_device:
                    raise InputError("device_outputs is for sequences of one length, with on_error='raise'")
                sequences = prepare_each(ids, attention_mask, global_attention_mask, self.signature)
                results = self._run_rows(backend, sequences, request, keep_errors=True)
            else:
                batch = prepare(ids, attention_mask, global_attention_mask, self.signature)
                results = self._run_batch(backend, batch, request)
        except BaseException:
            self.metrics.failed()
            raise
        self.metrics.answered(time.perf_counter() - start)
        return results

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
            prompt: is put before each text; an empty string is none. Default: the default prompt of the checkpoint's
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
        start = time.perf_counter()
        try:
            self.check_usable()
            check_task(self.signature)
            ids = encode_texts(texts, self._open_tokenizer(tokenizer), prompt=prompt, truncate=truncate)
            size = embedding_size(self.signature)
            rows = [row[SENTENCE_OUTPUT] for row in self.stream(ids, outputs=[SENTENCE_OUTPUT])]
        except BaseException:
            self.metrics.failed()
            raise
        self.metrics.answered(time.perf_counter() - start)
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
        rows = self._run_rows(self._open(), requests, request, keep_errors=on_error == "return")
        return [
            row if isinstance(row, LfxError) else {name: array[None] for name, array in row.items()} for row in rows
        ]

    @property
    def identity(self) -> str:
        """Digest of the model: its manifest's, or those of a single ONNX file and of its weight files."""
        if self.manifest is not None:
            return str(self.manifest.to_dict()["manifest_sha256"])
        return " ".join(sha256(file) for file in self._files)

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether the Engine can run a batch of this shape: within the model's limits and, for a plan, in a profile."""
        batch, seqlen = whole_number(batch, "batch", 1), whole_number(seqlen, "seqlen", 1)
        longest = self.signature.max_seqlen
        return (longest is None or seqlen <= longest) and self._open().supports_shape(batch, seqlen)

    def shape_check(self) -> Callable[[int, int], bool]:
        """Return a function like `supports_shape` for lengths within the model's limits; it is fast for many calls.

        Raises:
            InputError: the Engine is closed.
            LfxError: the Engine was made before a fork.
        """
        return self._open().supports_shape

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
        longest = self.signature.max_seqlen or 4096
        has_global_mask = any(spec.name == "global_attention_mask" for spec in self.signature.inputs)
        if shapes is None:  # a plan may have been built for other lengths
            shapes = [shape for shape in ((1, 1), (1, longest)) if self.supports_shape(*shape)]
        else:
            shapes = _checked_shapes(shapes, self.signature.max_seqlen)
        for batch, seqlen in shapes:
            shape = (batch, 2, seqlen) if self.signature.has_choices else (batch, seqlen)
            try:
                ids = np.full(shape, self.signature.pad_token_id, dtype=np.int64)
            except (MemoryError, ValueError) as error:
                raise InputError(f"a batch of {batch} sequences of {seqlen} tokens does not fit in memory") from error
            global_mask = np.zeros_like(ids) if has_global_mask else None
            sequences = prepare(ids, None, global_mask, self.signature)
            self._open().infer(stack(sequences, self.signature.pad_token_id))

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
                supported, or out of range; beams with stream=True; or the Engine is closed.
            ArtifactError: there is no tokenizer, or generation_config.json is broken.
            LfxError: the logits are not finite, the Engine was made before a fork, or the backend failed.
        """
        start = time.perf_counter()
        try:
            keep_errors = one_of(on_error, "on_error", ON_ERROR, InputError) == "return"
            model, settings = self._generator(), self._settings(options, stream=flag(stream, "stream"))
            if is_texts(inputs):
                masks = (attention_mask, global_attention_mask)
                open_tokenizer = functools.partial(self._open_tokenizer, tokenizer)
                inputs = encode_inputs(inputs, masks, open_tokenizer, truncate=truncate, keep_errors=keep_errors)
            masks = (attention_mask, global_attention_mask)
            sequences = prepare_inputs(inputs, *masks, self.signature, keep_errors=keep_errors)
            result: Int64 | Iterator[Int64] | list[Int64 | LfxError]
            if stream:
                result = search.stream(model, cast("list[Feeds]", sequences), settings)
            elif keep_errors:
                result = self._generate_rows(model, sequences, settings, keep_errors=True)
            else:
                result = self._generate(model, cast("list[Feeds]", sequences), settings)
        except BaseException:
            self.metrics.failed()
            raise
        self.metrics.answered(time.perf_counter() - start)
        return result

    def generation_settings(self, **options: Any) -> GenerationSettings:
        """Check the options of `generate`, and return them with the checkpoint's defaults.

        Raises:
            InputError, ArtifactError: what `generate` raises for them.
        """
        self._generator()
        return self._settings(options, stream=False)

    def _generate(self, model: GraphGenerator, sequences: list[Feeds], settings: GenerationSettings) -> Int64:
        if len({seqlen_of(feeds) for feeds in sequences}) == 1:
            return search.generate(model, sequences, settings)
        rows = self._generate_rows(model, sequences, settings, keep_errors=False)
        return join_rows(cast("list[Int64]", rows), settings.pad_token_id or 0)

    def _generate_rows(
        self,
        model: GraphGenerator,
        sequences: Sequence[Feeds | LfxError],
        settings: GenerationSettings,
        *,
        keep_errors: bool,
    ) -> list[Int64 | LfxError]:
        return generate_rows(
            model,
            sequences,
            settings,
            self.token_budget,
            model.encoder.supports_shape,
            pad=self.signature.may_pad,
            keep_errors=keep_errors,
        )

    def _generator(self) -> GraphGenerator:
        self._open()
        check_generation_task(self.signature)
        graphs = self._graphs  # another thread may close the Engine while this one runs
        if graphs is None:
            raise InputError("this Engine has no decoder, so it writes no texts; open the bundle")
        return GraphGenerator(*graphs, self.signature, self._count)

    def _settings(self, options: Mapping[str, Any], *, stream: bool) -> GenerationSettings:
        decoder = self.signature.decoder
        assert decoder is not None
        if self._generation_defaults is None:
            self._generation_defaults = read_defaults(text_folder(self.path, self.manifest))
        settings = resolve(
            options,
            self._generation_defaults,
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

    def _open_tokenizer(self, given: Tokenizer | None) -> Tokenizer:
        if given is not None:
            return given
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(text_folder(self.path, self.manifest), self.signature)
        return self._tokenizer

    def _run_batch(self, backend: backends.Backend, sequences: Sequence[Feeds], request: OutputRequest) -> Outputs:
        if len({seqlen_of(feeds) for feeds in sequences}) == 1:
            return dict(self._infer(backend, stack(sequences, self.signature.pad_token_id), request))
        if request.on_device:
            raise InputError("the sequences have different lengths; run each length on its own for device_outputs")
        rows = self._run_rows(backend, sequences, request)
        outputs: Outputs = {}
        for spec in request.signature.outputs:
            arrays = [row[spec.name] for row in rows]
            outputs[spec.name] = arrays if "sequence" in spec.shape else np.stack(arrays)
        return outputs

    def _infer(self, backend: backends.Backend, feeds: Feeds, request: OutputRequest) -> Row:
        outputs = backend.infer(feeds, request.names, on_device=request.on_device)
        _check_outputs(outputs, request.signature, len(feeds["input_ids"]))
        self._count(feeds)
        return request.convert(outputs)

    def _count(self, feeds: Feeds) -> None:
        """Count a batch that was computed."""
        ids = feeds["input_ids"]
        real = int(feeds["attention_mask"].sum()) if "attention_mask" in feeds else ids.size
        self.metrics.computed(len(ids), real, ids.size - real)

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
        if isinstance(documents, str | bytes | bytearray | memoryview | UserString | Mapping):
            raise InputError(f"documents is {type(documents).__name__}; give an iterable of sequences of integers")
        try:
            iterator = iter(documents)
        except TypeError as error:
            raise InputError(
                f"documents is {type(documents).__name__}; give an iterable of sequences of integers"
            ) from error
        return self._stream(iterator, ahead, request, keep_errors=on_error == "return")

    def _stream(
        self, documents: Iterator[Any], ahead: int, request: OutputRequest, *, keep_errors: bool
    ) -> Iterator[Any]:
        indices = itertools.count()
        while chunk := list(itertools.islice(documents, ahead)):
            sequences = [
                self._prepare_document(document, index, keep_error=keep_errors)
                for document, index in zip(chunk, indices, strict=False)
            ]
            yield from self._run_rows(self._open(), sequences, request, keep_errors=keep_errors)

    def _prepare_document(self, document: Any, index: int, *, keep_error: bool) -> Feeds | LfxError:
        try:
            try:
                sequences = prepare(document, None, None, self.signature)
            except InputError as error:
                raise InputError(f"document {index}: {error}") from error
            if len(sequences) != 1:
                raise InputError(f"document {index} has {len(sequences)} sequences; give each as a document of its own")
        except InputError as error:
            if keep_error:
                return error
            raise
        return sequences[0]

    def check_usable(self) -> None:
        """Raise an error if the Engine cannot run.

        Raises:
            InputError: the Engine is closed.
            LfxError: the Engine was made before a fork.
        """
        self._open()

    def _open(self) -> backends.Backend:
        if self._forked:
            raise LfxError(forks.made_before("Engine"))
        backend = self._backend  # another thread may close the Engine while this one runs
        if backend is None:
            raise InputError("this Engine is closed; make a new one")
        return backend

    def forked(self) -> None:
        """Refuse to run in a child process, and never free the model there: that may wait for the parent's threads."""
        self._forked = True
        for model in (self._backend, self._graphs):
            if model is not None:
                forks.keep(model)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._backend is None:
            raise InputError("this Engine is closed, and cannot be pickled or copied; make a new one")
        return self._reopen, ()

    def _run_rows(
        self,
        backend: backends.Backend,
        sequences: Sequence[Feeds | LfxError],
        request: OutputRequest,
        *,
        keep_errors: bool = False,
    ) -> list[Any]:
        return run_rows(
            sequences,
            lambda feeds: self._infer(backend, feeds, request),
            request.signature,
            self.token_budget,
            backend.supports_shape,
            keep_errors=keep_errors,
        )

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        self._backend = self._graphs = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_outputs(outputs: Mapping[str, Any], signature: Signature, batch: int) -> None:
    """Raise ArtifactError for an output of a batch that has another form than the signature says."""
    for spec in signature.outputs:
        shape = getattr(outputs[spec.name], "shape", None)  # of an array, or of an output on a device
        if (
            not isinstance(shape, tuple)
            or len(shape) != len(spec.shape)
            or (spec.shape[:1] == ("batch",) and shape[0] != batch)
        ):
            shape = f"shape {shape}" if isinstance(shape, tuple) else type(outputs[spec.name]).__name__
            raise ArtifactError(
                f"output {spec.name} of a batch of {batch} has {shape} where the model's signature says "
                f"({', '.join(map(str, spec.shape))}); export the model again"
            )


def _checked_shapes(shapes: Any, longest: int | None) -> list[tuple[int, int]]:
    checked = []
    try:
        for batch, seqlen in shapes:
            checked.append(
                (
                    whole_number(batch, "batch", 1),
                    whole_number(seqlen, "seqlen", 1, LARGEST if longest is None else longest),
                )
            )
    except (TypeError, ValueError) as error:
        raise InputError(f"shapes is {shown(shapes)}; give a list of pairs (batch, seqlen)") from error
    return checked
