"""Checkpoints of the base shape with seeded random weights, for machines without access to the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "examples" / "constitution.txt"
BASE_MAX_SEQLEN = 4096
# The shape of allenai/longformer-base-4096; the window is one-sided.
LAYERS, HIDDEN, HEADS, INTERMEDIATE, WINDOW = 12, 768, 12, 3072, 256


def base_model(max_seqlen: int = BASE_MAX_SEQLEN, seed: int = 0, **changes: Any) -> Any:
    """Make a LongformerModel of the shape of allenai/longformer-base-4096, in eval mode; `changes` replace settings."""
    import torch
    from transformers import LongformerConfig, LongformerModel

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 50265,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INTERMEDIATE,
        "attention_window": 2 * WINDOW,
        "max_position_embeddings": max_seqlen + 2,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    return LongformerModel(LongformerConfig(**{**settings, **changes})).eval()


def trained_tokenizer(text: str, vocab_size: int = 4000) -> Any:
    """Train a byte-level BPE tokenizer on `text`, with RoBERTa's special tokens and their ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def save_base_checkpoint(folder: Path) -> Path:
    """Save a model of the base shape with random weights, and a tokenizer trained on the example document."""
    trained_tokenizer(DOCUMENT.read_text(encoding="utf-8")).save_pretrained(folder)
    base_model().save_pretrained(folder)
    return folder
