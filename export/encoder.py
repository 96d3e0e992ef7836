"""Reading an encoder that `convert` takes: its config is checked, and its task and its weights are found."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lfx.checks import whole_number
from lfx.errors import ExportError, one_line
from lfx.export.checkpoint import Checkpoint, Fetcher, config_file, fetcher, weight_files
from lfx.export.families import CONVERTIBLE, FAMILIES, GELU, REFUSED, Family, Names
from lfx.export.original import is_original
from lfx.export.sentence_folder import score_function
from lfx.export.settings import check_settings, read_object, refuse_other_weights, without_aliases, without_code
from lfx.signature import TASKS

# Settings of a Longformer that the encoder's config has too, for most families under the same name.
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "problem_type",
)
_LABELS = ("id2label", "label2id", "num_labels")
_MODEL = "Model"  # end of the class name of an encoder without a head
_TASKS = {task.architecture.removeprefix("Longformer"): name for name, task in TASKS.items()}


@dataclass(frozen=True)
class Encoder:
    """An encoder whose files are checked.

    Attributes:
        family: what its parts are called in a Longformer.
        files: its config and weights; `files.settings` are the arguments of its config class.
        fetch: returns the path of another file of the checkpoint.
        path: of its config.json, for messages.
        settings: Longformer's settings that its config gives.
        positions: longest sequence in tokens.
        ending: of its class name, such as ForMaskedLM.
        tokenizer_class: name of its tokenizer's class, for a tokenizer_config.json that names none.
    """

    family: Family
    files: Checkpoint
    fetch: Fetcher
    path: Path
    settings: dict[str, Any]
    positions: int
    ending: str
    tokenizer_class: str

    @property
    def task(self) -> str:
        """A key of `lfx.signature.TASKS`."""
        return _TASKS[self.ending]

    @property
    def architecture(self) -> str:
        """Class name of the Longformer for this task."""
        return f"Longformer{self.ending}"

    @property
    def head(self) -> Names:
        """The head's weights, and their names in Longformer's head."""
        head = self.family.heads[self.ending]
        assert not isinstance(head, str)
        return head

    @property
    def config_class(self) -> Any:
        """The encoder's config class in transformers."""
        return getattr(transformers, f"{self.family.prefix}Config")

    @property
    def model_class(self) -> Any:
        """The encoder's class in transformers, with its head."""
        return getattr(transformers, f"{self.family.prefix}{self.ending}")


def read_encoder(model: str) -> Encoder:
    """Read an encoder's config, and find and check its files; those of a hub id are downloaded.

    Raises:
        ExportError: the checkpoint does not exist, is no encoder that `convert` takes, has a head that computes
            something else than Longformer's, or has a file that is broken or names code.
    """
    fetch = fetcher(model)
    path = config_file(fetch, model)
    data = read_object(path)
    if is_original(data):
        command = f"lfx export --model {shlex.quote(model)}"
        raise ExportError(
            f"{model} is a Longformer of the original code already, by the attention_window in its config.json; use: "
            f"{command}; or remove attention_window, if its attention is RoBERTa's own"
        )
    family = _family(data.get("model_type"), model)
    refuse_other_weights(data, path, model)
    config_class = getattr(transformers, f"{family.prefix}Config")
    values = _values(without_code(data), config_class)
    settings = {**{name: values.get(family.settings.get(name, name)) for name in _CARRIED}, **family.fixed}
    positions = _check_values(values, settings, family, path)
    _refuse_other_layers(values, model)
    ending = _ending(values, family, model)
    _refuse_activation(settings, family, ending, model)
    settings.update(score_function(data, path))

    names = [family.settings.get(name, name) for name in _CARRIED if name not in family.fixed]
    names += [name for name in ("max_position_embeddings", "embedding_size", *_LABELS) if name in values]
    files = Checkpoint(
        model,
        path.parent,
        {name: values[name] for name in names},
        weight_files(fetch, model, path, _size(settings, values["max_position_embeddings"])),
    )
    tokenizer_class = data.get("tokenizer_class")
    if not isinstance(tokenizer_class, str):
        tokenizer_class = family.tokenizer
    return Encoder(family, files, fetch, path, settings, positions, ending, tokenizer_class)


def _family(model_type: Any, model: str) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(CONVERTIBLE)
    if not isinstance(model_type, str):
        raise ExportError(f"the config.json of {model} names no model_type; set the one it has: {known}")
    reason = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
    raise ExportError(f"{model} is a {model_type[:80]}, which cannot become a Longformer{reason}; give one of: {known}")


def _values(data: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Return all values of a config by their names in its class."""
    values = {"tie_word_embeddings": True, **config_class().to_dict()}  # CamembertConfig lacks the key before 5.4
    for name in ("id2label", "label2id"):
        values.pop(name, None)  # the default, of two labels
    return {**values, **without_aliases(data, config_class)}


def _check_values(values: dict[str, Any], settings: dict[str, Any], family: Family, path: Path) -> int:
    """Check the values of a config; returns the longest sequence in tokens."""
    settings = {**settings, **{name: values[name] for name in (*_LABELS, "architectures") if name in values}}
    if family.starts_at_zero and settings["pad_token_id"] is None:
        settings["pad_token_id"] = 0  # the tokenizer may have it
    layers = settings["num_hidden_layers"]
    windows = [4] * layers if isinstance(layers, int) and 0 < layers < 10_000 else 4
    result = {"max_position_embeddings": 2**31, "attention_window": windows, "sep_token_id": None}
    check_settings({**transformers.LongformerConfig().to_dict(), **settings, **result}, path)
    unused = 0 if family.starts_at_zero else settings["pad_token_id"] + 1
    name = f"{path}: max_position_embeddings"
    return whole_number(values["max_position_embeddings"], name, unused + 1, error=ExportError) - unused


def _refuse_other_layers(values: dict[str, Any], model: str) -> None:
    """Refuse the variants of a family whose layers compute something else than a Longformer's."""
    positions = values.get("position_embedding_type")
    if positions not in (None, "absolute"):
        raise ExportError(
            f"{model} has relative positions (position_embedding_type {str(positions)[:80]!r}), and a Longformer has "
            "absolute ones; give another checkpoint"
        )
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise ExportError(f"{model} is a decoder (is_decoder, add_cross_attention), and a Longformer is an encoder")
    embedding, hidden = values.get("embedding_size"), values.get("hidden_size")
    if embedding is not None and embedding != hidden:
        raise ExportError(
            f"{model} applies LayerNorm to its embeddings, of embedding_size {embedding}, and projects the result to "
            f"hidden_size {hidden}; a Longformer has no projection there, and its tables cannot hold one, since the "
            "LayerNorm lies between; give a checkpoint in which the two sizes are equal"
        )


def _ending(values: dict[str, Any], family: Family, model: str) -> str:
    """Return the end of the class name of the model that is converted."""
    names: list[str] = values.get("architectures") or [f"{family.prefix}{_MODEL}"]
    endings = [family.replaced.get(end, end) for end in (name.removeprefix(family.prefix) for name in names)]
    ending = next((end for end in endings if end in family.heads), None)
    alone = (
        "convert its encoder alone, which AutoModel.from_pretrained(...).save_pretrained(FOLDER) writes, and train a "
        "head on it"
    )
    if ending is None:
        raise ExportError(f"{model} has architecture {', '.join(names)[:200]}, which Longformer lacks; {alone}")
    if isinstance(reason := family.heads[ending], str):
        raise ExportError(f"{model} is a {family.prefix}{ending}: {reason}; {alone}")
    return ending


def _refuse_activation(settings: dict[str, Any], family: Family, ending: str, model: str) -> None:
    activation = settings["hidden_act"]
    if ending == "ForMaskedLM" and family.head_activation and activation not in GELU:
        raise ExportError(
            f"the masked LM head of {model} applies {activation}, and Longformer's applies gelu; convert its encoder "
            "alone, which AutoModel.from_pretrained(...).save_pretrained(FOLDER) writes"
        )


def _size(settings: dict[str, Any], positions: int) -> int:
    """Return the number of weights of an encoder without a head."""
    hidden, intermediate = settings["hidden_size"], settings["intermediate_size"]
    rows = settings["vocab_size"] + positions
    return int(rows * hidden + settings["num_hidden_layers"] * (4 * hidden * hidden + 2 * hidden * intermediate))


def make_config(encoder: Encoder) -> Any:
    """Make the encoder's config.

    Raises:
        ExportError: a value is not allowed.
    """
    try:
        # Always eager: another attn_implementation may be code of the hub.
        return encoder.config_class(**encoder.files.settings, attn_implementation="eager")
    except Exception as error:
        raise ExportError(f"{encoder.path} is no config of a {encoder.family.prefix}: {one_line(error)}") from error
