"""Comparing the two graphs of a model that writes texts with PyTorch, token by token over given texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lfx.errors import ExportError, one_line
from lfx.export.led import cache_names
from lfx.export.load import quiet
from lfx.export.rewrite import attention_layers, clone
from lfx.export.torch_runners import TORCH_DTYPES, dense_model, int8_model
from lfx.parity import Arrays, Case, Report, Runner, compare
from lfx.runtime import Engine
from lfx.runtime.backends import Backend
from lfx.runtime.generation.graphs import check_graphs
from lfx.runtime.runner import model_inputs
from lfx.signature import CACHED, HIDDEN_STATES, PAST, PRESENT, Decoder, Signature

DECODER_IDS, FIRST_LOGITS = "decoder_input_ids", "first_logits"
# Number of tokens of each call of the decoder, of which the first has an empty cache; the last is repeated.
_STEPS = (3, 1, 2, 1)
_TOKENS = 9  # of a text


def compare_generation(
    encoder: Runner,
    decoder: Runner,
    module: nn.Module,
    signature: Signature,
    cases: list[Case],
    progress: Callable[[str], None],
    precision: str,
    quantization: Mapping[str, Any] | None = None,
    *,
    float_precision: str = "fp32",
) -> Report:
    """Compare the encoder's and the decoder's graph with PyTorch over a list of cases.

    The decoder gets the same ids as PyTorch (teacher forcing), and its own cached keys and values from one call to the
    next.

    Args:
        encoder, decoder: functions that run the graphs.
        module: the LEDForConditionalGeneration, in float32.
        precision: of the witness and the tolerance.
        quantization: the manifest's entry, for an int8 model.
        float_precision: of the layers of an int8 model that stay float.
    """
    witness = int8_model(module, quantization) if quantization else clone(module, TORCH_DTYPES[precision])
    return compare(
        cases,
        lambda case: teacher_forced_inputs(case, signature),
        reference=_torch_runner(dense_model(module), signature),
        witness=_torch_runner(witness, signature),
        candidate=lambda inputs: run_teacher_forced(encoder, decoder, inputs, signature),
        precision=precision,
        layers=attention_layers(module),
        depth=encoder_depth(signature),
        float_precision=float_precision,
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def encoder_depth(signature: Signature) -> dict[str, int]:
    """Return the number of attention layers before each output of the encoder."""
    return {spec.name: len(signature.attention_windows) for spec in signature.outputs}


def teacher_forced_inputs(case: Case, signature: Signature) -> Arrays:
    """Return the encoder's inputs of a case, and decoder_input_ids (batch, tokens), random after the start token."""
    assert signature.decoder is not None
    inputs = model_inputs(case, signature)
    tokens = min(_TOKENS, signature.decoder.max_tokens)
    random = np.random.default_rng([case.seqlen, case.batch])
    ids = random.integers(0, signature.vocab_size or 8, (case.batch, tokens))
    ids[:, 0] = signature.decoder.decoder_start_token_id
    return {**inputs, DECODER_IDS: ids.astype(np.int64)}


def load_decoder(engine: Engine) -> Backend:
    """Return the decoder of an open Engine.

    Raises:
        InputError: the Engine has no decoder.
    """
    return check_graphs(engine.graphs, engine.signature)[1]


def run_teacher_forced(
    encoder: Runner, decoder: Runner, inputs: Arrays, signature: Signature, steps: Sequence[int] = _STEPS
) -> Arrays:
    """Run the encoder once and the decoder in steps, the first with an empty cache.

    For one text, the decoder gets two equal rows, which share the encoder's tensors, and the second row is returned.

    Args:
        inputs: of the encoder by name, and decoder_input_ids.
        steps: number of tokens of each call of the decoder; the last is repeated.
    Returns:
        last_hidden_state and the cached keys and values of both graphs, by their names; first_logits, those of the
        first token, and logits, those of the others.
    """
    spec = signature.decoder
    assert spec is not None
    layers, ids = _decoder_layers(spec), inputs[DECODER_IDS]
    encoded = encoder({item.name: inputs[item.name] for item in signature.inputs})
    feeds = first_feeds(encoded, inputs["attention_mask"], spec)
    shares = len(ids) == 1 and HIDDEN_STATES not in feeds
    if shares:  # two rows with the encoder's tensors of one, as beams of one text
        ids = np.repeat(ids, 2, axis=0)
        feeds.update(empty_cache(spec, 2))
    logits = []
    for start, end in _steps(ids.shape[1], steps):
        outputs = decoder({**feeds, "input_ids": ids[:, start:end]})
        logits.append(outputs["logits"])
        feeds.update(_renamed(outputs, layers, "decoder"))
        if HIDDEN_STATES in feeds and start == 0:
            feeds.update(_renamed(outputs, layers, "encoder"))
    cross = [feeds[name] for name in cache_names(PAST, layers, "encoder")]
    own = [feeds[name] for name in cache_names(PAST, layers, "decoder")]
    rows = slice(1, 2) if shares else slice(None)
    own = [states[rows] for states in own]
    return _outputs(encoded["last_hidden_state"], np.concatenate(logits, axis=1)[rows], cross, own)


