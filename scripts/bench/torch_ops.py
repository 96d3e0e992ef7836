"""Paired CPU benchmark of a Hugging Face Longformer before and after `lfx.torch.accelerate`, base shape, fp32.

    python -m scripts.bench.torch_ops                 # writes docs/records/torch.jsonl
    python -m scripts.bench.torch_ops --dry-run       # a small model, short lengths; prints the rows, writes nothing

Latency: the contenders run in one process, alternating (A B A B), after a warm-up of each, on the same ids; the first
token is global. Memory: the peak resident set of one process per contender and length, with the interpreter and the
model. `--compile` adds the accelerated model under torch.compile, whose compilation is in the warm-up. `--operators`
adds the one whose attention is PyTorch's operators in place of lfx's kernels.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import logging

from lfx.runtime.bench import measure, peak_memory_bytes
from lfx.torch import accelerate, cpu_kernels
from scripts import record
from scripts.bench.child import run_child
from scripts.checkpoints import base_model

# Length -> rounds; lengths above 4,096 run on a model with a longer position table.
ROUNDS = {16: 9, 300: 7, 512: 7, 1024: 5, 2048: 5, 4096: 5, 8192: 2, 16384: 2}
EAGER, OURS, COMPILED, OPERATORS = "huggingface-eager", "lfx-torch", "lfx-torch-compile", "lfx-torch-operators"
VOCAB_SIZE = 50000
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
FIGURES = ("p5_ms", "p95_ms", "tokens_per_second")
Run = Callable[[Any], Any]


def main() -> None:
    """Run the benchmark, or in a child process that it started, one measurement of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(ROUNDS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.child:
        _contender(options.child, options.lengths[0], options.dry_run)(_ids(options.lengths[0]))
        print(json.dumps({"peak_bytes": peak_memory_bytes()}))
        return
    about = {**record.environment(), "shape": "longformer-base", "dtype": "fp32", "threads": options.threads}
    names = (EAGER, OURS, *([COMPILED] if options.compile else []), *([OPERATORS] if options.operators else []))
    if cpu_kernels.kernels_for(torch.zeros(1)) is None:
        raise SystemExit("lfx's CPU kernels are not installed; install lfx again where there is a C++ compiler")
    for length in [16, 300] if options.dry_run else options.lengths:
        row = {**about, "batch": 1, "globals": 1, **_measured(names, length, options)}
        if options.dry_run:
            print(json.dumps(row))
        else:
            record.update("torch", row, ("seqlen",))
            print(length, f"{row['speedup']:.2f}", row["contenders"], flush=True)


def _measured(names: tuple[str, ...], length: int, options: argparse.Namespace) -> dict[str, Any]:
    flags = ["--dry-run"] if options.dry_run else []
    children = {
        name: run_child("torch_ops", *flags, child=name, lengths=length, threads=options.threads) for name in names
    }
    runs = {name: _contender(name, length, options.dry_run) for name in names}
    outputs = {name: run(_ids(length)) for name, run in runs.items()}  # the warm-up
    rounds = 1 if options.dry_run else ROUNDS.get(length, 3)
    # `measure` reports each contender's time relative to the first one's, which is ours.
    timed = {name: runs[name] for name in (OURS, *(name for name in names if name != OURS))}
    rows = {row["contender"]: row for row in measure(timed, [length], [1], rounds=rounds, vocab_size=VOCAB_SIZE)}
    return {
        "seqlen": length,
        "rounds": rounds,
        "max_difference": float(np.abs(outputs[OURS] - outputs[EAGER]).max()),
        "speedup": rows[EAGER]["times_the_first"],
        "contenders": {
            name: {
                "median_ms": rows[name]["p50_ms"],
                **{figure: rows[name][figure] for figure in FIGURES},
                "peak_bytes": children[name]["peak_bytes"],
            }
            for name in names
        },
    }


def _contender(name: str, length: int, is_small: bool) -> Run:
    return _model_run(name, 16384 if length > 4096 else 4096, is_small)


@functools.cache
def _model_run(name: str, max_seqlen: int, is_small: bool) -> Run:
    """A function that runs the model on ids, with a global first token, and returns last_hidden_state."""
    if name == EAGER:
        model = _model(max_seqlen, is_small)
    else:  # the weights are shared; each child process has one contender
        memo = {id(parameter): parameter for parameter in _model(max_seqlen, is_small).parameters()}
        model = accelerate(copy.deepcopy(_model(max_seqlen, is_small), memo), max_global=1)
    call: Any = torch.compile(model, fullgraph=True, dynamic=True) if name == COMPILED else model
    kernels_for = (lambda tensor: None) if name == OPERATORS else cpu_kernels.kernels_for

    def run(ids: Any) -> Any:
        marks = torch.zeros(ids.shape, dtype=torch.int64)
        marks[:, 0] = 1
        with torch.inference_mode(), mock.patch.object(cpu_kernels, "kernels_for", kernels_for):
            return call(torch.from_numpy(ids), global_attention_mask=marks).last_hidden_state.numpy()

    return run


@functools.cache
def _model(max_seqlen: int, is_small: bool) -> Any:
    return base_model(max_seqlen, **(SMALL if is_small else {}))


def _ids(length: int) -> Any:
    return np.random.default_rng(length).integers(3, VOCAB_SIZE, (1, length))


if __name__ == "__main__":
    main()
