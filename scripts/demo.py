"""`make demo`: export a Longformer, run it on a document, compare its outputs and its speed with PyTorch's."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import DOCUMENT, save_base_checkpoint
from rich.console import Console
from rich.table import Table

from lfx import runtime
from lfx.errors import ExportError, LfxError
from lfx.export import export
from lfx.export.load import load, quiet
from lfx.manifest import Manifest
from lfx.parity import pair_tolerance
from lfx.runtime.bench import measure

HUB_ID = "allenai/longformer-base-4096"
LENGTHS = (1, 100, 512, 1000, 4096)
console = Console()


def main() -> int:
    """Run the demo; returns the exit status, 1 if an output differs from PyTorch's by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for checkpoint and bundle")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)

    source = _checkpoint(options.output)
    bundle = options.output / "longformer-base-4096"
    console.print(f"[bold]lfx export --model {source} --output {bundle}[/]")
    started = time.perf_counter()
    export(source, bundle, progress=lambda step: console.print(f"  {step}", highlight=False))
    manifest = Manifest.read(bundle)
    worst = max(r["max_abs_error"] for r in manifest.validation["outputs"].values())
    console.print(f"  exported and validated in {time.perf_counter() - started:.0f} s; largest error {worst:.1e}")

    model, _ = load(source)
    with runtime.Engine(bundle, threads=options.threads) as engine:
        ids = _document_ids(bundle)
        _run_document(engine, ids)
        passed = _check_parity(engine, model, ids)
        _compare_speed(engine, model, options.threads)
    return 0 if passed else 1


def _checkpoint(output: Path) -> str:
    try:
        load(HUB_ID)
    except ExportError as error:
        folder = output / "random-longformer-base-4096"
        console.print(f"[yellow]{HUB_ID} is out of reach ({error}).")
        console.print(
            "[yellow]Using the same architecture with seeded RANDOM weights: the speed is real, the outputs are not."
        )
        if not (folder / "model.safetensors").is_file():
            save_base_checkpoint(folder)
        return str(folder)
    console.print(f"Using {HUB_ID} from the hub.")
    return HUB_ID


def _document_ids(bundle: Path) -> list[int]:
    """Return the ids of the document, without special tokens."""
    from tokenizers import Tokenizer

    text = DOCUMENT.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False).ids]
    console.print(f"\n[bold]{DOCUMENT.name}[/]: {len(text):,} characters, {len(ids):,} tokens")
    return ids


def _run_document(engine: runtime.Engine, ids: list[int]) -> None:
    limit = (engine.signature.max_seqlen or 4096) - 2
    pieces = [[0, *ids[i : i + limit], 2] for i in range(0, len(ids), limit)]
    started = time.perf_counter()
    for i, piece in enumerate(pieces):
        state = np.asarray(engine.run(piece)["last_hidden_state"])
        console.print(f"  piece {i + 1} of {len(pieces)}: {len(piece)} tokens -> last_hidden_state {state.shape}")
    seconds = time.perf_counter() - started
    console.print(f"  all pieces in {seconds:.1f} s on {engine.backend}")


def _check_parity(engine: runtime.Engine, model: Any, ids: list[int]) -> bool:
    columns = ("tokens", "largest difference from PyTorch", "tolerance", "")
    table = Table(*columns, title="\nParity with Hugging Face, fp32")
    passed = True
    for length in LENGTHS:
        piece = np.array([ids[:length]])
        actual = np.asarray(engine.run(piece)["last_hidden_state"])
        with torch.inference_mode(), quiet():
            expected = model(torch.from_numpy(piece)).last_hidden_state.numpy()
        difference = float(np.abs(actual - expected).max())
        layers = len(engine.signature.attention_windows)
        tolerance = pair_tolerance("fp32", layers, float(np.abs(expected).max()))
        passed &= difference <= tolerance
        verdict = "ok" if difference <= tolerance else "WRONG"
        table.add_row(f"{length}", f"{difference:.1e}", f"{tolerance:.1e}", verdict)
    console.print(table)
    return passed


def _compare_speed(engine: runtime.Engine, model: Any, threads: int) -> None:
    def pytorch(ids: Any) -> None:
        with torch.inference_mode(), quiet():
            model(torch.from_numpy(ids))

    table = Table("tokens", "PyTorch eager", "lfx", "lfx is", title=f"\nTokens per second, batch 1, {threads} threads")
    contenders, vocab_size = {"PyTorch": pytorch, "lfx": engine.run}, model.config.vocab_size
    for length, rounds in ((512, 5), (4096, 3)):
        eager, ours = measure(contenders, [length], [1], rounds=rounds, vocab_size=vocab_size)
        rates = (f"{row['tokens_per_second']:,.0f}" for row in (eager, ours))
        table.add_row(f"{length}", *rates, f"{1 / ours['times_the_first']:.2f} times as fast")
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LfxError as error:
        console.print(f"[red]error: {error}")
        sys.exit(1)
