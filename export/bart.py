"""Making an LED of a BART: the encoder's attention gets windows, and both position tables lose BART's two unused rows.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lfx.checks import whole_number
from lfx.errors import ExportError, one_line
from lfx.export.checkpoint import Checkpoint, Fetcher, config_file, fetcher, weight_files
from lfx.export.led import LED_CLASSES
from lfx.export.load import led_class, load
from lfx.export.settings import (
    check_led_settings,
    led_size,
    read_object,
    refuse_other_weights,
    without_aliases,
    without_code,
)
from lfx.export.torch_runners import reference_runner, torch_runner
from lfx.parity import Arrays, Case, Report, Runner, compare, inputs_of

_OFFSET = 2  # rows of BART's position tables that no token uses
# Settings of BART's config that LED's has under the same names.
_CARRIED = (
    "vocab_size",
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "classifier_dropout",
    "init_std",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "tie_word_embeddings",
    "problem_type",
    "id2label",
    "label2id",
)
_TABLES = ("shared.weight", "embed_tokens.weight", "lm_head.weight")  # one table if the model ties them
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_LM_POSITIONS = 16  # whose logits over the vocabulary are compared


@dataclass(frozen=True)
class Bart:
    """A BART whose files are checked.

    Attributes:
        files: its config and weights; `files.settings` are the arguments of BartConfig.
        fetch: returns the path of another file of the checkpoint.
        path: of its config.json, for messages.
        settings: LED's settings that its config gives.
        positions: longest sequence in tokens, of the encoder and of the decoder.
        task: a key of `lfx.export.led.LED_CLASSES`.
    """

    files: Checkpoint
    fetch: Fetcher
    path: Path
    settings: dict[str, Any]
    positions: int
    task: str

    @property
    def model_class(self) -> Any:
        """Its class in transformers."""
        return getattr(transformers, LED_CLASSES[self.task].replace("LED", "Bart"))


def is_bart(model: str) -> bool:
    """Return whether a checkpoint is a BART, by its config.json.

    Raises:
        ExportError: there is no such checkpoint, or its config.json is broken.
    """
    return read_object(config_file(fetcher(model), model)).get("model_type") == "bart"


def read_bart(model: str) -> Bart:
    """Check the files of a checkpoint.

    Raises:
        ExportError: a setting is invalid or has no counterpart in LED, LED has no such head, or a file is broken.
    """
    fetch = fetcher(model)
    path = config_file(fetch, model)
    data = without_code(read_object(path))
    refuse_other_weights(data, path, model)
    values = {**transformers.BartConfig().to_dict(), **without_aliases(data, transformers.BartConfig)}
    settings = {name: values[name] for name in _CARRIED if name in values}
    if settings["eos_token_id"] is not None:
        whole_number(settings["eos_token_id"], f"{path}: eos_token_id", 0, error=ExportError)
    name = "max_position_embeddings"
    positions = whole_number(values[name], f"{path}: {name}", 1, error=ExportError)
    placeholder = {
        **transformers.LEDConfig().to_dict(),
        **settings,
        "architectures": values.get("architectures"),
        "attention_window": 4,
        "max_encoder_position_embeddings": max(positions, 4),
        "max_decoder_position_embeddings": positions,
    }
    check_led_settings(placeholder, path)
    if values.get("scale_embedding"):
        raise ExportError(f"{model} multiplies its embeddings by √d_model (scale_embedding), and an LED does not")
    task = _task(values, model)
    numbers = led_size(placeholder) - settings["encoder_layers"] * 3 * settings["d_model"] ** 2  # of global tokens
    weights = weight_files(fetch, model, path, numbers)
    files = Checkpoint(model, path.parent, {**settings, "max_position_embeddings": positions}, weights)
    return Bart(files, fetch, path, settings, positions, task)


def _task(values: dict[str, Any], model: str) -> str:
    names = values.get("architectures") or ["BartModel"]
    known = {name.replace("LED", "Bart"): task for task, name in LED_CLASSES.items()}
    task = next((known[name] for name in names if name in known), None)
    if task is None:
        raise ExportError(f"{model} has architecture {', '.join(names)[:200]}; give one of: {', '.join(known)}")
    return task


def make_config(bart: Bart) -> Any:
    """Make the BART's config.

    Raises:
        ExportError: a value is not allowed.
    """
    try:
        # Always eager: another attn_implementation may be code of the hub.
        return transformers.BartConfig(**bart.files.settings, attn_implementation="eager")
    except Exception as error:
        raise ExportError(f"{bart.path} is no config of a BART: {one_line(error)}") from error


def make_led(bart: Bart, original: Any, max_seqlen: int, windows: tuple[int, ...]) -> Any:
    """Turn a BART into an LED that shares its weights; the projections of global tokens are copies.

    Args:
        max_seqlen: longest sequence in tokens; the position table has rows for it, padded to the widest window.
        windows: attention_window of each layer.
    Raises:
        ExportError: a value is not allowed.
    """
    widest = max(windows)
    weights = _rename(original.state_dict())
    # Tables that the checkpoint stores apart are not tied, whatever its config says; then each has its own copy.
    tables = {name: table for name, table in weights.items() if name.endswith(_TABLES)}
    is_tied = len({table.data_ptr() for table in tables.values()}) == 1
    if not is_tied:
        weights.update({name: table.clone() for name, table in tables.items()})
    settings = {
        **bart.settings,
        "tie_word_embeddings": is_tied,
        "attention_window": list(windows),
        "max_encoder_position_embeddings": -(-max_seqlen // widest) * widest,
        "max_decoder_position_embeddings": bart.positions,
        "architectures": [LED_CLASSES[bart.task]],
    }
    check_led_settings({**transformers.LEDConfig().to_dict(), **settings}, bart.path)
    try:
        config = transformers.LEDConfig(**settings)
    except Exception as error:
        raise ExportError(f"{bart.path} makes no config of an LED: {one_line(error)}") from error
    for name in list(weights):
        if name.endswith("encoder.embed_positions.weight"):
            rows = weights[name][_OFFSET:]
            weights[name] = rows[torch.arange(config.max_encoder_position_embeddings) % len(rows)]
        elif name.endswith("decoder.embed_positions.weight"):
            weights[name] = weights[name][_OFFSET:].clone()
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are replaced
        model = led_class(bart.task)(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if hasattr(original, "generation_config"):
        model.generation_config = original.generation_config
    return model.eval()


def _rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give BART's weights the names that they have in LED."""
    renamed = {}
    for name, tensor in weights.items():
        new = f"led.{name.removeprefix('model.')}" if name.startswith("model.") else name
        if ".self_attn." in new and "encoder.layers." in new:
            part, _, parameter = new.rpartition(".")
            attention, _, projection = part.rpartition(".")
            if projection in _PROJECTIONS:
                local = f"{attention}.longformer_self_attn.{_PROJECTIONS[projection]}"
                renamed[f"{local}_global.{parameter}"] = tensor.clone()
                new = f"{local}.{parameter}"
            else:
                new = f"{attention}.output.{parameter}"
        renamed[new] = tensor
    return renamed


