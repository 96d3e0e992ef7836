"""`convert`: make a Longformer of an encoder with absolute positions, or an LED of a BART, and compare the two."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lfx.checks import file_path, whole_number
from lfx.errors import ExportError
from lfx.export import checkpoint
from lfx.export.bart import compare_bart, is_bart, make_led, read_bart
from lfx.export.bart import make_config as bart_config
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.companions import raise_limits
from lfx.export.encoder import Encoder, make_config, read_encoder
from lfx.export.led import LED_CLASSES
from lfx.export.load import check_weights, load, load_tokenizer, load_weights, quiet
from lfx.export.longformer import make_longformer, make_longformer_config
from lfx.export.options import check_progress, model_name
from lfx.export.sentence_folder import copy_modules
from lfx.export.settings import check_windows
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
_LM_POSITIONS = 16  # whose logits over the vocabulary are compared


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
    """Turn an encoder into a Longformer checkpoint, and compare the two before reporting success.

    Args:
        model: a checkpoint folder or a hub id: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA or DistilBERT, with or
            without a head; a BART, which becomes an LED; or a folder of sentence-transformers.
        output: the new checkpoint's folder, which does not exist yet or is empty.
        max_seqlen: longest sequence in tokens, 1 to 65,536. The position embeddings are repeated up to it.
        attention_window: width of the window in tokens, both sides together: an even number of 4 or more, or a sequence
            with one for each layer.
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
    if is_bart(name):
        return _convert_bart(name, target, max_seqlen, window, progress)
    encoder = read_encoder(name)
    layers, heads = encoder.settings["num_hidden_layers"], encoder.settings["num_attention_heads"]
    windows = _windows(window, layers, heads, max_seqlen)
    with quiet():
        original: Any = load_weights(
            encoder.model_class, make_config(encoder), encoder.files, "fetch or save the checkpoint again"
        )
    check_weights(original)
    check_space(target, _size(original, encoder.settings["hidden_size"], layers, max_seqlen), "checkpoint")

    with atomic_folder(target) as folder, encoder.fetch.unchanged(), quiet():
        progress("copying the tokenizer")
        _copy_tokenizer(encoder, folder, max_seqlen)
        copy_modules(encoder.fetch, folder, max_seqlen)
        progress("converting the weights")
        config = make_longformer_config(encoder, original, load_tokenizer(str(folder)), max_seqlen, windows)
        longformer = make_longformer(encoder, original, config)
        progress("writing")
        longformer.save_pretrained(folder)
        del longformer
        equal_seqlen = min(min(windows) // 2 + 1, encoder.positions, max_seqlen)
        report = _compare(encoder, original, folder, equal_seqlen, progress)
        report.require()
    return Conversion(target, encoder.architecture, max_seqlen, windows, equal_seqlen, report)


def _convert_bart(name: str, target: Path, max_seqlen: int, window: int | list[int], progress: Progress) -> Conversion:
    bart = read_bart(name)
    layers, heads = bart.settings["encoder_layers"], bart.settings["encoder_attention_heads"]
    windows = _windows(window, layers, heads, max_seqlen)
    with quiet():
        config = bart_config(bart)
        original: Any = load_weights(bart.model_class, config, bart.files, "fetch or save the checkpoint again")
    check_weights(original)
    hidden = bart.settings["d_model"]
    check_space(target, _size(original, hidden, layers, max_seqlen), "checkpoint")
    with atomic_folder(target) as folder, bart.fetch.unchanged(), quiet():
        progress("copying the tokenizer")
        if checkpoint.copy_tokenizer(bart.files.name, folder, bart.fetch):
            raise_limits(folder, max_seqlen, "BartTokenizer")
        progress("converting the weights")
        made = make_led(bart, original, max_seqlen, windows)
        progress("writing")
        made.save_pretrained(folder)
        del made
        equal_seqlen = min(min(windows) // 2 + 1, bart.positions, max_seqlen)
        report = compare_bart(bart, original, folder, _cases(equal_seqlen), progress)
        report.require()
    return Conversion(target, LED_CLASSES[bart.task], max_seqlen, windows, equal_seqlen, report)


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


def _windows(window: int | list[int], layers: int, heads: int, max_seqlen: int) -> tuple[int, ...]:
    """Return the attention_window of each layer."""
    check_windows(window, layers, heads, max_seqlen, "attention_window")
    if isinstance(window, list) and any(max(window) % width for width in window):
        raise ExportError(
            f"attention_window {','.join(map(str, window))}: Hugging Face pads sequences to a multiple of the largest "
            "window only, so each window must divide it; give such windows"
        )
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


def _size(original: Any, hidden: int, layers: int, max_seqlen: int) -> int:
    """Return the bytes that the checkpoint takes, or a little more: all in float32."""
    weights = sum(parameter.numel() for parameter in original.parameters())
    return 4 * int(weights + max_seqlen * hidden + 3 * layers * hidden * (hidden + 1)) + 20_000_000  # and a tokenizer


def _copy_tokenizer(encoder: Encoder, folder: Path, max_seqlen: int) -> None:
    """Copy the tokenizer's files; its class stays the family's, and its longest sequence becomes `max_seqlen`."""
    if checkpoint.copy_tokenizer(encoder.files.name, folder, encoder.fetch):
        raise_limits(folder, max_seqlen, encoder.tokenizer_class)


def _compare(encoder: Encoder, original: Any, folder: Path, equal_seqlen: int, progress: Progress) -> Report:
    """Compare the written checkpoint with the original, on sequences for which the two compute the same.

    The original in float64 is the reference. The global tokens change nothing there, since a window has all tokens.
    """
    progress("comparing: loading the Longformer")
    longformer, task = load(str(folder), encoder.task)
    config: Any = longformer.config
    choices = 2 if task == "multiple-choice" else None
    names = ("input_ids", "attention_mask")

    def inputs(case: Case) -> Arrays:
        return inputs_of(case, vocab_size=config.vocab_size, pad_token_id=config.pad_token_id, choices=choices)

    return compare(
        _cases(equal_seqlen),
        inputs,
        reference=_compared(reference_runner(original, names), task),
        witness=_compared(torch_runner(original, "fp32", names), task),
        candidate=_compared(torch_runner(longformer), task),
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


def _compared(run: Runner, task: str) -> Runner:
    """Select the outputs that are compared: set those of padding to 0, and keep a masked LM's of some positions.

    The logits of 257 tokens for a vocabulary of 250,000 words would take 0.5 GB, in a dozen arrays.
    """

    def selected(inputs: Arrays) -> Arrays:
        outputs, mask = run(inputs), inputs["attention_mask"]
        seqlen = mask.shape[-1]
        positions = np.arange(seqlen)
        if task == "fill-mask":
            positions = np.unique(np.linspace(0, seqlen - 1, _LM_POSITIONS).astype(int))
        for name in _PER_TOKEN.get(task, ()):
            array = outputs[name][:, positions]
            outputs[name] = array * mask[:, positions].reshape(array.shape[:2] + (1,) * (array.ndim - 2))
        return outputs

    return selected
