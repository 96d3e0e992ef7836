"""Properties of a module, found by running it before export: its inputs, global attention rule and use of padding."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import activations
from transformers.models.led import modeling_led as led
from transformers.models.longformer import modeling_longformer as hf

from lfx.errors import ExportError, InputError
from lfx.export import led_classifier, loop_attention, pooling, unpadded
from lfx.export.led import LED_CLASSES, GenerationEncoder
from lfx.export.pooling import LongformerForSentenceEmbedding
from lfx.export.rewrite import attention_windows, chunked_attention
from lfx.export.torch_runners import (
    GlobalTokensRunner,
    autocast_layers,
    disturbed_runner,
    global_tokens_runner,
    torch_runner,
)
from lfx.export.windows import both_sides
from lfx.parity import Case, OutputResult, pair_tolerance
from lfx.runtime.inputs import default_global
from lfx.runtime.ragged import check_cuttable, cut
from lfx.runtime.runner import model_inputs
from lfx.signature import GRAPH_INPUTS, TASKS, TEXT_GENERATION, Signature

# The torch modules of transformers' Longformers and of poolings. Each computes every token independently of the others.
_TOKENWISE_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList, *pooling.ACTIVATIONS.values())
_MODULES = (  # of the classes of Longformers and LEDs
    hf.__name__,
    led.__name__,
    GenerationEncoder.__module__,
    led_classifier.__name__,
    unpadded.__name__,
    loop_attention.__name__,
)
_SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask", "unk")  # special tokens whose ids a config may have
_LONG = 4096  # longest sequence, in tokens, that is tried
_GIVE_MAX_SEQLEN = "give max_seqlen, the longest sequence that the model takes"
_FEWEST_IDS = 8  # ids that are tried if the size of the vocabulary is not known
_ROWS = 5  # of the batch whose rows are compared with each alone
Int64 = NDArray[np.int64]


def default_global_of(module: nn.Module, signature: Signature) -> str:
    """Find the rule by which a module chooses its global tokens if it gets no global_attention_mask.

    The inputs of its attention layers are compared, not its outputs: a label may be the same by chance.

    Args:
        signature: the module's signature, with task, ids and limits; its `default_global` is not used.
    Returns:
        A `default_global` of `lfx.signature.Signature`; "required" if no known rule gives the module's global tokens.
    """
    try:
        trials = [(inputs, record(inputs)) for inputs, record in _trials(module, signature)]
    except ExportError:
        # A module whose forward requires a global_attention_mask has no rule of its own.
        parameter = inspect.signature(module.forward).parameters["global_attention_mask"]
        return "none" if parameter.default is inspect.Parameter.empty else "required"
    separators = ("question", "after_question") if _separator(signature) is not None else ()
    rules: tuple[str, ...] = ("none", "first", *separators)
    for rule in rules:
        ruled = replace(signature, default_global=rule)
        if all(_same_globals(layers, _default_global(inputs, ruled)) for inputs, layers in trials):
            return rule
    return "required"


def adds_globals(module: nn.Module, signature: Signature) -> bool:
    """Return whether a module gives global attention to tokens that its global_attention_mask does not mark.

    A module without that input may give it to the first token, so that a row has at most one global token.
    """
    if is_unchanged(module):
        return False
    takes_mask = "global_attention_mask" in forward_inputs(module)
    for inputs, record in _trials(module, signature):
        real = inputs["attention_mask"]
        mask = np.zeros_like(real)
        mask[..., min(int(takes_mask), mask.shape[-1] - 1)] = 1
        masks = (mask * real,) if takes_mask else (mask * real, np.zeros_like(real))
        layers = record({**inputs, "global_attention_mask": mask})
        if not all(any(_same_globals([layer], allowed) for allowed in masks) for layer in layers):
            return True
    return False


def _default_global(inputs: Mapping[str, Int64], signature: Signature) -> Int64:
    """The mask of the tokens that attend globally by a known rule; padding never does."""
    return default_global(inputs["input_ids"], signature) * inputs["attention_mask"]


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


def _trials(module: nn.Module, signature: Signature) -> Iterator[tuple[dict[str, Int64], GlobalTokensRunner]]:
    """Yield inputs, and a function that returns the global tokens of all layers, or of the first one for many ids."""
    names = forward_inputs(module)
    all_layers, first_layer = (global_tokens_runner(module, names, first_layer=first) for first in (False, True))
    for ids in _trial_ids(module, signature):
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}, all_layers
    if "attention_mask" in names:
        for inputs in _padded_inputs(module, signature):
            yield inputs, all_layers
    for ids in _vocabulary_ids(module, signature):
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}, _naming_max_seqlen(first_layer)


def _naming_max_seqlen(record: GlobalTokensRunner) -> GlobalTokensRunner:
    """Add to the errors of a run on a long sequence that max_seqlen may be too large."""

    def run(inputs: Mapping[str, Int64]) -> list[NDArray[np.bool_]]:
        try:
            return record(inputs)
        except ExportError as error:
            raise ExportError(f"{error}; {_GIVE_MAX_SEQLEN}") from error

    return run


def _padded_inputs(module: nn.Module, signature: Signature) -> Iterator[dict[str, Int64]]:
    """Yield a sequence with two tokens of padding on the left, and one on the right; the separators are apart."""
    length = _short_length(module, signature)
    if length < 10:
        return
    separator = _separator(signature)
    for padded in (slice(0, 2), slice(length - 2, length)):
        inputs = model_inputs(Case(1, length), signature)
        if separator is not None:
            inputs["input_ids"][inputs["input_ids"] == separator] = signature.pad_token_id
            inputs["input_ids"][..., [4, 6, length - 3]] = separator
        inputs["input_ids"][..., padded] = signature.pad_token_id
        inputs["attention_mask"][..., padded] = 0
        yield {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _vocabulary_ids(module: nn.Module, signature: Signature) -> Iterator[Int64]:
    """Yield rows of up to 4,096 ids that together contain every id of the vocabulary; the separators are apart."""
    length = longest_trial(module, signature)
    if length < 8:
        return
    separator, vocab_size = _separator(signature), signature.vocab_size or _FEWEST_IDS
    separators = [3, 6, length - 1] if separator is not None else []
    others = [position for position in range(length) if position not in separators]
    ids = [token for token in range(vocab_size) if token != separator]
    for start in range(0, len(ids), len(others)):
        row = model_inputs(Case(1, length), signature)["input_ids"]
        row[..., others] = np.resize(ids[start : start + len(others)], len(others))
        if separators:
            row[..., separators] = separator
        yield row


def _short_length(module: nn.Module, signature: Signature) -> int:
    """Return a length of at least 12 tokens that the module takes; its longest sequence if that is shorter."""
    step = granularity(module)
    return min(step * -(-12 // step), signature.max_seqlen or 12 * step)


def longest_trial(module: nn.Module, signature: Signature, limit: int = _LONG) -> int:
    """Return the longest sequence that the module takes, of at most `limit` tokens; 0 if there is none."""
    step = granularity(module)
    return min(signature.max_seqlen or limit, limit) // step * step


def _trial_ids(module: nn.Module, signature: Signature) -> Iterator[Int64]:
    """Yield ids that contain all special ids of the model, each also as a first token, and three separators per row."""
    length, vocab_size = _short_length(module, signature), signature.vocab_size or _FEWEST_IDS
    if length < 8:  # too short for the special ids and the separators
        yield model_inputs(Case(2, length), signature)["input_ids"]
        return
    separator = _separator(signature)
    ids_of_config = (getattr(getattr(module, "config", None), f"{name}_token_id", None) for name in _SPECIAL)
    known = {value for value in ids_of_config if type(value) is int} | set(range(min(vocab_size, 64)))
    special = sorted(token for token in known if 0 <= token < vocab_size and token != separator)
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
    """Return whether a module is of one of transformers' task classes, whose default global tokens are known.

    A LongformerModel with the pooling of `lfx.export.pooling` is such a module too.
    """
    if type(module) is LongformerForSentenceEmbedding:
        return is_hugging_face(module.longformer)
    if type(module) is GenerationEncoder:
        return type(module.led) is led.LEDModel
    architectures = {*(task.architecture for task in TASKS.values()), *LED_CLASSES.values()}
    return type(module).__module__ in _MODULES and type(module).__name__ in architectures


def is_led(module: nn.Module) -> bool:
    """Return whether a module is an LED, alone or with a head."""
    return isinstance(module, (led.LEDPreTrainedModel, GenerationEncoder))


def task_globals(module: nn.Module, task: str) -> str:
    """Return the rule for the global tokens of a task. An LED and a RoBERTa with a window mark none by themselves.

    LEDs that write texts and those that classify are trained with the first token.
    """
    if getattr(getattr(module, "config", None), "default_global", None) == "none":
        return "none"  # `lfx.export.original.from_original`
    trained = (TEXT_GENERATION, "text-classification")
    return "none" if is_led(module) and task not in trained else TASKS[task].default_global


def is_unchanged(module: nn.Module) -> bool:
    """Return whether `is_hugging_face` holds, with no submodule replaced, patched or hooked.

    Such a model masks padding, and computes each sequence of a batch independently of the others.
    """
    return is_hugging_face(module) and all(_is_original(part) for part in module.modules())


def _is_original(part: nn.Module) -> bool:
    known_modules = (*_MODULES, activations.__name__, pooling.__name__)
    known_class = type(part) in _TOKENWISE_MODULES or type(part).__module__ in known_modules
    no_forward = type(part) is nn.ModuleList  # it defines no forward
    own_forward = (no_forward or type(part).forward.__module__ == type(part).__module__) and "forward" not in vars(part)
    return known_class and own_forward and not part._forward_hooks and not part._forward_pre_hooks


def _is_same(
    actual: NDArray[Any], expected: NDArray[Any], module: nn.Module, whole: NDArray[Any] | None = None
) -> bool:
    """Return whether two float32 runs of a module differ by rounding only; integers must be equal.

    Args:
        whole: the output that `expected` is a part of, whose magnitude the rounding follows: a sequence's only number
            may be near 0. Default: `expected`.
    """
    if expected.dtype.kind != "f":
        return np.array_equal(actual, expected)
    result = OutputResult()
    result.add(Case(1, 1), expected, expected, actual)
    if whole is not None:
        result.add(Case(1, 1), whole, whole, whole)
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
    longest = longest_trial(module, signature)
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


def check_autocast(module: nn.Module, signature: Signature) -> None:
    """Check that a module computes in float32, and not in torch.autocast's half precision.

    Raises:
        ExportError: its forward, or the wrapper that a trainer has put around it, enters torch.autocast on the CPU.
    """
    if is_unchanged(module):
        return
    inputs = model_inputs(Case(1, _short_length(module, signature)), signature)
    if layers := autocast_layers(module, forward_inputs(module), inputs):
        raise ExportError(
            f"{type(module).__name__} computes {layers[0]} in torch.autocast's half precision, so it is no float32 "
            "model; take autocast out of its forward, or, after training in mixed precision, give "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False), or the folder that save_pretrained writes"
        )


def check_repeatable(module: nn.Module, signature: Signature) -> None:
    """Check that two runs of a module give the same outputs, and that they have the axes of the traced graph.

    Raises:
        ExportError: the module has random numbers, or an output has an axis that torch.export took for a constant.
    """
    if is_unchanged(module):
        return
    inputs = model_inputs(Case(_ROWS, _short_length(module, signature)), signature)
    run = torch_runner(module, "fp32", forward_inputs(module))
    first, second = run(inputs), run(inputs)
    sizes = {"batch": _ROWS, "sequence": inputs["input_ids"].shape[-1]}
    for spec in signature.outputs:
        expected = tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape)
        actual = first[spec.name].shape
        sizes_differ = any(isinstance(n, int) and n != m for n, m in zip(expected, actual, strict=False))
        if len(actual) != len(expected) or sizes_differ:
            raise ExportError(
                f"output {spec.name} has shape {actual} where its traced graph has {expected}: torch.export takes a "
                "size of the traced example for a constant, as in nn.LSTM and nn.GRU; use layers that take any length"
            )
        if not _is_same(second[spec.name], first[spec.name], module):
            raise ExportError(
                f"output {spec.name} differs between two runs on the same ids, so it contains random numbers, such as "
                "dropout without training=self.training; leave them out"
            )


def check_rows(module: nn.Module, signature: Signature) -> None:
    """Check that the outputs of a sequence do not depend on the other sequences of its batch.

    Args:
        signature: the module's; sequences of different lengths are tried if it says that padding may be added.
    Raises:
        ExportError: an output depends on them.
    """
    if is_unchanged(module):
        return
    try:
        check_cuttable(signature)
    except InputError:
        return  # lfx never batches such outputs
    step = granularity(module)
    length = step if step > 1 else min(12, signature.max_seqlen or 12)
    _check_batch(module, signature, [length] * _ROWS)
    shorter, longer = (length, 2 * length) if step > 1 else (length // 2, length)
    if signature.may_pad and shorter > 0 and longer <= (signature.max_seqlen or longer):
        _check_batch(module, signature, [longer, shorter, shorter, longer, shorter])


def _check_batch(module: nn.Module, signature: Signature, lengths: list[int]) -> None:
    """Compare each sequence of a batch, padded to the longest, with a run of the sequence alone.

    Raises:
        ExportError: they differ.
    """
    inputs = model_inputs(Case(len(lengths), max(lengths)), signature)
    for row, length in enumerate(lengths):
        inputs["input_ids"][row, ..., length:] = signature.pad_token_id
        inputs["attention_mask"][row, ..., length:] = 0
    run = torch_runner(module, "fp32", forward_inputs(module))
    batched = run(inputs)
    for row, length in enumerate(lengths):
        single = run({name: array[row : row + 1, ..., :length] for name, array in inputs.items()})
        for spec in signature.outputs:
            whole, expected = batched[spec.name], single[spec.name][0]
            if not _is_same(cut(whole[row], spec.shape, length), expected, module, whole):
                raise ExportError(
                    f"output {spec.name} of a sequence depends on the other sequences of its batch, so a server cannot "
                    "batch requests; compute it within each sequence"
                )


def check_long(module: nn.Module, signature: Signature) -> None:
    """Check that a module runs on its longest sequence: whole to 4,096 tokens, up to its first attention beyond that.

    Raises:
        ExportError: it fails, for example because a position table of its own is shorter.
    """
    length, names = longest_trial(module, signature), forward_inputs(module)
    if is_unchanged(module) or length == 0:
        return
    longest = longest_trial(module, signature, signature.max_seqlen or _LONG)
    try:
        torch_runner(module, "fp32", names)(model_inputs(Case(1, length), signature))
        if longest > length:
            inputs = model_inputs(Case(1, longest), signature)
            global_tokens_runner(module, names, first_layer=True)(inputs)
    except ExportError as error:
        raise ExportError(f"{error}; {_GIVE_MAX_SEQLEN}") from error


def granularity(module: nn.Module) -> int:
    """Return the number that a sequence length must be a multiple of in PyTorch.

    It is 1 if a LongformerModel or an LEDEncoder pads, or if all self-attention takes any length, as LoopSelfAttention
    does.
    """
    if any(isinstance(m, (hf.LongformerModel, led.LEDEncoder)) for m in module.modules()):
        return 1
    return math.lcm(*(both_sides(m.one_sided_attn_window_size) for m in chunked_attention(module)))


def forward_inputs(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the graph inputs that `module.forward` takes."""
    parameters = inspect.signature(module.forward).parameters
    return tuple(name for name in GRAPH_INPUTS if name in parameters)
