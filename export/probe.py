"""Properties of a module, found by running it before export: its inputs, global attention rule and use of padding."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import activations
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError, InputError
from lfx.export.rewrite import attention_windows
from lfx.export.torch_runners import disturbed_runner, global_tokens_runner, torch_runner
from lfx.parity import Case, OutputResult, pair_tolerance
from lfx.runtime.engine import check_cuttable, cut
from lfx.runtime.inputs import default_global
from lfx.runtime.runner import model_inputs
from lfx.signature import GRAPH_INPUTS, TASKS, Signature

# The torch modules in transformers' Longformers. Each computes every token independently of the others.
_TOKENWISE_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Tanh, nn.ModuleList)
_SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask", "unk")  # special tokens whose ids a config may have
_LONG = 4096  # longest sequence, in tokens, for which padding is tested
Int64 = NDArray[np.int64]


def default_global_of(module: nn.Module, signature: Signature) -> str:
    """Find the rule by which a module chooses its global tokens if it gets no global_attention_mask.

    The inputs of its attention layers are compared, not its outputs: a label may be the same by chance.

    Args:
        signature: the module's signature, with task, ids and limits; its `default_global` is not used.
    Returns:
        A `default_global` of `lfx.signature.Signature`; "required" if no known rule gives the module's global tokens.
    """
    trials = list(_trial_ids(module, signature))
    record = global_tokens_runner(module, forward_inputs(module))
    try:
        global_tokens = [record(_with_mask(ids)) for ids in trials]
    except ExportError:
        # A module whose forward requires a global_attention_mask has no rule of its own.
        parameter = inspect.signature(module.forward).parameters["global_attention_mask"]
        return "none" if parameter.default is inspect.Parameter.empty else "required"
    separators = ("question", "after_question") if _separator(signature) is not None else ()
    rules: tuple[str, ...] = ("none", "first", *separators)
    for rule in rules:
        ruled = replace(signature, default_global=rule)
        masks = [default_global(ids, ruled) for ids in trials]
        if all(map(_same_globals, global_tokens, masks)):
            return rule
    return "required"


def adds_globals(module: nn.Module, signature: Signature) -> bool:
    """Return whether a module gives global attention to tokens that its global_attention_mask does not mark.

    A module without that input may give it to the first token, so that a row has at most one global token.
    """
    if is_unchanged(module):
        return False
    takes_mask = "global_attention_mask" in forward_inputs(module)
    record = global_tokens_runner(module, forward_inputs(module))
    for ids in _trial_ids(module, signature):
        mask = np.zeros_like(ids)
        mask[..., int(takes_mask)] = 1
        masks = (mask,) if takes_mask else (mask, np.zeros_like(ids))
        layers = record({**_with_mask(ids), "global_attention_mask": mask})
        if not all(any(_same_globals([layer], allowed) for allowed in masks) for layer in layers):
            return True
    return False


def _with_mask(ids: Int64) -> dict[str, Int64]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _same_globals(layers: list[NDArray[np.bool_]], mask: Int64) -> bool:
    """Return whether every attention layer got exactly the global tokens of a mask, and none in its padding."""
    rows = mask.reshape(-1, mask.shape[-1]) == 1
    return all(
        len(layer) == len(rows)
        and np.array_equal(layer[:, : rows.shape[1]], rows)
        and not layer[:, rows.shape[1] :].any()
        for layer in layers
    )


def _separator(signature: Signature) -> int | None:
    """Return the separator's id if it is in the vocabulary."""
    sep, vocab_size = signature.sep_token_id, signature.vocab_size
    return sep if sep is not None and (vocab_size is None or sep < vocab_size) else None


