"""Benchmark text generation: the prefill and the tokens per second of lfx and of Hugging Face, and their peak memory.

    python -m scripts.bench.generation           # writes docs/records/generation.jsonl
    python -m scripts.bench.generation --rounds 3 1      # one turn at the second length, 16,384 tokens
    python -m scripts.bench.generation --tiny --output generation.jsonl      # the same steps in seconds

The model has the config of led-base-16384 and random weights; its int8 bundle is made by `lfx.export.quantize`. All
contenders write the same number of tokens by greedy search, without an end token, for one document whose first token is
global.

Time: one process, in which the contenders take turns, after one run of each at the first length as warm-up. The prefill
is the time to the first token. Memory: peak resident set size of a process for each contender and length, which opens
the contender and writes a few tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfx.cli.bench import engine_generate, torch_generate
from lfx.manifest import Manifest
from lfx.runtime import Engine
from lfx.runtime.bench import Generate, measure_generation, peak_memory_bytes
from scripts import record

HUGGING_FACE = "Hugging Face"
PEAK_TOKENS = 4  # written by the processes that measure memory, whose peak is at the prefill
# Contender -> its bundle in the folder, and its backend.
ENGINES = {
    "lfx onnxruntime": ("bundle", "onnxruntime"),
    "lfx onnxruntime int8": ("bundle-int8", "onnxruntime"),
    "lfx openvino": ("bundle", "openvino"),
}
# The int8 bundle is calibrated on half of these documents of random ids, and on the texts that are written for them.
CALIBRATION = {"documents": 4, "tokens": 512, "new_tokens": 16}


@dataclass(frozen=True)
class Setup:
    """The model, and what is measured.

    Attributes:
        lengths: number of tokens of the document.
        new_tokens: number of tokens that are generated.
        config: settings of the LEDConfig.
    """

    lengths: tuple[int, ...]
    new_tokens: int
    config: dict[str, Any]


LED_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "attention_window": 1024,
    "max_encoder_position_embeddings": 16384,
    "max_decoder_position_embeddings": 1024,
    "vocab_size": 50265,
}
TINY = {
    **LED_BASE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "attention_window": 32,
    "max_encoder_position_embeddings": 512,
    "vocab_size": 200,
}
SETUPS = {
    "base": Setup((4096, 16384), 128, LED_BASE),
    "tiny": Setup((64, 512), 8, TINY),
}


def make(folder: Path, setup: Setup) -> None:
    """Write a checkpoint with random weights, and its bundle."""
    import torch
    from transformers import LEDConfig, LEDForConditionalGeneration

    from lfx.export import export

    torch.manual_seed(0)
    model = LEDForConditionalGeneration(LEDConfig(**setup.config)).eval()
    model.save_pretrained(folder / "checkpoint")
    export(model, folder / "bundle")


def make_int8(folder: Path, setup: Setup) -> None:
    """Write the int8 bundle of the bundle in the folder."""
    from lfx.export.quantize import quantize

    count, tokens = CALIBRATION["documents"], CALIBRATION["tokens"]
    ids = np.random.default_rng(0).integers(3, setup.config["vocab_size"], (count, tokens))
    documents = folder / "calibration.jsonl"
    documents.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()), encoding="utf-8")
    options = {"max_new_tokens": CALIBRATION["new_tokens"], "eos_token_id": None}
    quantize(folder / "bundle", folder / "bundle-int8", calibration=documents, generate=options)


def contender(name: str, folder: Path, threads: int) -> Generate:
    """Open a contender."""
    if name in ENGINES:
        bundle, backend = ENGINES[name]
        return engine_generate(Engine(folder / bundle, backend, threads=threads))
    import torch
    from transformers import LEDForConditionalGeneration

    torch.set_num_threads(threads)
    return torch_generate(LEDForConditionalGeneration.from_pretrained(folder / "checkpoint").eval())


def peak_memory(name: str, folder: Path, setup: str, length: int, threads: int) -> int:
    """Return the peak memory, in bytes, of a process that runs one contender."""
    arguments = ["--peak", name, "--setup", setup, "--length", str(length), "--threads", str(threads)]
    command = [sys.executable, "-m", "scripts.bench.generation", "--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=record.ROOT)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def print_peak(name: str, folder: Path, setup: Setup, length: int, threads: int) -> None:
    """Run one contender once, and print the peak memory of this process."""
    ids = np.random.default_rng(0).integers(3, setup.config["vocab_size"], (1, length))
    contender(name, folder, threads)(ids, PEAK_TOKENS, lambda: None)
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes()}))


def measure(
    folder: Path, setup_name: str, names: Sequence[str], *, rounds: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    """Measure contenders; returns one row for each length and contender.

    Args:
        rounds: number of turns at each length; one number is for all lengths.
    """
    setup = SETUPS[setup_name]
    contenders = {name: contender(name, folder, threads) for name in names}
    rows = []
    for i, length in enumerate(setup.lengths):
        rows += measure_generation(
            contenders,
            [length],
            [1],
            new_tokens=setup.new_tokens,
            rounds=rounds[i] if len(rounds) > 1 else rounds[0],
            warm_up=i == 0,
            vocab_size=setup.config["vocab_size"],
            progress=lambda step: print(step, file=sys.stderr, flush=True),
        )
    del contenders  # their memory, which the processes below need
    by_contender = {(row["contender"], row["seqlen"]): row for row in rows}
    for row in rows:
        other = by_contender[HUGGING_FACE, row["seqlen"]]
        row["times_hugging_face_prefill"] = other["prefill_times_the_first"] / row["prefill_times_the_first"]
        row["times_hugging_face_decode"] = other["decode_times_the_first"] / row["decode_times_the_first"]
        row["peak_memory_bytes"] = peak_memory(row["contender"], folder, setup_name, row["seqlen"], threads)
    facts = {**record.environment(), "setup": setup_name, "threads": threads}
    return [{**row, **_model(row["contender"], folder), **facts} for row in rows]


def _model(name: str, folder: Path) -> dict[str, Any]:
    """Return the precision of a contender, and the digest of its bundle; Hugging Face's is that of the fp32 bundle."""
    manifest = Manifest.read(folder / (ENGINES[name][0] if name in ENGINES else "bundle"))
    return {"precision": manifest.signature.precision, "model": manifest.to_dict()["manifest_sha256"]}


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[3], help="for each length, or one number for all")
    parser.add_argument("--without", choices=ENGINES, action="append", default=[], help="leave a contender out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="measure a tiny model")
    parser.add_argument("--output", type=Path, help="default: docs/records/generation.jsonl")
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoint and the bundles here, or use those that are here"
    )
    parser.add_argument("--setup", choices=SETUPS, default="base", help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=(*ENGINES, HUGGING_FACE), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print_peak(options.peak, options.folder, SETUPS[options.setup], options.length, options.threads)
        return
    setup = "tiny" if options.tiny else "base"
    if len(options.rounds) not in (1, len(SETUPS[setup].lengths)):
        parser.error(f"--rounds has {len(options.rounds)} numbers; give 1 or {len(SETUPS[setup].lengths)}")
    names = [name for name in (*ENGINES, HUGGING_FACE) if name not in options.without]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "bundle").exists():
            make(folder, SETUPS[setup])
        if "lfx onnxruntime int8" in names and not (folder / "bundle-int8").exists():
            make_int8(folder, SETUPS[setup])
        rows = measure(folder, setup, names, rounds=options.rounds, threads=options.threads)
    print(record.write(options.output or "generation", rows))


if __name__ == "__main__":
    main()
