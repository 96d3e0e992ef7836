"""Every parameter of the Python API with values of other types: each is accepted, or refused with an LfxError."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfx import runtime
from lfx.errors import InputError, LfxError
from lfx.export import convert, export, relayout, use_loop_attention
from lfx.export.quantize import quantize
from lfx.ray import Documents, EngineOptions, deployment, map_documents
from lfx.runtime.documents import encoded, run_documents
from lfx.runtime.tokenizer import Tokenizer
from lfx.torch import accelerate
from tests.conftest import MakeBundle, MakeLed
from tests.models import save_tiny_checkpoint, tiny_model

Call = tuple[Callable[..., Any], dict[str, Any]]  # a function, and arguments that it accepts
Calls = dict[str, Call]


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2**70": lambda: 2**70,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "empty": lambda: "",
    "x": lambda: "x",
    "null byte": lambda: "a\0b",
    "surrogate": lambda: "\ud800",
    "long": lambda: "x" * 5000,
    "bytes": lambda: b"x",
    "empty list": list,
    "list of None": lambda: [None],
    "nested list": lambda: [[[[3]]]],
    "strings": lambda: ["x", "y"],
    "mixed": lambda: [3, "x", None],
    "empty dict": dict,
    "dict of numbers": lambda: {1: 2},
    "dict": lambda: {"x": None},
    "set": lambda: {3, 4},
    "object": object,
    "float array": lambda: np.array([0.5]),
    "string array": lambda: np.array(["x"]),
    "object array": lambda: np.array([None, {}], dtype=object),
    "empty array": lambda: np.zeros((0, 3), np.int64),
    "number": lambda: np.array(3),
    "complex": lambda: 1j,
    "path": lambda: Path("no/such/path"),
    "range": lambda: range(3),
    "iterator": lambda: iter([3, 4]),
}


class StopError(LfxError):
    """Ends a function at its first step."""


def stop(*arguments: Any, **options: Any) -> None:
    raise StopError


def with_defaults(function: Callable[..., Any], **arguments: Any) -> Call:
    """A call with these arguments, and the defaults of the others; one that has `progress` ends at its first step."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
    return function, {**defaults, **({"progress": stop} if "progress" in defaults else {}), **arguments}


@pytest.fixture(scope="module")
def calls(bundle: MakeBundle, led_bundle: MakeLed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    """The calls by name; those that work in steps end at the first one, and none starts Ray."""
    folder = tmp_path_factory.mktemp("types")
    checkpoint, source, output = folder / "checkpoint", folder / "in.jsonl", folder / "out"
    save_tiny_checkpoint(checkpoint, "text-classification")
    source.write_text('{"text": "the fox"}\n')
    path, model, text = bundle("text-classification"), tiny_model("text-classification"), "the fox"
    masks = {"attention_mask": [1, 1, 1], "global_attention_mask": [1, 1, 1]}
    ids = {"ids": [5, 6, 7], **masks}
    generation = {"max_new_tokens": 2, "num_beams": 1, "do_sample": False, "temperature": 1.0, "top_k": 5, "seed": 1}
    with contextlib.ExitStack() as stack:
        engine, embedder, writer = (
            stack.enter_context(runtime.Engine(model))
            for model in (path, bundle("feature-extraction", pooling="mean"), led_bundle()[1])
        )
        batcher = stack.enter_context(runtime.Batcher(engine))
        tokenizer = Tokenizer(path, engine.signature)
        stack.enter_context(pytest.MonkeyPatch.context()).setattr("lfx.ray.job.connected", stop)

        def run_async(**given: Any) -> Any:
            return asyncio.run(engine.run_async(**given))

        def submit(**given: Any) -> Any:
            return batcher.submit(**given).result()

        yield {
            "Engine": with_defaults(runtime.Engine, path=path),
            "run": with_defaults(engine.run, **ids),
            "run_async": (run_async, with_defaults(engine.run_async, **ids)[1]),
            "stream": with_defaults(engine.stream, documents=[[5, 6, 7]]),
            "warm_up": with_defaults(engine.warm_up, shapes=[(1, 3)]),
            "embed": with_defaults(embedder.embed, texts=[text]),
            "generate": with_defaults(writer.generate, inputs=[5, 6, 7], **masks, **generation),
            "generation_settings": with_defaults(writer.generation_settings, **generation),
            "Batcher": with_defaults(runtime.Batcher, engine=engine),
            "submit": (submit, with_defaults(batcher.submit, **ids)[1]),
            "Tokenizer": (Tokenizer, {"folder": path, "signature": engine.signature}),
            "encode": with_defaults(tokenizer.encode, text=text),
            "windows": with_defaults(tokenizer.windows, text=text, pair=None, stride=1),
            "truncate": with_defaults(tokenizer.truncate, text=text),
            "token_texts": with_defaults(tokenizer.token_texts, text=text),
            "decode": (tokenizer.decode, {"ids": [5, 6, 7]}),
            "verify": with_defaults(runtime.verify, path=path),
            "build_engine": with_defaults(runtime.build_engine, bundle=path, output=folder / "out.plan"),
            "export": with_defaults(export, model=checkpoint, output=output),
            "convert": with_defaults(convert, model=checkpoint, output=output),
            "relayout": with_defaults(relayout, bundle=path, output=output),
            "quantize": with_defaults(quantize, bundle=path, output=output, calibration=source),
            "use_loop_attention": with_defaults(use_loop_attention, model=model),
            "accelerate": with_defaults(accelerate, model=model),
            "run_documents": with_defaults(
                run_documents, engine=engine, tokenizer=tokenizer, source=source, output=folder / "out.jsonl"
            ),
            "encoded": (encoded, {"source": source, "signature": engine.signature, "folder": path}),
            "Documents": (Documents, {"model": path, **with_defaults(EngineOptions)[1]}),
            "deployment": with_defaults(deployment, model=path),
            "map_documents": with_defaults(map_documents, source=source, output=output, options=EngineOptions(path)),
        }


def _other_failure(call: Call, parameter: str, value: Any) -> str | None:
    """What a call says with one argument replaced, if it fails with anything but an LfxError."""
    function, arguments = call
    try:
        result = function(**{**arguments, parameter: value})
        if isinstance(result, Iterator):
            list(itertools.islice(result, 10))
        if isinstance(result, runtime.Engine | runtime.Batcher):
            result.close()
    except LfxError:
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


NAMES = [
    *("Engine", "run", "run_async", "stream", "warm_up", "embed", "generate", "generation_settings"),
    *("Batcher", "submit", "Tokenizer", "encode", "windows", "truncate", "token_texts", "decode"),
    *("run_documents", "encoded", "export", "convert", "relayout", "quantize", "build_engine", "verify"),
    *("use_loop_attention", "accelerate", "Documents", "deployment", "map_documents"),
]


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_of_another_type_is_accepted_or_refused_with_an_lfx_error(name: str, calls: Calls) -> None:
    failures = [
        f"{parameter}={label}: {failure}"
        for parameter in calls[name][1]
        for label, make in VALUES.items()
        if (failure := _other_failure(calls[name], parameter, make())) is not None
    ]
    assert failures == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("generate", {"truncate": "no"}),  # for texts, and the inputs are ids
        ("generate", {"tokenizer": 5}),
        ("encoded", {"signature": "x", "folder": Path("no/such/path")}),  # where there is no tokenizer, which checks it
        ("deployment", {"model": 5}),  # which a replica opens
    ],
    ids=str,
)
def test_an_argument_is_checked_where_it_has_no_use_yet(name: str, arguments: dict[str, Any], calls: Calls) -> None:
    function, given = calls[name]
    with pytest.raises(InputError, match=next(iter(arguments))):
        result = function(**{**given, **arguments})
        list(itertools.islice(result, 1)) if isinstance(result, Iterator) else result


def test_every_call_is_tried(calls: Calls) -> None:
    assert sorted(calls) == sorted(NAMES)
