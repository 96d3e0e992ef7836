"""`Engine`: a bundle, an ONNX file or a plan that answers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import sys
import time
from collections import UserString
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.checks import LARGEST, file_path, one_of, shown, whole_number
from lfx.errors import ArtifactError, DependencyError, InputError, LfxError
from lfx.machine import int8_overflows
from lfx.manifest import Manifest, sha256
from lfx.runtime import backends, forks
from lfx.runtime.artifact import open_artifact
from lfx.runtime.batching import TOKEN_BUDGET, batches
from lfx.runtime.inputs import Batch, join, prepare
from lfx.runtime.metrics import Metrics
from lfx.runtime.plan import SUFFIX, PlanManifest
from lfx.signature import Signature

MAX_THREADS = 1024
# Sequences that `Engine.stream` sorts by length together.
AHEAD = 256
PRECISIONS = ("fp32", "bf16")
Outputs = dict[str, NDArray[Any] | list[NDArray[Any]]]


class Engine:
    """A loaded Longformer. Thread-safe, and a context manager.

    It works in the process that made it: after a fork, every run in the child is an LfxError; make a new Engine there.
    It can be pickled, for processes that are spawned: the other process opens the same path with the same options.

    Args:
        path: a bundle, an ONNX file that `lfx export` wrote, or a plan of `lfx build-engine`. The files of a bundle,
            and a plan, are checked against their manifest.
        backend: "onnxruntime", "openvino", "reference" (the onnx package's own evaluator, slow), "tensorrt" (plans,
            and nothing else), or "auto": ONNX Runtime, and OpenVINO for bf16, which ONNX Runtime has few CPU kernels
            for, and where `precision` is given.
        provider: of ONNX Runtime: "cpu", "cuda" or "tensorrt". What was asked for is used, or it is an error.
        threads: of one run, 1 to 1,024; default: the backend's own choice.
        precision: of OpenVINO's arithmetic, "fp32" or "bf16", whatever the bundle's is; default: the bundle's. bf16
            needs a CPU that has it (AMX, or AVX-512 with bf16).
        token_budget: most tokens, padding included, that sequences of different lengths are put into one batch with; 1
            or more.
    Attributes:
        signature: inputs, outputs and limits of the model.
        manifest: of the bundle or the plan; None for a lone ONNX file.
        backend: name, version and device of what runs it.
        precision: of the arithmetic, where `precision` was given; else the bundle's.
        threads: as given.
        metrics: what it has done so far; see `lfx.runtime.metrics`.
    Raises:
        InputError: an argument of another type or out of range.
        ArtifactError: a file is missing, cut, changed or no model.
        DependencyError: the backend is not known, not installed, or cannot run this model; says which can.
    """

    def __init__(
        self,
        path: str | Path,
        backend: str = "auto",
        *,
        provider: str = "cpu",
        threads: int | None = None,
        precision: str | None = None,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        if threads is not None:
            threads = whole_number(threads, "threads", 1, MAX_THREADS)
        self.token_budget = whole_number(token_budget, "token_budget", low=1)
        one_of(backend, "backend", ("auto", *backends.BACKENDS, "tensorrt"), DependencyError)
        one_of(provider, "provider", backends.PROVIDERS, DependencyError)
        if precision is not None:
            one_of(precision, "precision", PRECISIONS, DependencyError)
        model = _checked_path(path)
        self.threads = threads
        self.metrics = Metrics()
        self._forked = False
        self.manifest: Manifest | PlanManifest | None = None
        if model.suffix == SUFFIX and not model.is_dir():
            if precision is not None:
                raise DependencyError(f"{model} is a plan, whose precision is fixed; leave precision out")
            if threads is not None:
                raise DependencyError(f"{model} is a plan, which runs on the GPU; leave threads out")
            self._backend: backends.Backend | None = self._load_plan(model, backend, provider)
        else:
            self._artifact = open_artifact(model)
            self.manifest = self._artifact.manifest
            weight_bits = self.manifest.quantization.get("weight_bits") if self.manifest is not None else None
            if weight_bits == 8 and provider == "cpu" and int8_overflows():
                raise DependencyError(
                    f"{path} has int8 weights of 8 bits, which overflow on this CPU without VNNI; make it again "
                    "without --full-range"
                )
            self._backend = self._load(backend, provider, threads, precision)
            self.signature = self._artifact.signature
        self.backend = self._backend.name
        declared = ([s.name for s in self.signature.inputs], [s.name for s in self.signature.outputs])
        if (sorted(self._backend.input_names), self._backend.output_names) != (sorted(declared[0]), declared[1]):
            raise ArtifactError(f"{model} has other inputs or outputs than its manifest; export it again")
        self.precision = precision or self.signature.precision
        self._reopen = functools.partial(
            type(self),
            model.absolute(),
            backend,
            provider=provider,
            threads=threads,
            precision=precision,
            token_budget=self.token_budget,
        )
        forks.watch(self)

    def _load_plan(self, plan: Path, backend: str, provider: str) -> backends.Backend:
        if backend not in ("auto", "tensorrt") or provider != "cpu":
            asked = f"backend {backend!r}" if backend not in ("auto", "tensorrt") else f"provider {provider!r}"
            raise DependencyError(f"{asked} cannot run {plan}: a plan is TensorRT's; leave both out")
        self.manifest = PlanManifest.read(plan)
        self.manifest.verify(plan)
        self.signature = self.manifest.signature
        from lfx.runtime.backends.tensorrt import TensorRt

        return TensorRt(plan, self.manifest)

    def _load(self, backend: str, provider: str, threads: int | None, precision: str | None) -> backends.Backend:
        stored = self._artifact.signature.precision
        if backend == "auto" and (precision is not None or (stored == "bf16" and provider == "cpu")):
            backend = "openvino"  # the only one with a choice, and with bfloat16 on the CPU
        backend = "onnxruntime" if backend == "auto" else backend
        # The onnx package, which the reference is, refuses files with a second name.
        with self._artifact.plain_files(unshared=backend == "reference") as model:
            return backends.load(model, backend, provider, threads, precision, stored)

    def run(self, ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Outputs:
        """Run one batch.

        Args:
            ids: one sequence of integers (a batch of one), a list of sequences, or an integer array
                (batch, seqlen); any seqlen from 1 to the model's maximum, padded inside. For multiple choice:
                (choices, seqlen) or (batch, choices, seqlen).
            attention_mask: as ids; 1 = real token, 0 = padding. Default: all real.
            global_attention_mask: as ids; 1 = attends globally. Default: the task's own rule,
                `signature.default_global`.
        Returns:
            One entry per output name, always with the batch first. For one sequence, an array, or sequences of one
            length: an array, such as last_hidden_state (batch, seqlen, hidden) float32. Sequences of different lengths
            run in batches of neighbouring lengths (`token_budget`), and give a list of arrays for outputs per token,
            each cut to its own length; outputs per sequence are stacked. All are owned by the caller.
        Raises:
            InputError: a length, shape, dtype, mask value or token id that the model cannot take; a closed Engine.
            LfxError: the Engine was made before a fork, or the backend failed.
        Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
        """
        start = time.perf_counter()
        try:
            batch = prepare(ids, attention_mask, global_attention_mask, self.signature)
            outputs = self._run_batch(batch)
        except BaseException:
            self.metrics.failed()
            raise
        self.metrics.answered(time.perf_counter() - start)
        return outputs

    async def run_async(self, ids: Any, attention_mask: Any = None, global_attention_mask: Any = None) -> Outputs:
        """`run` for asyncio: it runs in a thread, and the event loop goes on. See `lfx.runtime.Batcher` for many."""
        return await asyncio.to_thread(self.run, ids, attention_mask, global_attention_mask)

    def run_together(self, requests: Sequence[Batch]) -> list[Outputs]:
        """Run prepared sequences, one a request, in batches of neighbouring lengths; see `lfx.runtime.Batcher`.

        Returns:
            For each request what `run` gives for it alone.
        Raises:
            InputError: they have different numbers of choices.
        """
        if len(requests) == 0:
            return []
        feeds, lengths = join(requests, self.signature.pad_token_id)
        rows = self._run_rows(self._open(), feeds, lengths)
        return [{name: found[i][None] for name, found in rows.items()} for i in range(len(requests))]

    @property
    def identity(self) -> str:
        """A digest of the model: of its manifest, or of a lone ONNX file and its weights."""
        if self.manifest is not None:
            return str(self.manifest.to_dict()["manifest_sha256"])
        return " ".join(sha256(file) for file in self._artifact.files.values())

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether a batch of this shape can be run: any within the model's limits, or a profile of the plan."""
        batch, seqlen = whole_number(batch, "batch", 1), whole_number(seqlen, "seqlen", 1)
        longest = self.signature.max_seqlen
        return (longest is None or seqlen <= longest) and self._open().supports_shape(batch, seqlen)

    def warm_up(self, shapes: Iterable[tuple[int, int]] | None = None) -> None:
        """Run made-up batches, so that the first real one finds memory, kernels and CUDA graphs ready.

        Args:
            shapes: (batch, seqlen) of each, both 1 or more; default: one sequence of one token, and one of the longest
                (of 4,096 tokens where the model has no limit), where a plan takes them. The metrics do not count them.
        Raises:
            InputError: a shape that the model or this machine's memory cannot take.
        """
        self.check_usable()
        longest = self.signature.max_seqlen or 4096
        takes_marks = any(spec.name == "global_attention_mask" for spec in self.signature.inputs)
        if shapes is None:  # a plan may have been built for other lengths
            checked = [shape for shape in ((1, 1), (1, longest)) if self.supports_shape(*shape)]
        else:
            checked = _checked_shapes(shapes, self.signature.max_seqlen)
        for batch, seqlen in checked:
            shape = (batch, 2, seqlen) if self.signature.task == "multiple-choice" else (batch, seqlen)
            try:
                ids = np.full(shape, self.signature.pad_token_id, dtype=np.int64)
            except (MemoryError, ValueError) as error:
                raise InputError(f"a batch of {batch} sequences of {seqlen} tokens does not fit in memory") from error
            marks = np.zeros_like(ids) if takes_marks else None
            self._open().infer(dict(prepare(ids, None, marks, self.signature).feeds))

    def _run_batch(self, batch: Batch) -> Outputs:
        backend = self._open()
        if batch.lengths is None:
            return dict(self._infer(backend, dict(batch.feeds)))
        rows = self._run_rows(backend, batch.feeds, batch.lengths)
        per_token = {spec.name for spec in self.signature.outputs if "sequence" in spec.shape}
        return {name: found if name in per_token else np.stack(found) for name, found in rows.items()}

    def _infer(self, backend: backends.Backend, feeds: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        outputs = backend.infer(feeds)
        ids = feeds["input_ids"]
        real = int(feeds["attention_mask"].sum()) if "attention_mask" in feeds else ids.size
        self.metrics.computed(len(ids), real, ids.size - real)
        return outputs

    def stream(self, documents: Iterable[Any], *, ahead: int = AHEAD) -> Iterator[dict[str, NDArray[Any]]]:
        """Run more sequences than fit in memory, in batches of neighbouring lengths.

        Args:
            documents: one sequence of integers each, (seqlen,); for multiple choice (choices, seqlen).
            ahead: sequences that are read and sorted by length together, 1 or more. The same documents in the same
                order give the same batches, and so bit for bit the same results.
        Yields:
            For each document, in the order given, one array per output name, without the batch axis.
        Raises:
            InputError: `ahead` is out of range, or `documents` cannot be iterated, or the Engine is closed: at once.
                A document that the model cannot take, by its number from 0: when its turn comes; none of its `ahead`
                neighbours is run then. What `documents` itself raises goes on to the caller.
        """
        ahead = whole_number(ahead, "ahead", 1, sys.maxsize)
        self.check_usable()
        if isinstance(documents, str | bytes | bytearray | memoryview | UserString | Mapping):
            raise InputError(f"documents is {type(documents).__name__}; give an iterable of sequences of integers")
        try:
            waiting = iter(documents)
        except TypeError as error:
            raise InputError(
                f"documents is {type(documents).__name__}; give an iterable of sequences of integers"
            ) from error
        return self._stream(waiting, ahead)

    def _stream(self, documents: Iterator[Any], ahead: int) -> Iterator[dict[str, NDArray[Any]]]:
        number = 0
        while chunk := list(itertools.islice(documents, ahead)):
            requests = [self._prepare_document(document, number + i) for i, document in enumerate(chunk)]
            number += len(chunk)
            feeds, lengths = join(requests, self.signature.pad_token_id)
            rows = self._run_rows(self._open(), feeds, lengths)
            for i in range(len(chunk)):
                yield {name: found[i] for name, found in rows.items()}

    def _prepare_document(self, document: Any, number: int) -> Batch:
        try:
            batch = prepare(document, None, None, self.signature)
        except InputError as error:
            raise InputError(f"document {number}: {error}") from error
        if (count := len(batch.feeds["input_ids"])) != 1:
            raise InputError(f"document {number} has {count} sequences; give each as a document of its own")
        return batch

    def check_usable(self) -> None:
        """Raises: InputError: the Engine is closed. LfxError: it was made before a fork."""
        self._open()

    def _open(self) -> backends.Backend:
        if self._forked:
            raise LfxError(forks.made_before("Engine"))
        backend = self._backend  # another thread may close the Engine while this one runs
        if backend is None:
            raise InputError("this Engine is closed; make a new one")
        return backend

    def forked(self) -> None:
        """In a child process: keep the model for ever, since freeing it may wait for threads that are not there."""
        self._forked = True
        if self._backend is not None:
            forks.keep(self._backend)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._backend is None:
            raise InputError("this Engine is closed, and cannot be pickled or copied; make a new one")
        return self._reopen, ()

    def _run_rows(
        self, backend: backends.Backend, feeds: dict[str, NDArray[np.int64]], lengths: Sequence[int]
    ) -> dict[str, list[NDArray[Any]]]:
        """Run padded rows in batches of neighbouring lengths; each output as one array a row, cut to its length."""
        if len(set(lengths)) > 1:
            check_cuttable(self.signature)
            if "attention_mask" not in feeds:
                raise InputError(
                    "this model takes no attention_mask, so no token can be masked; give sequences of one length"
                )
        shapes = {spec.name: spec.shape for spec in self.signature.outputs}
        rows: dict[str, list[Any]] = {name: [None] * len(lengths) for name in shapes}
        choices = feeds["input_ids"].shape[1] if feeds["input_ids"].ndim == 3 else 1
        budget, pad = max(self.token_budget // choices, 1), self.signature.may_pad
        for members in batches(lengths, budget, backend.supports_shape, pad=pad):
            longest = max(lengths[i] for i in members)
            outputs = self._infer(backend, {name: array[members][..., :longest] for name, array in feeds.items()})
            for name, array in outputs.items():
                for place, i in enumerate(members):
                    rows[name][i] = cut(array[place], shapes[name], lengths[i])
        return rows

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        self._backend = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked_path(path: Any) -> Path:
    if not isinstance(path, str | Path):
        raise InputError(f"path is {type(path).__name__}; give the path of a bundle, an .onnx file or a plan")
    if path == "":
        raise ArtifactError("path is empty; give the path of a bundle, made with: lfx export")
    return file_path(path, "path", ArtifactError)


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


def cut(row: NDArray[Any], axes: tuple[int | str, ...], length: int) -> NDArray[Any]:
    """One sequence's part of an output, without its padding."""
    return row[tuple(slice(length) if axis == "sequence" else slice(None) for axis in axes[1:])].copy()


def check_cuttable(signature: Signature) -> None:
    """Sequences of different lengths are padded and their outputs cut: that needs batch in front, and whole axes."""
    for spec in signature.outputs:
        others = [axis for axis in spec.shape[1:] if isinstance(axis, str) and axis not in ("sequence", "choices")]
        if not spec.shape or spec.shape[0] != "batch" or others:
            raise InputError(
                f"output {spec.name} ({', '.join(map(str, spec.shape))}) cannot be cut to each sequence's length; "
                "run sequences of different lengths one by one"
            )
