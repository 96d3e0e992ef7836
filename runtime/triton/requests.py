"""Answers the requests of a Triton server: ids or texts, in batches of sequences of similar lengths."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.checks import shown, whole_number
from lfx.errors import InputError, LengthError, LfxError, one_line
from lfx.machine import usable_cores
from lfx.runtime.batch_runner import Outputs
from lfx.runtime.batching import TOKEN_BUDGET
from lfx.runtime.engine import Engine
from lfx.runtime.inputs import Feeds, pad_choices, prepare, seqlen_of
from lfx.runtime.postprocess import Postprocessor, answer_outputs
from lfx.runtime.text_files import TOKENIZER, text_folder
from lfx.runtime.tokenizer import Encoded, Tokenizer, encode_ids, open_tokenizer
from lfx.signature import SENTENCE_EMBEDDING, TASKS, Signature, TensorSpec

ANSWERS, TOKENS = "answers", "num_tokens"  # outputs besides the model's
# Texts are UTF-8 in tensors of bytes, with NUL bytes after the shorter ones. Triton's own type for texts does not reach
# a model in Python where numpy is 2 and the Python backend was built for numpy 1 (Triton 2.51).
TEXT = "uint8"
MODEL_PARAMETER = "model"  # path of the model; a relative one starts at the folder of its version
COUNTERS = {
    "sequences": "Sequences that were computed",
    "batches": "Batches that were computed",
    "tokens": "Real tokens that were computed",
    "padding_tokens": "Padding tokens that were computed",
}
_TAKEN = ctypes.c_char_p(b"used_dltensor")  # capsules keep the pointer to their name
_TEXT_INPUTS = ("text", "pair", "choices")


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        inputs: name -> array with a batch axis. Ids: `input_ids` and the masks, as `Engine.run` takes them. Texts:
            `text` and, where the task needs it, `pair`, (batch, bytes) uint8, UTF-8 with NUL bytes after the shorter
            ones; for multiple choice `choices`, (batch, choices, bytes).
        outputs: names of the outputs that the client wants.
        parameters: `truncate`: whether to cut a text that is too long; `prompt`: what to put before each text.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: frozenset[str]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Row:
    """A sequence of a request, and its text if it was one; `result` is set when it was run."""

    feeds: Feeds
    encoded: Encoded | None = None
    result: Outputs | LfxError | None = None

    @property
    def num_tokens(self) -> int:
        mask = self.feeds.get("attention_mask")
        return int(self.feeds["input_ids"].size if mask is None else mask.sum())


def input_specs(signature: Signature, *, has_tokenizer: bool) -> list[TensorSpec]:
    """The inputs of the model in Triton; each request has some of them."""
    specs = list(signature.inputs)
    if has_tokenizer:
        specs.append(TensorSpec("text", TEXT, ("batch", "bytes")))
        second = TensorSpec("choices", TEXT, ("batch", "choices", "bytes"))
        specs.append(second if signature.has_choices else TensorSpec("pair", TEXT, ("batch", "bytes")))
    return specs


def output_specs(signature: Signature, *, has_tokenizer: bool) -> list[TensorSpec]:
    """The outputs of the model in Triton: those of its graph, and for texts the numbers of tokens and the answers.

    Raises:
        InputError: an output of the graph has one of the names of the others.
    """
    added: list[TensorSpec] = []
    if has_tokenizer:
        added.append(TensorSpec(TOKENS, "int64", ("batch", 1)))
        if answer_outputs(signature):
            added.append(TensorSpec(ANSWERS, TEXT, ("batch", "bytes")))
    taken = {spec.name for spec in signature.outputs} & {spec.name for spec in added}
    if taken:
        raise InputError(
            f"the model has an output {min(taken)}, a name that lfx gives to one of its own in Triton; export it with "
            "another name, or without a tokenizer"
        )
    return [*signature.outputs, *added]


def finds_tokenizer(model: Path, manifest: Any) -> bool:
    """Whether a bundle or a plan has a tokenizer, so that it takes texts."""
    return (text_folder(model, manifest) / TOKENIZER).exists()


class TritonModel:
    """A model that answers the requests of one instance.

    Args:
        engine: runs the batches.
        tokenizer: None if the model takes ids only.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._signature = engine.signature
        self._tokenizer = tokenizer
        self._postprocessor = None if tokenizer is None else Postprocessor(tokenizer)
        self._counted = dict.fromkeys(COUNTERS, 0)

    @classmethod
    def open(cls, args: Mapping[str, str]) -> TritonModel:
        """Open the model of an instance, and run it once on a short and a long sequence.

        Args:
            args: what the Python backend gives to `initialize`.
        Raises:
            LfxError: the model or its tokenizer cannot be opened.
        """
        config = json.loads(args["model_config"])
        values = {name: value["string_value"] for name, value in config["parameters"].items()}
        version = Path(args["model_repository"]) / args["model_version"]
        path = version / values[MODEL_PARAMETER]
        if args["model_instance_kind"] == "GPU":
            use_gpu(int(args["model_instance_device_id"]))
        threads = int(values["threads"]) if "threads" in values else _share_of_cores(config, path)
        engine = Engine(
            path,
            values.get("backend", "auto"),
            provider=values.get("provider", "cpu"),
            threads=threads,
            precision=values.get("precision"),
            token_budget=int(values.get("token_budget", TOKEN_BUDGET)),
        )
        tokenizer = None
        if finds_tokenizer(path, engine.text_source):
            tokenizer = open_tokenizer(path, engine.text_source, engine.signature)
        engine.warm_up()
        return cls(engine, tokenizer)

    def answer(self, requests: Sequence[Request | LfxError]) -> list[dict[str, NDArray[Any]] | LfxError]:
        """Run requests together, in batches of similar lengths within the token budget.

        Args:
            requests: an error stands for a request that could not be read, and is its answer.
        Returns:
            For each request: output name -> array with a batch axis, or its error. Outputs per token of texts of
            different lengths are filled with zeros after each text's `num_tokens`. `answers` is JSON in UTF-8, with
            spaces after the shorter ones.
        """
        prepared = [_own_error(self._prepare, request) for request in requests]
        names = self._output_names(requests)
        self._run([row for rows in prepared if not isinstance(rows, LfxError) for row in rows], names)
        return [_own_error(self._result, request, rows) for request, rows in zip(requests, prepared, strict=True)]

    def counted(self) -> dict[str, int]:
        """The increase of each of `COUNTERS` since the last call."""
        snapshot = self._engine.metrics.snapshot()
        now = {name: getattr(snapshot, name) for name in COUNTERS}
        grown = {name: now[name] - self._counted[name] for name in now}
        self._counted = now
        return grown

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def _prepare(self, request: Request) -> list[_Row]:
        inputs = request.inputs
        has_text = any(name in inputs for name in _TEXT_INPUTS)
        has_ids = any(name not in _TEXT_INPUTS for name in inputs)
        if has_text == has_ids:
            raise InputError(f"a request has {_listed(inputs)}; give either input_ids with its masks, or text")
        if has_text:
            return [self._encoded_row(i, request) for i in range(len(next(iter(inputs.values()))))]
        if "input_ids" not in inputs:
            raise InputError(f"a request has {_listed(inputs)} and no input_ids; give them")
        if request.parameters.get("prompt"):
            raise InputError("prompt is put before a text, and a request has input_ids; leave it out, or give texts")
        masks = (inputs.get("attention_mask"), inputs.get("global_attention_mask"))
        return [_Row(feeds) for feeds in prepare(inputs["input_ids"], *masks, self._signature)]

    def _encoded_row(self, index: int, request: Request) -> _Row:
        """Tokenize a text of a request; an error says its index if there are several."""
        try:
            texts = {name: _texts(array[index]) for name, array in request.inputs.items()}
            return self._tokenized(texts, request.parameters)
        except InputError as error:
            if len(next(iter(request.inputs.values()))) == 1:
                raise
            raise type(error)(f"text {index}: {error}") from error

    def _tokenized(self, texts: Mapping[str, list[str]], parameters: Mapping[str, Any]) -> _Row:
        task = self._signature.task
        if "text" not in texts:
            raise InputError(f"a request has {_listed(texts)} and no text; give it")
        text, pair = texts["text"][0], texts.get("pair", [None])[0]
        if self._signature.has_choices:
            if not texts.get("choices"):
                raise InputError(f"{task} needs the prompt as text, and choices; give both")
            encoded = [self._encode(text, choice, parameters) for choice in texts["choices"]]
        else:
            if TASKS[task].needs_pair and pair is None:
                raise InputError(f"{task} needs the question as text and the document as pair; give both")
            encoded = [self._encode(text, pair, parameters)]
        ids, mask = pad_choices([item.ids for item in encoded], self._signature.pad_token_id)
        if self._signature.has_choices:
            ids, mask = ids[None], mask[None]
        return _Row(prepare(ids, mask, None, self._signature)[0], encoded[0])

    def _encode(self, text: str, pair: str | None, parameters: Mapping[str, Any]) -> Encoded:
        if self._tokenizer is None:
            raise InputError("this model has no tokenizer; give input_ids")
        prompt, truncate = parameters.get("prompt"), parameters.get("truncate", False)
        if not isinstance(truncate, bool):
            raise InputError(f"the parameter truncate is {shown(truncate)}; give true or false")
        if prompt is not None and self._signature.task != SENTENCE_EMBEDDING:
            raise InputError(f"{self._signature.task} takes no prompt; leave it out")
        if prompt is not None and not isinstance(prompt, str):
            raise InputError(f"the parameter prompt is {shown(prompt)}; give a text")
        if truncate:
            return self._tokenizer.truncate(text, pair, prompt=prompt)
        try:
            return self._tokenizer.encode(text, pair, prompt=prompt)
        except LengthError as error:
            reason = str(error).partition(";")[0]
            raise LengthError(f"{reason}; shorten it, or give the parameter truncate: true to have it cut") from error

    def _output_names(self, requests: Sequence[Request | LfxError]) -> list[str] | None:
        """Names of the model's outputs that the requests need together; None = all."""
        wanted: frozenset[str] = frozenset().union(*(r.outputs for r in requests if not isinstance(r, LfxError)))
        if ANSWERS in wanted:
            wanted |= set(answer_outputs(self._signature))
        return [spec.name for spec in self._signature.outputs if spec.name in wanted] or None

    def _run(self, rows: Sequence[_Row], names: list[str] | None) -> None:
        """Run sequences in batches; if a batch fails, each of its sequences gets the error."""
        results = _own_error(self._engine.run_together, [row.feeds for row in rows], outputs=names, on_error="return")
        for row, result in zip(rows, [results] * len(rows) if isinstance(results, LfxError) else results, strict=True):
            row.result = result

    def _result(self, request: Request, rows: Sequence[_Row]) -> dict[str, NDArray[Any]]:
        """The outputs of a request; raises the error of its first sequence that has one."""
        outputs: list[Outputs] = []
        for row in rows:
            assert row.result is not None
            if isinstance(row.result, LfxError):
                raise row.result
            outputs.append(row.result)
        result = {
            spec.name: _stacked([np.asarray(item[spec.name]) for item in outputs])
            for spec in self._signature.outputs
            if spec.name in request.outputs
        }
        if TOKENS in request.outputs:
            result[TOKENS] = np.array([[row.num_tokens] for row in rows], np.int64)
        if ANSWERS in request.outputs:
            result[ANSWERS] = _as_bytes([self._answers(row, item) for row, item in zip(rows, outputs, strict=True)])
        return result

    def _answers(self, row: _Row, outputs: Outputs) -> bytes:
        """The answers of a sequence as JSON: those of `Postprocessor.answers`."""
        assert self._postprocessor is not None
        positions = None
        encoded = row.encoded
        if encoded is None:
            ids, mask = row.feeds["input_ids"], row.feeds.get("attention_mask")
            seqlen = seqlen_of(row.feeds)
            first = None if mask is None else mask.reshape(-1, seqlen)[0].tolist()
            encoded, positions = encode_ids(ids.reshape(-1, seqlen)[0].tolist(), first)
        answers = self._postprocessor.answers_of_request(encoded, outputs, positions)
        return json.dumps(answers, ensure_ascii=False).encode()