def compare_bart(bart: Bart, original: Any, folder: Path, cases: list[Case], progress: Callable[[str], None]) -> Report:
    """Compare the written checkpoint with the original, on sequences for which the two compute the same.

    The original in float64 is the reference. The decoder of both reads the ids of the encoder, shifted to the right.
    """
    progress("comparing: loading the LED")
    led, _ = load(str(folder), bart.task)
    config: Any = led.config
    names = ("input_ids", "attention_mask")

    def inputs(case: Case) -> Arrays:
        arrays = inputs_of(case, vocab_size=config.vocab_size, pad_token_id=config.pad_token_id)
        return _with_one_end(arrays, config)

    return compare(
        cases,
        inputs,
        reference=_compared(reference_runner(original, names)),
        witness=_compared(torch_runner(original, "fp32", names)),
        candidate=_compared(torch_runner(led)),
        precision="fp32",
        layers=config.encoder_layers + 2 * config.decoder_layers,
        names=("the original in float64", "the original"),
        on_case=lambda case: progress(f"comparing: {case}"),
    )


def _with_one_end(inputs: Arrays, config: Any) -> Arrays:
    """Let each row end with its only eos token, which a classifier needs."""
    ids, mask, end = inputs["input_ids"], inputs["attention_mask"], config.eos_token_id
    if end is None or config.vocab_size < 4:
        return inputs
    other = next(i for i in range(4) if i not in (end, config.pad_token_id))
    ids = np.where((ids == end) & (mask == 1), other, ids)
    for row, real in zip(ids, mask, strict=True):
        row[np.flatnonzero(real)[-1]] = end
    return {**inputs, "input_ids": ids}


def _compared(run: Runner) -> Runner:
    """Select what is compared: the encoder's states, 0 where there is padding, and the logits of some positions."""

    def selected(inputs: Arrays) -> Arrays:
        outputs, mask = run(inputs), inputs["attention_mask"]
        if "encoder_last_hidden_state" in outputs:
            outputs["encoder_last_hidden_state"] = outputs["encoder_last_hidden_state"] * mask[..., None]
        if outputs.get("logits", mask).ndim == 3:
            positions = np.unique(np.linspace(0, mask.shape[1] - 1, _LM_POSITIONS).astype(int))
            outputs["logits"] = outputs["logits"][:, positions]
        return outputs

    return selected
