"""A checkpoint's tokenizer files name a vocabulary outside its folder, in each way that transformers would follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lfx.errors import ExportError
from lfx.export.load import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox"]
SECRET = "password"


def attack(folder: Path) -> str:
    """No tokenizer has a word of the file outside."""
    text, table = folder / "outside.txt", folder / "outside.json"
    text.write_text("\n".join([*WORDS, SECRET]))
    table.write_text(json.dumps({word: number for number, word in enumerate([*WORDS, SECRET])}))
    bert, roberta = {"tokenizer_class": "BertTokenizer"}, {"tokenizer_class": "RobertaTokenizer"}
    own = {"vocab.txt": "\n".join(WORDS)}
    checkpoints: list[dict[str, Any]] = [
        {**own, "tokenizer_config.json": bert, "special_tokens_map.json": {"vocab_file": str(text)}},
        {**own, "tokenizer_config.json": bert, "special_tokens_map.json": {"vocab": str(text)}},
        {"tokenizer_config.json": {**bert, "vocab": str(text)}},
        {"tokenizer_config.json": {**bert, "init_inputs": [str(text)]}},
        {
            "vocab.json": {"<s>": 0, "fox": 1},
            "merges.txt": "",
            "tokenizer_config.json": {**roberta, "vocab": str(table)},
        },
    ]
    for number, files in enumerate(checkpoints):
        checkpoint = folder / str(number)
        checkpoint.mkdir()
        for name, content in {"config.json": {"model_type": "longformer"}, **files}.items():
            (checkpoint / name).write_text(content if isinstance(content, str) else json.dumps(content))
        try:
            vocabulary = load_tokenizer(str(checkpoint)).get_vocab()
        except ExportError:  # it has no vocabulary of its own
            continue
        assert SECRET not in vocabulary, files
    return "a tokenizer is made of the checkpoint's own files alone"