def _own_error(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function; returns its result, the first argument that is an error, or the error that it raised.

    An exception that leaves the model is the answer of all requests that Triton collected, so none may.
    """
    for arg in args:
        if isinstance(arg, LfxError):
            return arg
    try:
        return function(*args, **options)
    except LfxError as error:
        return error
    except Exception as error:
        return LfxError(f"{type(error).__name__} in lfx: {one_line(error)}; please report it")


def released(capsule: Any) -> None:
    """Give a DLPack capsule that Triton has taken the name of taken capsules.

    Triton gives it another name, for which numpy would print an error when the capsule is freed.
    """
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _TAKEN)


def _as_bytes(texts: Sequence[bytes]) -> NDArray[np.uint8]:
    """Texts as (texts, bytes), with spaces after the shorter ones."""
    width = max(map(len, texts))
    return np.frombuffer(b"".join(text.ljust(width) for text in texts), np.uint8).reshape(len(texts), width).copy()


def use_gpu(number: int) -> None:
    """Let this process see one GPU only, since an Engine runs on the first that it sees.

    Raises:
        LfxError: CUDA was used in this process before, so that it sees the others too.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return  # the Engine says what is missing
    count = ctypes.c_int()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 1 and number > 0:
        raise LfxError(
            f"this instance is for GPU {number}, and its process has used CUDA on all GPUs already; start one server "
            f"for each GPU instead, with CUDA_VISIBLE_DEVICES={number}"
        )


def _share_of_cores(config: Mapping[str, Any], path: Path) -> int | None:
    """Number of threads of an instance, so that all instances on the CPU use each core once; None = the default."""
    counts = [group.get("count", 1) for group in config["instance_group"] if group.get("kind") == "KIND_CPU"]
    if sum(counts) <= 1 or path.suffix == ".plan":
        return None
    return max(usable_cores() // whole_number(sum(counts), "the number of instances", 1), 1)


def _texts(array: NDArray[np.uint8]) -> list[str]:
    """Decode a text (bytes,), or several (texts, bytes)."""
    try:
        return [row.tobytes().rstrip(b"\0").decode() for row in np.atleast_2d(array)]
    except UnicodeDecodeError as error:
        raise InputError("a text is not UTF-8; convert it first") from error


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "no inputs"


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Concatenate the outputs of sequences, each with a batch axis of 1; shorter ones are filled with zeros."""
    shape = tuple(np.max([array.shape[1:] for array in arrays], axis=0).astype(int))
    if all(array.shape[1:] == shape for array in arrays):
        return np.concatenate(arrays)
    result = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for target, array in zip(result, arrays, strict=True):
        target[tuple(map(slice, array.shape[1:]))] = array[0]
    return result
