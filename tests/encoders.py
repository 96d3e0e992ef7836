"""Tiny random encoders of the families that `convert` takes, seeded, and tokenizers of their kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import VOCAB_SIZE

POSITIONS = 40  # longest sequence of each encoder
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert")
# Families that number only tokens, from pad_token_id + 1 on.
COUNTED = ("Roberta", "XLMRoberta", "Camembert")

_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-5,
    "type_vocab_size": 2,
}


def tiny_encoder(family: str, ending: str = "Model", seed: int = 0, **changes: Any) -> Any:
    """A random encoder of two layers, every parameter drawn, in eval mode; `ending` is that of its class name."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": POSITIONS + 2 if family in COUNTED else POSITIONS,
        "initializer_range": 0.2,
        **(_DISTILBERT if family == "DistilBert" else _BERT),
        **({"embedding_size": 32} if family == "Electra" else {}),
        **changes,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}{ending}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1:  # layer norms
                parameter.uniform_(0.5, 1.5)
    return model


def save_tiny_encoder(folder: Path, family: str, ending: str = "Model", **changes: Any) -> Path:
    """A checkpoint as `save_pretrained` writes it, without tokenizer."""
    tiny_encoder(family, ending, **changes).save_pretrained(folder)
    return folder


def save_wordpieces(folder: Path) -> Path:
    """A BERT tokenizer as older checkpoints have it: vocab.txt alone."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "?", "fox"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def save_pieces(folder: Path) -> Path:
    """A tokenizer of XLM-RoBERTa with its own class: the special ids of RoBERTa, and a unigram model."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, "▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁fox", "<mask>"]
    vocabulary = [(piece, 0.0 if piece in special else -1.0 - i / 8) for i, piece in enumerate(pieces)]
    transformers.XLMRobertaTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder
