"""int8 of a model that writes texts: the texts of greedy search, which calibrate its decoder and judge the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lfx.checks import shown
from lfx.errors import ExportError, one_line
from lfx.export.quantize.calibration import Feeds
from lfx.export.teacher_forcing import DECODER_IDS, encoder_depth, first_feeds, run_teacher_forced
from lfx.parity import Arrays, Case, Report, Runner, compare
from lfx.runtime import Engine
from lfx.runtime.backends import OnnxRuntime
from lfx.runtime.generation.model import Int64
from lfx.signature import GRAPH_INPUTS, TEXT_GENERATION, Signature

Progress = Callable[[str], None]
# Number of tokens of each call of the decoder in the comparison; the last is repeated. One token a call would
# take as long as writing the texts, three times.
_STEPS = (3, 1, 64)
_GREEDY: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False}


def greedy_options(generate: Mapping[str, Any] | None, task: str) -> dict[str, Any]:
    """Check the options of generation that a caller gives, and return those of greedy search.

    Raises:
        ExportError: the model writes no texts, a value is no JSON type, or an option asks for another search.
    """
    if generate is not None and not isinstance(generate, Mapping):
        raise ExportError(f"generate is {type(generate).__name__}; give a dict of options of Engine.generate")
    options = dict(generate or {})
    if options and task != TEXT_GENERATION:
        raise ExportError(
            f"options of generation ({', '.join(map(str, options))}) are for models that write texts, and this one is "
            f"for {task}; leave them out"
        )
    try:
        json.dumps(options)  # they are stored in the manifest
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"generate has a value that JSON does not have ({one_line(error)}); give plain types"
        ) from error
    for name, value in _GREEDY.items():
        if options.get(name, value) != value:
            raise ExportError(
                f"{name} {shown(options[name])}: int8 is calibrated and judged by greedy search; leave it out"
            )
    return {**options, **_GREEDY}


def write_texts(model: Path, windows: Sequence[Feeds], options: Mapping[str, Any], progress: Progress) -> list[Int64]:
    """Write a text for each window by greedy search.

    Args:
        model: a bundle, or the encoder's ONNX file.
        options: of `Engine.generate`.
        progress: called with the number of the text before each.
    Returns:
        For each window (1, tokens), from the start token to the end token.
    Raises:
        InputError: an option is not known, or out of range.
    """
    with Engine(model, "onnxruntime") as engine:
        engine.generation_settings(**options)
        texts = []
        for i, feeds in enumerate(windows):
            progress(f"{i + 1} of {len(windows)}")
            texts.append(engine.generate(*(feeds.get(name) for name in GRAPH_INPUTS), **options))
        return texts


def compare_texts(expected: Sequence[Int64], actual: Sequence[Int64]) -> dict[str, Any]:
    """Compare the texts of two models; see `write_texts`.

    Returns:
        The entry `texts` of the manifest's accuracy: `texts`, their number; `text_agreement`, the share of texts that
        are equal; `tokens`, the number of tokens of the expected texts, without start tokens; and `token_agreement`,
        the share of them that come before the first difference.
    """
    equal_texts = equal_tokens = tokens = 0
    for one, other in zip(expected, actual, strict=True):
        shared = min(one.shape[1], other.shape[1])
        differences = np.flatnonzero(one[0, :shared] != other[0, :shared])
        equal_tokens += (int(differences[0]) if len(differences) else shared) - 1
        tokens += one.shape[1] - 1
        equal_texts += np.array_equal(one, other)
    return {
        "texts": len(expected),
        "text_agreement": equal_texts / len(expected),
        "tokens": tokens,
        "token_agreement": equal_tokens / tokens,
    }


def decoder_feeds(
    encoder: Path, windows: Sequence[Feeds], texts: Sequence[Int64], signature: Signature
) -> Iterator[Arrays]:
    """Yield the decoder's inputs of all tokens of each text, with an empty cache.

    The activations are those of the steps of generation, in which each token comes with the cache of those before it.

    Args:
        encoder: the float32 encoder's ONNX file.
        texts: of the float32 model, one for each window; see `write_texts`.
    """
    assert signature.decoder is not None
    run = _encoder(encoder)
    for feeds, text in zip(windows, texts, strict=True):
        first = first_feeds(run(dict(feeds)), feeds["attention_mask"], signature.decoder)
        yield {**first, "input_ids": text[:, :-1]}  # no token comes after the last one


def measure_graphs(
    original: Path,
    quantized: Path,
    held_out: Sequence[Feeds],
    texts: Sequence[Int64],
    signature: Signature,
    progress: Progress,
) -> Report:
    """Compare the int8 graphs with the float32 ones; the decoders get the tokens of the float32 model's texts.

    The witness is the int8 graphs, run without fusion to integer kernels: their MatMuls compute in float32.

    Args:
        original, quantized: the encoders' ONNX files, with the decoders' beside them.
        held_out: windows that were not used for calibration.
        texts: of the float32 model, one for each window; see `write_texts`.
    """
    decoder = signature.decoder
    assert decoder is not None
    inputs = iter([{**feeds, DECODER_IDS: text[:, :-1]} for feeds, text in zip(held_out, texts, strict=True)])

    def runner(model: Path, *, fused: bool = True) -> Runner:
        decode = OnnxRuntime(model.with_name(decoder.model_file), "cpu", None, fused=fused).infer
        return partial(run_teacher_forced, _encoder(model, fused=fused), decode, signature=signature, steps=_STEPS)

    # The keys and the values of each layer stand for its two attentions.
    layers = len(signature.attention_windows) + sum("past" in spec.shape for spec in decoder.inputs)
    return compare(
        [Case(1, feeds["input_ids"].shape[1], "the task's") for feeds in held_out],
        lambda case: next(inputs),
        reference=runner(original),
        witness=runner(quantized, fused=False),
        candidate=runner(quantized),
        precision="int8",
        layers=layers,
        depth=encoder_depth(signature),
        names=("the float32 bundle", "the same graphs with their integers in float32"),
        on_case=lambda case: progress(f"measuring accuracy: {case}"),
    )


def _encoder(model: Path, *, fused: bool = True) -> Runner:
    """Return a function that runs an encoder as `Engine` does, or without fusion."""
    backend = OnnxRuntime(model, "cpu", None, fused=fused, kernels="auto" if fused else "function")
    names = backend.input_names
    return lambda inputs: backend.infer({name: inputs[name] for name in names})
