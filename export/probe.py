"""What is found out about a module by running it, before it is exported: what it takes, needs and ignores."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
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

# Those of torch's modules that transformers' Longformers have.
_TOKEN_BY_TOKEN = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Tanh, nn.ModuleList)
_NO_SIGNATURE = Signature("", "feature-extraction", "fp32", (), (), ())


def default_global_of(module: nn.Module, vocab_size: int | None, pad: int | None, sep: int | None) -> str:
    """Which of the known rules a module follows when it is called without global_attention_mask.

    Returns:
        A `default_global` of `lfx.signature.Signature`; "required" where no known rule gives the module's numbers.
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
        own = run({"input_ids": ids})
    except ExportError:
        # A forward that asks for its masks has no rule of its own.
        parameters = inspect.signature(module.forward).parameters
        asks = any(parameters[name].default is inspect.Parameter.empty for name in forward_inputs(module)[1:])
        return "none" if asks else "required"
    rules: tuple[str, ...] = ("none", "first", *(("question", "after_question") if separator is not None else ()))
    for rule in rules:
        marks = default_global(ids, replace(signature, default_global=rule, sep_token_id=separator))
        told = run({"input_ids": ids, "global_attention_mask": marks})
        if all(np.allclose(own[name], told[name], rtol=1e-4, atol=1e-5) for name in own):
            return rule
    return "required"


def is_hugging_face(module: nn.Module) -> bool:
    """Whether it is one of transformers' own classes, whose default for the global tokens is known."""
    return type(module).__module__ == hf.__name__ and type(module).__name__ in {t.architecture for t in TASKS.values()}


def is_unchanged(module: nn.Module) -> bool:
    """Whether it is one of transformers' own classes, and every part of it is still what transformers put there.

    Such a model masks padding, and computes each sequence of a batch by itself.
    """
    return is_hugging_face(module) and all(_is_own_part(part) for part in module.modules())


def _is_own_part(part: nn.Module) -> bool:
    own_class = type(part) in _TOKEN_BY_TOKEN or type(part).__module__ in (hf.__name__, activations.__name__)
    inherited = type(part) is nn.ModuleList  # it has no forward of its own
    own_forward = (inherited or type(part).forward.__module__ == type(part).__module__) and "forward" not in vars(part)
    return own_class and own_forward and not part._forward_hooks and not part._forward_pre_hooks


def ignores_padding(module: nn.Module, signature: Signature) -> bool:
    """Whether padding behind a sequence leaves its outputs what they are, which a mean over all positions does not.

    Tried with padding as it is, and with noise in the place of its hidden states, so that what a head takes from it
    shows even in a maximum or a rounded number. True also where lfx never pads: nothing can be masked, or the outputs
    cannot be cut. False where it cannot be tried, since the module takes a single length.
    """
    names, step, longest = forward_inputs(module), granularity(module), signature.max_seqlen
    if is_unchanged(module):
        return True
    try:
        check_cuttable(signature)
    except InputError:
        return True
    if "attention_mask" not in names or longest == 1:
        return True
    most = longest if longest is not None else 96
    short, long = (step, 2 * step) if step > 1 else (min(12, most // 2), min(96, most))
    if longest is not None and long > longest:
        return False
    padded = model_inputs(Case(1, long), signature)
    padded["input_ids"][..., short:] = signature.pad_token_id
    padded["attention_mask"][..., short:] = 0
    run = torch_runner(module, "fp32", names)
    alone = run({name: array[..., :short] for name, array in padded.items()})
    for disturbed in (run, *(disturbed_runner(module, names, short, amount) for amount in (100.0, -100.0))):
        among = disturbed(padded)
        for spec in signature.outputs:
            wanted, found = alone[spec.name][0], cut(among[spec.name][0], spec.shape, short)
            rounding = {"rtol": 1e-3, "atol": 1e-4} if wanted.dtype.kind == "f" else {"rtol": 0, "atol": 0}
            if not np.allclose(found, wanted, **rounding, equal_nan=True):
                return False
    return True


def check_rows(module: nn.Module, signature: Signature) -> None:
    """Every sequence of a batch has the outputs that it has alone, so that lfx may run it with any others.

    Raises:
        ExportError: an output depends on the other sequences.
    """
    if is_unchanged(module):
        return
    try:
        check_cuttable(signature)
    except InputError:
        return  # sequences are never put together
    step = granularity(module)
    length = step if step > 1 else min(12, signature.max_seqlen or 12)
    both = model_inputs(Case(2, length), signature)
    run = torch_runner(module, "fp32", forward_inputs(module))
    together = run(both)
    for row in range(2):
        alone = run({name: array[row : row + 1] for name, array in both.items()})
        for spec in signature.outputs:
            if not np.allclose(together[spec.name][row], alone[spec.name][0], rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ExportError(
                    f"output {spec.name} of a sequence depends on the other sequences of its batch, so no batch of a "
                    "server would be right; compute it within each sequence"
                )


def granularity(module: nn.Module) -> int:
    """What a sequence length must be a multiple of in PyTorch: 1 where a LongformerModel does the padding."""
    if any(isinstance(m, hf.LongformerModel) for m in module.modules()):
        return 1
    return math.lcm(*(2 * window for window in attention_windows(module)))


def forward_inputs(module: nn.Module) -> tuple[str, ...]:
    """The graph inputs that `module.forward` takes."""
    takes = inspect.signature(module.forward).parameters
    return tuple(name for name in GRAPH_INPUTS if name in takes)
