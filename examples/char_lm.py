"""A character model with causal, dilated windows: trained, exported, and continued in ONNX Runtime and in PyTorch.

    python examples/char_lm.py

trains a tiny Longformer on the Constitution of the United States for a minute, exports its checkpoint, and continues a
prompt of 23,000 characters. Both runtimes must choose the same characters.

Lower layers have no dilation, higher ones give heads different dilations, as in Beltagy et al. 2020, arXiv:2004.05150,
section 4.2. Each character is computed from the whole prompt.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import LongformerConfig, LongformerForMaskedLM

from lfx.export import export, use_loop_attention
from lfx.files import temporary_folder
from lfx.runtime import Engine

TEXT = Path(__file__).parent / "constitution.txt"
PAD = 0  # id of padding; characters have ids from 1
DILATIONS = [1, [1, 1, 2, 2], [1, 2, 4, 8]]  # by layer, or by layer and head
WINDOW = 32  # of characters on both sides; a causal window has the 16 before
BATCH, SEQLEN = 8, 512  # characters of a training step
LONGEST_WAVE = 256  # characters; a longer wave would have phases that no training sequence has


def make_model(characters: int, positions: int) -> Any:
    """Make an untrained model; its positions are fixed sine waves, so that they mean the same at any length."""
    config = LongformerConfig(
        vocab_size=characters + 1,
        hidden_size=64,
        num_hidden_layers=len(DILATIONS),
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=positions + PAD + 1,
        type_vocab_size=1,
        pad_token_id=PAD,
        sep_token_id=None,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attention_window=[WINDOW] * len(DILATIONS),
        attention_dilation=DILATIONS,
        autoregressive=True,
    )
    # The head of a masked language model predicts a character from its state; here the next one.
    model = use_loop_attention(LongformerForMaskedLM(config))
    table = model.longformer.embeddings.position_embeddings.weight.requires_grad_(False)
    waves = torch.logspace(math.log2(4), math.log2(LONGEST_WAVE), table.shape[1] // 2, base=2)
    angles = 2 * math.pi * torch.arange(len(table))[:, None] / waves
    table.copy_(torch.cat([angles.sin(), angles.cos()], dim=1) * 0.1)
    return model


def train(model: Any, ids: torch.Tensor, seconds: float, steps: int | None) -> float:
    """Train on random pieces of the text; returns the mean loss of the last ten steps, in bits a character."""
    seqlen = min(SEQLEN, len(ids) - 2)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses: list[float] = []
    end = time.monotonic() + seconds
    model.train()
    while time.monotonic() < end and (steps is None or len(losses) < steps):
        starts = torch.randint(len(ids) - seqlen - 1, (BATCH,))
        pieces = torch.stack([ids[start : start + seqlen + 1] for start in starts])
        logits = model(pieces[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if len(losses) % 20 == 0:
            print(f"step {len(losses)}: {losses[-1]:.2f} bits a character", file=sys.stderr)
    model.eval()
    return float(np.mean(losses[-10:]))


def continue_prompt(
    engine: Engine, model: Any, prompt: torch.Tensor, length: int
) -> tuple[list[int], list[int], float]:
    """Continue a prompt with the likeliest characters.

    Returns:
        The ids that ONNX Runtime chose, those that PyTorch chose after the same characters, and the largest difference
        of the logits of a next character.
    """
    ids, chosen, expected, difference = prompt.tolist(), [], [], 0.0
    for _ in range(length):
        actual = engine.run(ids)["logits"][0, -1]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].numpy()
        difference = max(difference, float(np.abs(actual - logits).max()))
        chosen.append(int(actual.argmax()))
        expected.append(int(logits.argmax()))
        ids.append(chosen[-1])
    return chosen, expected, difference


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit status, 0 if both runtimes chose the same characters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="longest training (default: 60)")
    parser.add_argument("--steps", type=int, help="most training steps")
    parser.add_argument("--context", type=int, default=23_000, help="characters of the prompt (default: 23000)")
    parser.add_argument("--length", type=int, default=20, help="characters that are generated (default: 20)")
    parser.add_argument(
        "--output", type=Path, help="folder for the checkpoint and the bundle (default: a temporary one)"
    )
    options = parser.parse_args(arguments)
    text = TEXT.read_text(encoding="utf-8")
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) + 1 for letter in text])

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = make_model(len(letters), max(options.context + options.length, SEQLEN))
    print(f"trained to {train(model, ids, options.seconds, options.steps):.2f} bits a character")
    with temporary_folder("char-lm") as scratch:
        folder = options.output if options.output is not None else scratch
        model.save_pretrained(folder / "checkpoint")
        bundle = export(folder / "checkpoint", folder / "bundle", global_attention="none")
        prompt = ids[: options.context]
        with Engine(bundle, "onnxruntime") as engine:
            chosen, expected, difference = continue_prompt(engine, model, prompt, options.length)
    print(f"prompt: {len(prompt):,} characters, the last of them {text[: options.context][-60:]!r}")
    print(f"continued: {''.join(letters[i - 1] for i in chosen)!r}")
    print(
        f"PyTorch chose {'the same' if chosen == expected else 'other'} characters; logits differ by {difference:.1e}"
    )
    return int(chosen != expected)


if __name__ == "__main__":
    raise SystemExit(main())