def _trial_ids(module: nn.Module, signature: Signature) -> Iterator[Int64]:
    """Yield ids that contain all special ids of the model, each also as a first token, and three separators per row."""
    step, vocab_size = granularity(module), signature.vocab_size
    length = min(step * -(-12 // step), signature.max_seqlen or 12 * step)
    if length < 8:  # too short for the special ids and the separators
        yield model_inputs(Case(2, length), signature)["input_ids"]
        return
    separator = _separator(signature)
    ids_of_config = (getattr(getattr(module, "config", None), f"{name}_token_id", None) for name in _SPECIAL)
    known = {value for value in ids_of_config if type(value) is int} | set(range(min(vocab_size or 8, 64)))
    special = sorted(token for token in known if 0 <= token < (vocab_size or 8) and token != separator)
    for first in range(0, len(special), 8):
        ids = model_inputs(Case(8, length), signature)["input_ids"]
        selected = special[first : first + 8]
        if separator is not None:
            ids[ids == separator] = special[0]
        for row, token in enumerate(selected):
            ids[row, ..., 0] = token
            inner = selected[: length - 6]
            ids[row, ..., 5 : 5 + len(inner)] = inner
        if separator is not None:
            ids[..., [3, 4, -1]] = separator
        yield ids


def is_hugging_face(module: nn.Module) -> bool:
    """Return whether a module is of one of transformers' task classes, whose default global tokens are known."""
    return type(module).__module__ == hf.__name__ and type(module).__name__ in {t.architecture for t in TASKS.values()}


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module is of one of transformers' task classes, with no submodule replaced, patched or hooked.

    Such a model masks padding, and computes each sequence of a batch independently of the others.
    """
    return is_hugging_face(module) and all(_is_original(part) for part in module.modules())


def _is_original(part: nn.Module) -> bool:
    known_class = type(part) in _TOKENWISE_MODULES or type(part).__module__ in (hf.__name__, activations.__name__)
    no_forward = type(part) is nn.ModuleList  # it defines no forward
    own_forward = (no_forward or type(part).forward.__module__ == type(part).__module__) and "forward" not in vars(part)
    return known_class and own_forward and not part._forward_hooks and not part._forward_pre_hooks


def _is_same(actual: NDArray[Any], expected: NDArray[Any], module: nn.Module) -> bool:
    """Return whether two float32 runs of a module differ by rounding only; integers must be equal."""
    if expected.dtype.kind != "f":
        return np.array_equal(actual, expected)
    result = OutputResult()
    result.add(Case(1, 1), expected, expected, actual)
    return result.error <= pair_tolerance("fp32", len(attention_windows(module)), result.magnitude)


def ignores_padding(module: nn.Module, signature: Signature) -> bool:
    """Return whether padding after a sequence leaves its outputs unchanged; a mean over all positions does not.

    The module runs with padding, and with noise for the hidden states of the padding, so that a dependency shows in
    outputs such as a maximum or a rounded number too.

    Returns:
        True also if lfx never pads, since the module takes no attention_mask or its outputs cannot be cut; False if
        the module takes only one length, so that it cannot be tested.
    """
    names, step, max_seqlen = forward_inputs(module), granularity(module), signature.max_seqlen
    if is_unchanged(module):
        return True
    try:
        check_cuttable(signature)
    except InputError:
        return True
    if "attention_mask" not in names or max_seqlen == 1:
        return True
    limit = max_seqlen if max_seqlen is not None else _LONG
    pairs = [(step, 2 * step)] if step > 1 else [(min(12, limit // 2), min(96, limit))]
    longest = min(limit, _LONG) // step * step
    if longest > pairs[0][1]:  # a head may read positions that are far apart
        pairs.append((longest // 2 // step * step, longest))
    if max_seqlen is not None and pairs[0][1] > max_seqlen:
        return False
    return all(_ignores_padding(module, signature, *pair) for pair in pairs)


def _ignores_padding(module: nn.Module, signature: Signature, length: int, padded_length: int) -> bool:
    names = forward_inputs(module)
    inputs = model_inputs(Case(1, padded_length), signature)
    inputs["input_ids"][..., length:] = signature.pad_token_id
    inputs["attention_mask"][..., length:] = 0
    run = torch_runner(module, "fp32", names)
    unpadded = run({name: array[..., :length] for name, array in inputs.items()})
    for runner in (run, *(disturbed_runner(module, names, length, amount) for amount in (100.0, -100.0))):
        padded = runner(inputs)
        for spec in signature.outputs:
            actual, expected = cut(padded[spec.name][0], spec.shape, length), unpadded[spec.name][0]
            if not _is_same(actual, expected, module):
                return False
    return True


def check_rows(module: nn.Module, signature: Signature) -> None:
    """Check that the outputs of a sequence do not depend on the other sequences of its batch.

    Raises:
        ExportError: an output does.
    """
    if is_unchanged(module):
        return
    try:
        check_cuttable(signature)
    except InputError:
        return  # lfx never batches such outputs
    step = granularity(module)
    length = step if step > 1 else min(12, signature.max_seqlen or 12)
    inputs = model_inputs(Case(2, length), signature)
    run = torch_runner(module, "fp32", forward_inputs(module))
    batched = run(inputs)
    for row in range(2):
        single = run({name: array[row : row + 1] for name, array in inputs.items()})
        for spec in signature.outputs:
            if not _is_same(batched[spec.name][row], single[spec.name][0], module):
                raise ExportError(
                    f"output {spec.name} of a sequence depends on the other sequences of its batch, so a server cannot "
                    "batch requests; compute it within each sequence"
                )


def check_long(module: nn.Module, signature: Signature) -> None:
    """Check that a module runs on its longest sequence, of at most 4,096 tokens.

    Raises:
        ExportError: it fails, for example because a position table of its own is shorter.
    """
    step = granularity(module)
    length = min(signature.max_seqlen or _LONG, _LONG) // step * step
    if is_unchanged(module) or length == 0:
        return
    try:
        torch_runner(module, "fp32", forward_inputs(module))(model_inputs(Case(1, length), signature))
    except ExportError as error:
        raise ExportError(f"{error}; give max_seqlen, the longest sequence that the model takes") from error


def granularity(module: nn.Module) -> int:
    """Return the number that a sequence length must be a multiple of in PyTorch; 1 if a LongformerModel pads."""
    if any(isinstance(m, hf.LongformerModel) for m in module.modules()):
        return 1
    return math.lcm(*(2 * window for window in attention_windows(module)))


def forward_inputs(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the graph inputs that `module.forward` takes."""
    parameters = inspect.signature(module.forward).parameters
    return tuple(name for name in GRAPH_INPUTS if name in parameters)