def first_feeds(encoded: Arrays, attention_mask: NDArray[Any], decoder: Decoder) -> Arrays:
    """Return the decoder's inputs at its first call, without the ids.

    Args:
        encoded: outputs of the encoder.
        attention_mask: of the encoder.
    """
    feeds = {"encoder_attention_mask": attention_mask, **empty_cache(decoder, len(attention_mask))}
    if any(spec.name == HIDDEN_STATES for spec in decoder.inputs):
        return {**feeds, HIDDEN_STATES: encoded["last_hidden_state"]}
    return {**feeds, **_renamed(encoded, _decoder_layers(decoder), "encoder")}


def empty_cache(decoder: Decoder, batch: int) -> Arrays:
    """Return the decoder's cache of no token, by input name."""
    sizes: dict[int | str, int] = {"batch": batch, "past": 0, CACHED: 0}
    return {
        spec.name: np.zeros([axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape], spec.dtype)
        for spec in decoder.inputs
        if not {"past", CACHED}.isdisjoint(spec.shape)
    }


def _steps(tokens: int, steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for step in (*steps, *[steps[-1]] * tokens):
        if start < tokens:
            yield start, min(start + step, tokens)
            start += step


def _decoder_layers(decoder: Decoder) -> int:
    return sum("past" in spec.shape for spec in decoder.inputs) // 2


def _renamed(outputs: Arrays, layers: int, part: str) -> Arrays:
    """Rename outputs of one call to the inputs of the next."""
    names = zip(cache_names(PAST, layers, part), cache_names(PRESENT, layers, part), strict=True)
    return {past: outputs[present] for past, present in names}


def _outputs(hidden: NDArray[Any], logits: NDArray[Any], cross: list[NDArray[Any]], own: list[NDArray[Any]]) -> Arrays:
    """Name the outputs that are compared.

    Args:
        cross, own: keys and values of layer 0, keys and values of layer 1, and so on.
    """
    later = {"logits": logits[:, 1:]} if logits.shape[1] > 1 else {}
    layers = len(own) // 2
    return {
        "last_hidden_state": hidden,
        **dict(zip(cache_names(PRESENT, layers, "encoder"), cross, strict=True)),
        FIRST_LOGITS: logits[:, 0],
        **later,
        **dict(zip(cache_names(PRESENT, layers, "decoder"), own, strict=True)),
    }


def _torch_runner(model: nn.Module, signature: Signature) -> Runner:
    """Return a function that runs Hugging Face's model on all tokens at once."""
    names = {spec.name for spec in signature.inputs}

    def run(inputs: Arrays) -> Arrays:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items() if name in (*names, DECODER_IDS)}
        if "global_attention_mask" not in names:
            tensors["global_attention_mask"] = torch.from_numpy(inputs["global_attention_mask"])
        try:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False), quiet():
                outputs = model(**tensors, use_cache=True, return_dict=True)
        except Exception as error:
            shape = tuple(inputs["input_ids"].shape)
            raise ExportError(f"the PyTorch model itself fails on ids of shape {shape}: {one_line(error)}") from error
        cache = outputs.past_key_values
        cross, own = (
            [states.double().numpy() for layer in part.layers for states in (layer.keys, layer.values)]
            for part in (cache.cross_attention_cache, cache.self_attention_cache)
        )
        hidden, logits = (item.double().numpy() for item in (outputs.encoder_last_hidden_state, outputs.logits))
        return _outputs(hidden, logits, cross, own)

    return run
