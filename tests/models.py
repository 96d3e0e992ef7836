"""Tiny random Longformers and LEDs, seeded: every test makes the checkpoint that it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LEDConfig, LongformerConfig

from lfx.export.led_classifier import LEDForSequenceClassification
from lfx.export.pooling import LongformerForSentenceEmbedding, Normalize
from lfx.signature import SENTENCE_EMBEDDING, TASKS, TEXT_GENERATION

VOCAB_SIZE = 99
WINDOW = 8  # one-sided, of the widest layer
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "attention_window": [2 * WINDOW]}
LONGFORMER_TASKS = [task for task in TASKS if task != TEXT_GENERATION]


def tiny_config(**changes: Any) -> LongformerConfig:
    """Two layers of different windows, hidden 32, two heads, 128 tokens at most."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
        "attention_window": [8, 2 * WINDOW],
        "type_vocab_size": 1,
        "initializer_range": 0.2,  # large enough that attention is far from uniform
    }
    return LongformerConfig(**{**settings, **changes})


def tiny_model(task: str = "feature-extraction", seed: int = 0, **changes: Any) -> Any:
    """A random model of a task's architecture, every parameter drawn (fresh biases would be zeros), in eval mode."""
    if task == SENTENCE_EMBEDDING:
        return LongformerForSentenceEmbedding(tiny_model(seed=seed, **changes), ["mean"], [Normalize()]).eval()
    if task == TEXT_GENERATION:
        return tiny_led(seed=seed, **changes)
    torch.manual_seed(seed)
    return _with_biases(getattr(transformers, TASKS[task].architecture)(tiny_config(**changes)))


def tiny_led_config(**changes: Any) -> LEDConfig:
    """Two layers in the encoder, of different windows, and two in the decoder; 128 tokens in, 40 out."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 48,
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 40,
        "attention_window": [8, 2 * WINDOW],
        "init_std": 0.2,
    }
    return LEDConfig(**{**settings, **changes})


def tiny_led(architecture: str = "LEDForConditionalGeneration", seed: int = 0, **changes: Any) -> Any:
    """A random LED, every parameter drawn, in eval mode."""
    torch.manual_seed(seed)
    cls = getattr(transformers, architecture, LEDForSequenceClassification)
    return _with_biases(cls(tiny_led_config(**changes)))


def _with_biases(model: Any) -> Any:
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0.0, 0.1)
    return model


def save_tiny_checkpoint(folder: Path, task: str = "feature-extraction", **changes: Any) -> Path:
    """A checkpoint as `save_pretrained` writes it, without tokenizer; sentence embeddings are normalized means."""
    if task == SENTENCE_EMBEDDING:
        return make_sentence_folder(save_tiny_checkpoint(folder, **changes), {"pooling_mode": "mean"}, Normalize={})
    tiny_model(task, **changes).save_pretrained(folder)
    return folder


def make_sentence_folder(folder: Path, pooling: dict[str, Any], **modules: dict[str, Any]) -> Path:
    """Make a folder of sentence-transformers of a checkpoint: a Pooling, and modules by class, with their settings."""
    settings = {"Pooling": {"embedding_dimension": 32, **pooling}, **modules}
    paths = {name: f"{i}_{name}" for i, name in enumerate(settings, 1)}
    for name, path in paths.items():
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(settings[name]))
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate({"Transformer": "", **paths}.items())
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": None, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}}))
    return folder


def tiny_tokenizer() -> Any:
    """A byte-pair tokenizer of at most VOCAB_SIZE words, with the special ids of RoBERTa's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "sep_token": "</s>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token="<mask>", **names)
