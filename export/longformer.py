"""Making a Longformer of an encoder's config and weights.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 5.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lfx.errors import ExportError, one_line
from lfx.export.encoder import Encoder
from lfx.export.families import Family
from lfx.export.settings import check_settings


def make_longformer_config(
    encoder: Encoder, original: Any, tokenizer: Any, max_seqlen: int, windows: tuple[int, ...]
) -> transformers.LongformerConfig:
    """Make the config of the Longformer that an encoder becomes.

    Args:
        encoder: its files and settings.
        original: the encoder as a module of transformers.
        tokenizer: gives the ids of special tokens that the encoder's config lacks; None if there is none.
        max_seqlen: longest sequence in tokens.
        windows: attention_window of each layer.
    Raises:
        ExportError: a value is not allowed, or nothing gives the padding id.
    """
    settings = dict(encoder.settings)
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
    if encoder.family.starts_at_zero:
        _refuse_padding_in_texts(settings, tokenizer, encoder)
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


def _refuse_padding_in_texts(settings: dict[str, Any], tokenizer: Any, encoder: Encoder) -> None:
    """Refuse a padding id that texts contain: the original gives these tokens positions, and a Longformer would not."""
    pad = settings["pad_token_id"]
    for name in ("cls_token_id", "sep_token_id", "unk_token_id", "mask_token_id", "bos_token_id", "eos_token_id"):
        if pad in (settings.get(name), getattr(tokenizer, name, None)):
            raise ExportError(
                f"{encoder.files.name} pads with the id {pad}, which is its {name} too: a Longformer gives padding no "
                "position, so it would differ from the original on texts with that token; set another padding token in "
                "the tokenizer and the config"
            )


def make_longformer(encoder: Encoder, original: Any, config: transformers.LongformerConfig) -> Any:
    """Turn an encoder into a Longformer that shares its weights; the projections of global tokens are copies.

    Raises:
        ExportError: the encoder's class in transformers lacks weights.
    """
    weights = _rename(original.state_dict(), encoder)
    base = "longformer." if encoder.task != "feature-extraction" else ""
    for name in list(weights):
        for projection in ("query", "key", "value"):
            if f".attention.self.{projection}." in name:
                weights[name.replace(f".{projection}.", f".{projection}_global.")] = weights[name].clone()
    table = f"{base}embeddings.position_embeddings.weight"
    weights[table] = _repeat(weights[table], encoder.family, config)
    if encoder.family.fixed.get("type_vocab_size"):  # the family has no token types
        weights[f"{base}embeddings.token_type_embeddings.weight"] = weights[table].new_zeros(1, config.hidden_size)
    if "lm_head.decoder.bias" in weights:
        weights["lm_head.bias"] = weights["lm_head.decoder.bias"].clone()  # transformers adds the decoder's
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
    head = table.new_zeros(first, table.shape[1]) if family.starts_at_zero else table[:first]
    rows = table if family.starts_at_zero else table[first:]
    return torch.cat([head, rows[torch.arange(config.max_position_embeddings - first) % len(rows)]])
