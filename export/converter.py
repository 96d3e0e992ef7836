"""`convert`: make a Longformer checkpoint of an encoder with absolute positions, and compare the two."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lfx.checks import file_path, whole_number
from lfx.errors import ExportError, one_line
from lfx.export import checkpoint
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.companions import raise_limits
from lfx.export.encoder import Encoder, make_config, read_encoder
from lfx.export.families import Family
from lfx.export.load import check_weights, load, load_tokenizer, load_weights, quiet
from lfx.export.options import check_progress, model_name
from lfx.export.sentence_folder import copy_modules
from lfx.export.settings import check_settings, check_windows
from lfx.export.torch_runners import reference_runner, torch_runner
from lfx.files import why_unwritten
from lfx.parity import Arrays, Case, Report, Runner, compare, inputs_of

Progress = Callable[[str], None]
MOST_TOKENS = 65_536
MAX_SEQLEN, ATTENTION_WINDOW = 4096, 512

# Outputs with a number for each token; those of padding are not compared, since no model defines them.
_PER_TOKEN = {
    "feature-extraction": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted checkpoint, and how it compares with the original.

    Attributes:
        folder: the Longformer checkpoint.
        architecture: its class in transformers.
        max_seqlen: longest sequence in tokens.
        attention_windows: attention_window of each layer, tokens on both sides together.
        equal_seqlen: longest sequence, in tokens, for which it computes what the original does.
        report: largest differences in sequences of up to `equal_seqlen` tokens.
    """

    folder: Path
    architecture: str
    max_seqlen: int
    attention_windows: tuple[int, ...]
    equal_seqlen: int
    report: Report


def convert(
    model: str | Path,
    output: str | Path,
    max_seqlen: int = MAX_SEQLEN,
    attention_window: int | Sequence[int] = ATTENTION_WINDOW,
    *,
    progress: Progress = lambda step: None,
) -> Path:
    """Make a Longformer checkpoint of an encoder, and compare the two before it reports success.

    Args:
        model: a checkpoint folder or a hub id: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA or DistilBERT, with or
            without a head; or a folder of sentence-transformers.
        output: the new checkpoint's folder, which does not exist yet or is empty.
        max_seqlen: longest sequence in tokens, 1 to 65,536. The position embeddings are repeated up to it.
        attention_window: tokens on both sides together that a token attends to, an even number from 4 on; a sequence
            has one for each layer.
        progress: called with the name of each step.
    Returns:
        The new checkpoint's folder.
    Raises:
        ExportError: the checkpoint or an option cannot be used; no file is left.
        ParityError: the Longformer computes something else than the original; no file is left.
    Source: Beltagy et al. 2020, arXiv:2004.05150, section 5.
    """
    return convert_and_compare(model, output, max_seqlen, attention_window, progress).folder


