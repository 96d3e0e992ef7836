"""The models that the clients run, and what Engine answers for each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from lfx.export import export, relayout
from lfx.export.quantize import quantize
from lfx.manifest import MANIFEST
from lfx.runtime import Engine
from tests.clients.clients import INPUTS, slug
from tests.encoders import tiny_encoder
from tests.models import VOCAB_SIZE, make_sentence_folder, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.runtime.generation.led import tiny_led


def make_models(root: Path) -> None:
    """Fill a folder with one folder for each name in `clients.CASES`."""
    tokenizer = tiny_tokenizer()
    base = export(tiny_model(), root / slug("bundle (layout lfx)"), tokenizer=tokenizer)
    classifier = export(tiny_model("text-classification"), root / "classifier bundle", tokenizer=tokenizer)
    text = root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    int8 = quantize(base, root / "int8", calibration=text, samples=4)
    relayout(base, root / "base")
    relayout(base, root / slug("base with model.onnx_data"), external_data=True)
    relayout(int8, root / slug("int8 of base"))
    relayout(classifier, root / "classifier")
    relayout(classifier, root / slug("classifier, --model-type roberta"), model_type="roberta")
    checkpoint = save_tiny_checkpoint(root / "checkpoint")
    tokenizer.save_pretrained(checkpoint)
    make_sentence_folder(checkpoint, {}, Normalize={})
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}  # as versions before 6 write it
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    export(checkpoint, root / slug("sentence embedding"), layout="hf")
    led = export(tiny_led(vocab_size=VOCAB_SIZE), root / "LED bundle", tokenizer=tokenizer)
    relayout(led, root / "LED")
    relayout(led, root / slug("LED, --model-type bart"), model_type="bart")
    _export_plain(tiny_encoder("Roberta"), root / slug("plain RoBERTa, torch.onnx"))


class _Hidden(torch.nn.Module):
    """The last hidden state of an encoder, alone."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the state, (batch, seqlen, hidden)."""
        hidden: torch.Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


def _export_plain(model: torch.nn.Module, folder: Path) -> None:
    """Export an encoder as PyTorch does, without lfx."""
    folder.mkdir()
    arguments = tuple(torch.tensor(INPUTS[name]) for name in ("ids", "mask"))
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings(action="ignore"):  # of the tracer, on transformers' code
        torch.onnx.export(
            _Hidden(model),
            arguments,
            folder / "model.onnx",
            dynamo=False,
            input_names=names,
            output_names=["last_hidden_state"],
        )


def expected(folder: Path, output: str) -> np.ndarray[Any, Any]:
    """What Engine answers for the inputs of the cases; ONNX Runtime for a model that is not lfx's."""
    if not (folder / MANIFEST).exists():
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        feeds = {"input_ids": np.array(INPUTS["ids"]), "attention_mask": np.array(INPUTS["mask"])}
        return np.asarray(session.run([output], feeds)[0])
    with Engine(folder) as engine:
        if output == "tokens":
            return engine.generate(np.array(INPUTS["ids"]), np.array(INPUTS["mask"]), **INPUTS["search"])
        if output == "sentence_embedding":
            return engine.embed(INPUTS["texts"])
        return np.asarray(engine.run(np.array(INPUTS["ids"]), np.array(INPUTS["mask"]))[output])
