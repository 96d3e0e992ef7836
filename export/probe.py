"""Properties of a module, found by running it before export: its inputs, global attention rule and use of padding."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import activations
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError, InputError
from lfx.export.rewrite import attention_windows
from lfx.export.torch_runners import disturbed_runner, torch_runner
from lfx.parity import Case
from lfx.runtime.engine import check_cuttable, cut
from lfx.runtime.inputs import default_global
from lfx.runtime.runner import model_inputs
from lfx.signature import GRAPH_INPUTS, TASKS, Signature

# The torch modules in transformers' Longformers. Each computes every token by itself.
_TOKENWISE_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Tanh, nn.ModuleList)
# Largest relative difference, and ten times the largest absolute one, of two float32 runs that count as equal: of one
# shape, or of two, where matrix products may sum in another order. Chosen, not derived from the rounding band of
# lfx.parity: that needs the largest value of an output, and a module may fill outputs with values such as -1e9.
_SAME_SHAPE, _OTHER_SHAPE = 1e-4, 1e-3
_NO_SIGNATURE = Signature("", "feature-extraction", "fp32", (), (), ())


def default_global_of(module: nn.Module, vocab_size: int | None, pad: int | None, sep: int | None) -> str:
    """Find the rule by which a module chooses its global tokens if it gets no global_attention_mask.

    Args:
        vocab_size, pad, sep: number of ids, padding id and separator id; None = unknown.
    Returns:
        A `default_global` of `lfx.signature.Signature`; "required" if no known rule gives the module's outputs.
    """
    step = granularity(module)
    length = step * -(-12 // step)
    separator = sep if sep is not None and (vocab_size is None or sep < vocab_size) else None
    signature = replace(_NO_SIGNATURE, pad_token_id=pad if pad is not None else 1, vocab_size=vocab_size)
    ids = model_inputs(Case(2, length), signature)["input_ids"]
    if separator is not None:
        ids[ids == separator] = (separator + 1) % (vocab_size or 8)
        ids[:, [3, 4, -1]] = separator
    run = torch_runner(module, "fp32")
    try:
        without_mask = run({"input_ids": ids})
    except ExportError:
        # A module whose forward requires its masks has no rule of its own.
        parameters = inspect.signature(module.forward).parameters
        requires_mask = any(parameters[name].default is inspect.Parameter.empty for name in forward_inputs(module)[1:])
        return "none" if requires_mask else "required"
    rules: tuple[str, ...] = ("none", "first", *(("question", "after_question") if separator is not None else ()))
    for rule in rules:
        mask = default_global(ids, replace(signature, default_global=rule, sep_token_id=separator))
        with_mask = run({"input_ids": ids, "global_attention_mask": mask})
        if all(_is_same(with_mask[name], array, _SAME_SHAPE) for name, array in without_mask.items()):
            return rule
    return "required"


def is_hugging_face(module: nn.Module) -> bool:
    """Return whether a module is of one of transformers' task classes, whose default global tokens are known."""
    return type(module).__module__ == hf.__name__ and type(module).__name__ in {t.architecture for t in TASKS.values()}


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module is of one of transformers' task classes, with no submodule replaced, patched or hooked.

    Such a model masks padding, and computes each sequence of a batch by itself.
    """
    return is_hugging_face(module) and all(_is_original(part) for part in module.modules())


def _is_original(part: nn.Module) -> bool:
    known_class = type(part) in _TOKENWISE_MODULES or type(part).__module__ in (hf.__name__, activations.__name__)
    no_forward = type(part) is nn.ModuleList  # it defines none
    own_forward = (no_forward or type(part).forward.__module__ == type(part).__module__) and "forward" not in vars(part)
    return known_class and own_forward and not part._forward_hooks and not part._forward_pre_hooks


def _is_same(actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> bool:
    """Return whether two runs of a module differ by rounding only; integers must be equal, NaN equals NaN."""
    if expected.dtype.kind != "f":
        return np.array_equal(actual, expected)
    return np.allclose(actual, expected, rtol=tolerance, atol=tolerance / 10, equal_nan=True)


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
    limit = max_seqlen if max_seqlen is not None else 96
    length, padded_length = (step, 2 * step) if step > 1 else (min(12, limit // 2), min(96, limit))
    if max_seqlen is not None and padded_length > max_seqlen:
        return False
    inputs = model_inputs(Case(1, padded_length), signature)
    inputs["input_ids"][..., length:] = signature.pad_token_id
    inputs["attention_mask"][..., length:] = 0
    run = torch_runner(module, "fp32", names)
    unpadded = run({name: array[..., :length] for name, array in inputs.items()})
    for runner in (run, *(disturbed_runner(module, names, length, amount) for amount in (100.0, -100.0))):
        padded = runner(inputs)
        for spec in signature.outputs:
            actual, expected = cut(padded[spec.name][0], spec.shape, length), unpadded[spec.name][0]
            if not _is_same(actual, expected, _OTHER_SHAPE):
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
            if not _is_same(batched[spec.name][row], single[spec.name][0], _OTHER_SHAPE):
                raise ExportError(
                    f"output {spec.name} of a sequence depends on the other sequences of its batch, so a server cannot "
                    "batch requests; compute it within each sequence"
                )


def granularity(module: nn.Module) -> int:
    """Return the number that a sequence length must be a multiple of in PyTorch; 1 if a LongformerModel pads."""
    if any(isinstance(m, hf.LongformerModel) for m in module.modules()):
        return 1
    return math.lcm(*(2 * window for window in attention_windows(module)))


def forward_inputs(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the graph inputs that `module.forward` takes."""
    parameters = inspect.signature(module.forward).parameters
    return tuple(name for name in GRAPH_INPUTS if name in parameters)