def convert_and_compare(
    model: str | Path,
    output: str | Path,
    max_seqlen: int,
    attention_window: int | Sequence[int],
    progress: Progress,
) -> Conversion:
    """`convert`, with the same arguments and errors; returns the comparison too."""
    max_seqlen = whole_number(max_seqlen, "max_seqlen", 1, MOST_TOKENS, ExportError)
    window = _window(attention_window)
    check_progress(progress)
    name = model_name(model)
    target = file_path(output, "output", ExportError)
    _check_target(target)
    progress("loading the checkpoint")
    encoder = read_encoder(name)
    windows = _windows(window, encoder, max_seqlen)
    with quiet():
        original: Any = load_weights(
            encoder.model_class, make_config(encoder), encoder.files, "fetch or save the checkpoint again"
        )
    check_weights(original)
    check_space(target, _size(original, encoder, max_seqlen), "checkpoint")

    with atomic_folder(target) as folder, quiet():
        progress("copying the tokenizer")
        _copy_tokenizer(encoder, folder, max_seqlen)
        copy_modules(encoder.fetch, folder, max_seqlen)
        progress("converting the weights")
        config = _config(encoder, original, folder, max_seqlen, windows)
        longformer = _longformer(encoder, config, original)
        progress("writing")
        longformer.save_pretrained(folder)
        del longformer
        equal_seqlen = min(min(windows) // 2 + 1, encoder.positions, max_seqlen)
        report = _compare(encoder, original, folder, equal_seqlen, progress)
        report.require()
    return Conversion(target, encoder.architecture, max_seqlen, windows, equal_seqlen, report)


def _window(attention_window: Any) -> int | list[int]:
    """Check the type of the option `attention_window`; `_windows` checks its range when the model is known."""
    if isinstance(attention_window, Sequence) and not isinstance(attention_window, str | bytes):
        if not attention_window:
            raise ExportError("attention_window is empty; give an even number, or one for each layer")
        return [_width(width) for width in attention_window]
    return _width(attention_window)


def _width(width: Any) -> int:
    number = whole_number(width, "attention_window", 4, 2 * MOST_TOKENS, ExportError)  # Hugging Face cannot run 2
    if number % 2:
        raise ExportError(f"attention_window {number} is odd; give an even number, both sides together")
    return number


def _windows(window: int | list[int], encoder: Encoder, max_seqlen: int) -> tuple[int, ...]:
    """Return the attention_window of each layer."""
    layers, heads = encoder.settings["num_hidden_layers"], encoder.settings["num_attention_heads"]
    check_windows(window, layers, heads, max_seqlen, "attention_window")
    return tuple(window) if isinstance(window, list) else (window,) * layers


def _check_target(target: Path) -> None:
    """Refuse a folder with content, a bundle too: a checkpoint may be trained further, so it is never replaced."""
    try:
        taken = os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise ExportError(why_unwritten(target, error, "choose another --output")) from error
    if taken:
        raise ExportError(f"{target} exists and is not an empty folder; remove it, or choose another --output")
    check_target(target)


def _size(original: Any, encoder: Encoder, max_seqlen: int) -> int:
    """Return the bytes that the checkpoint takes, or a little more: all in float32."""
    hidden, layers = encoder.settings["hidden_size"], encoder.settings["num_hidden_layers"]
    weights = sum(parameter.numel() for parameter in original.parameters())
    return 4 * int(weights + max_seqlen * hidden + 3 * layers * hidden * (hidden + 1)) + 20_000_000  # and a tokenizer


def _copy_tokenizer(encoder: Encoder, folder: Path, max_seqlen: int) -> None:
    """Copy the tokenizer's files; its class stays the family's, and its longest sequence becomes `max_seqlen`."""
    if checkpoint.copy_tokenizer(encoder.files.name, folder):
        raise_limits(folder, max_seqlen, encoder.tokenizer_class)


def _config(
    encoder: Encoder, original: Any, folder: Path, max_seqlen: int, windows: tuple[int, ...]
) -> transformers.LongformerConfig:
    """Make the Longformer's config; ids of special tokens that the original's config lacks are the tokenizer's."""
    settings = dict(encoder.settings)
    tokenizer = load_tokenizer(str(folder))
    separator = getattr(tokenizer, "sep_token_id", None)
    if separator is None and not encoder.family.starts_at_zero and isinstance(settings["eos_token_id"], int):
        separator = settings["eos_token_id"]
    settings["sep_token_id"] = separator
    if encoder.family.starts_at_zero and getattr(tokenizer, "pad_token_id", None) is not None:
        # The original numbers all tokens alike. A Longformer does not number padding, so it must know its id.
        settings["pad_token_id"] = tokenizer.pad_token_id
    if settings["pad_token_id"] is None:
        raise ExportError(
            f"{encoder.path} has no pad_token_id, without which a Longformer cannot count positions; set it"
        )
    for name, special in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id")):
        if settings[name] is None:
            settings[name] = getattr(tokenizer, special, None)
    if encoder.task == "fill-mask":  # a decoder that the checkpoint stores apart is not tied, whatever its config says
        decoder, words = original.get_output_embeddings(), original.get_input_embeddings()
        settings["tie_word_embeddings"] = decoder.weight.data_ptr() == words.weight.data_ptr()
    settings.update(
        id2label=original.config.id2label,
        label2id=original.config.label2id,
        max_position_embeddings=max_seqlen + settings["pad_token_id"] + 1,
        attention_window=list(windows),
        architectures=[encoder.architecture],
    )
    check_settings({**transformers.LongformerConfig().to_dict(), **settings}, encoder.path)
    try:
        return transformers.LongformerConfig(**settings)
    except Exception as error:
        raise ExportError(f"{encoder.path} makes no config of a Longformer: {one_line(error)}") from error


def _longformer(encoder: Encoder, config: transformers.LongformerConfig, original: Any) -> Any:
    """Make the Longformer of the original's weights, which it shares; the projections of global tokens are copies."""
    weights = _rename(original.state_dict(), encoder)
    base = "longformer." if encoder.task != "feature-extraction" else ""
    for name in list(weights):
        for projection in ("query", "key", "value"):
            if f".attention.self.{projection}." in name:
                weights[name.replace(f".{projection}.", f".{projection}_global.")] = weights[name].clone()
    table = f"{base}embeddings.position_embeddings.weight"
    weights[table] = _repeat(weights[table], encoder.family, config)
    if encoder.family.fixed.get("type_vocab_size"):  # the family has no token types
        weights[f"{base}embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.hidden_size)
    if "lm_head.decoder.bias" in weights:
        weights.setdefault("lm_head.bias", weights["lm_head.decoder.bias"].clone())
    pooler = {} if encoder.task != "feature-extraction" else {"add_pooling_layer": "pooler.dense.weight" in weights}
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are replaced
        model = getattr(transformers, encoder.architecture)(config, **pooler)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:  # in transformers 5.3, XLM-RoBERTa for multiple choice has no pooler
        raise ExportError(
            f"the {type(original).__name__} of transformers {transformers.__version__} has other weights than a "
            f"Longformer needs ({', '.join((*missing, *unexpected))[:200]}); install a newer transformers"
        )
    model.tie_weights()
    return model.eval()


def _rename(weights: dict[str, torch.Tensor], encoder: Encoder) -> dict[str, torch.Tensor]:
    """Give the original's weights the names that they have in the Longformer."""
    family = encoder.family
    names = dict(encoder.head)
    if encoder.task != "feature-extraction":
        names[family.base] = "longformer"
    renamed = {}
    for name, tensor in weights.items():
        prefixes = [theirs for theirs in names if name.startswith(f"{theirs}.") or name == theirs]
        theirs = max(prefixes, key=len, default="")
        new = names[theirs] + name[len(theirs) :] if theirs else name
        for part, ours in family.layers.items():
            new = new.replace(part, ours)
        renamed[new] = tensor
    return renamed


def _repeat(table: torch.Tensor, family: Family, config: transformers.LongformerConfig) -> torch.Tensor:
    """Repeat the rows of a position table; the rows up to the padding id, which no token has, are not repeated."""
    first = config.pad_token_id + 1
    head = torch.zeros(first, table.shape[1]) if family.starts_at_zero else table[:first]
    rows = table if family.starts_at_zero else table[first:]
    return torch.cat([head, rows[torch.arange(config.max_position_embeddings - first) % len(rows)]])


def _compare(encoder: Encoder, original: Any, folder: Path, equal_seqlen: int, progress: Progress) -> Report:
    """Compare the written checkpoint with the original, on sequences for which the two compute the same.

    The original in float64 is the reference. The global tokens change nothing there, since a window has all tokens.
    """
    progress("comparing: loading the Longformer")
    longformer, task = load(str(folder))
    config: Any = longformer.config
    choices = 2 if task == "multiple-choice" else None
    names = ("input_ids", "attention_mask")

    def inputs(case: Case) -> Arrays:
        return inputs_of(case, vocab_size=config.vocab_size, pad_token_id=config.pad_token_id, choices=choices)

    return compare(
        _cases(equal_seqlen),
        inputs,
        reference=_without_padding(reference_runner(original, names), task),
        witness=_without_padding(torch_runner(original, "fp32", names), task),
        candidate=_without_padding(torch_runner(longformer), task),
        precision="fp32",
        layers=config.num_hidden_layers,
        names=("the original in float64", "the original"),
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def _cases(equal_seqlen: int) -> list[Case]:
    cases = [
        Case(1, 1),
        Case(1, 2, "first"),
        Case(2, equal_seqlen - 1, "scattered", "right"),
        Case(1, equal_seqlen),
        Case(2, equal_seqlen, "ragged", "right"),
    ]
    return list(dict.fromkeys(case for case in cases if 1 <= case.seqlen <= equal_seqlen))


def _without_padding(run: Runner, task: str) -> Runner:
    """Set the outputs of padding to 0."""

    def masked(inputs: Arrays) -> Arrays:
        outputs, mask = run(inputs), inputs["attention_mask"]
        for name in _PER_TOKEN.get(task, ()):
            array = outputs[name]
            outputs[name] = array * mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
        return outputs

    return masked
