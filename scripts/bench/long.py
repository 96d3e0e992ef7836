"""Benchmark lfx in ONNX Runtime on 16,384, 32,768 and 65,536 tokens: error on slices, time and memory by length.

    python -m scripts.bench.long           # writes docs/records/long.jsonl
    python -m scripts.bench.long --tiny --output long.jsonl      # the same steps in seconds, on a tiny model

The dense reference of such a sequence needs too much memory, so it is computed for some rows of the output only:

- the first, the last and some inner rows of the whole model, without global tokens. A row depends only on the tokens
  at most layers · window away, so the reference runs on these tokens, at their positions.
- rows of a model of one layer, with global tokens spread over the sequence. A row of its output depends on all keys,
  but on no other query, so the reference computes each row over the whole sequence: the rows of global tokens, those
  around the ends of blocks and of the sequence, and random ones. The layers of a model have equal nodes, so one layer
  is enough.

Both are compared as in `lfx parity`: the error may be twice that of PyTorch in float32, plus a rounding band.

Time: one process, in which the lengths take turns, without global tokens. Memory: peak resident set size of one process
per length.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfx.manifest import Manifest
from lfx.parity import Arrays
from lfx.runtime import Engine
from lfx.runtime.bench import measure, peak_memory_bytes
from scripts import record
from scripts.bench.child import run_child
from scripts.checkpoints import LAYERS, WINDOW, base_model

OUTPUT = "last_hidden_state"
ONE_LAYER = "one-layer"  # the bundle with global tokens
GLOBALS = 9
BLOCK = 128  # queries in a block of the exported graph


@dataclass(frozen=True)
class Setup:
    """The model, and what is measured.

    Attributes:
        lengths: sequence lengths in tokens, ascending.
        window: one-sided attention window.
        rows: number of rows of a slice that are compared.
        random_rows: number of random rows of the model of one layer that are compared.
        changes: settings that replace those of the base model's config.
    """

    lengths: tuple[int, ...] = (16384, 32768, 65536)
    layers: int = LAYERS
    window: int = WINDOW
    rows: int = 128
    random_rows: int = 64
    vocab_size: int = 50265
    changes: tuple[tuple[str, int], ...] = ()

    def model(self, layers: int) -> Any:
        """Make a model with `layers` layers for the longest sequence."""
        settings = {**dict(self.changes), "vocab_size": self.vocab_size, "attention_window": 2 * self.window}
        return base_model(self.lengths[-1], num_hidden_layers=layers, **settings)

    def ids(self, length: int) -> Any:
        """Return (1, length) ids; a shorter sequence is the beginning of the longest."""
        ids = np.random.default_rng(0).integers(3, self.vocab_size, self.lengths[-1])
        return ids[None, :length].astype(np.int64)

    def slices(self, length: int) -> dict[str, range]:
        """Return the slices of the output that are compared; "first" and "inner" are the same for all lengths."""
        inner = self.lengths[0] // 2 - self.rows // 2
        return {
            "first": range(self.rows),
            "inner": range(inner, inner + self.rows),
            "last": range(length - self.rows, length),
        }

    def global_positions(self, length: int) -> Any:
        """Return the positions of the global tokens for the model of one layer, evenly spaced over the sequence."""
        return np.linspace(0, length - 1, GLOBALS).astype(np.int64)

    def layer_rows(self, length: int) -> Any:
        """Return the rows of the model of one layer that are compared, ascending."""
        edges = np.array([0, BLOCK, self.window, length // 2 // BLOCK * BLOCK, length // BLOCK * BLOCK, length])
        around = (edges[:, None] + np.arange(-2, 3)).ravel()
        random = np.random.default_rng(length).integers(0, length, self.random_rows)
        rows = np.unique(np.concatenate([around, random, self.global_positions(length)]))
        return rows[(rows >= 0) & (rows < length)]


TINY = Setup(
    lengths=(512, 1024, 2048),
    layers=2,
    window=16,
    rows=16,
    random_rows=8,
    vocab_size=500,
    changes=(("hidden_size", 32), ("num_attention_heads", 2), ("intermediate_size", 64)),
)


def check_slices(setup: Setup, rows_of: Callable[[int], Arrays]) -> dict[int, list[dict[str, Any]]]:
    """Compare rows of the whole model.

    Args:
        rows_of: returns the model's rows for a length: name of the slice -> array.
    Returns:
        For each length, one result per slice.
    """
    from scripts.bench.long_reference import compare_rows, reference_of, slice_rows

    model = setup.model(setup.layers)
    reference = reference_of(model)
    expected: dict[range, list[Arrays]] = {}  # the "first" and "inner" slices are computed once for all lengths
    results: dict[int, list[dict[str, Any]]] = {}
    for length in setup.lengths:
        for name, rows in setup.slices(length).items():
            if rows not in expected:
                expected[rows] = [slice_rows(m, setup.ids(length), rows) for m in (reference, model)]
            compared = compare_rows(*expected[rows], rows_of(length)[name], setup.layers)
            results.setdefault(length, []).append({"model": "whole", "place": name, **compared})
            print(length, results[length][-1], flush=True)
    return results


def check_layer(setup: Setup, length: int, actual: Any) -> dict[str, Any]:
    """Compare rows of the model of one layer."""
    import torch

    from scripts.bench.long_reference import compare_rows, layer_rows

    arguments = setup.ids(length), setup.global_positions(length), setup.layer_rows(length)
    rows = [layer_rows(setup.model(1), *arguments, dtype) for dtype in (torch.float64, torch.float32)]
    result = {"model": "one layer", "place": "all over", "globals": GLOBALS, **compare_rows(*rows, actual, 1)}
    print(length, result, flush=True)
    return result


def run_once(setup: Setup, bundle: Path, length: int, threads: int, rows: Path) -> dict[str, Any]:
    """Run a bundle on one sequence, and save the rows that are compared in the file `rows`.

    Returns:
        Peak memory of this process: `open_bytes` after the bundle was opened, `peak_bytes` after the run.
    """
    with Engine(bundle, threads=threads) as engine:
        ids, mask = setup.ids(length), np.zeros((1, length), dtype=np.int64)
        if bundle.name == ONE_LAYER:
            mask[0, setup.global_positions(length)] = 1
        engine.run(ids[:, :1])
        opened = peak_memory_bytes()
        output = np.asarray(engine.run(ids, global_attention_mask=mask)[OUTPUT])
    peak = peak_memory_bytes()
    if bundle.name == ONE_LAYER:
        np.savez(rows, rows=output[:, setup.layer_rows(length)])
    else:
        np.savez(rows, **{name: output[:, r.start : r.stop] for name, r in setup.slices(length).items()})
    return {"open_bytes": opened, "peak_bytes": peak}


def time_lengths(setup: Setup, bundle: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Time a bundle on all lengths, which take turns.

    Returns:
        Length, as text -> its percentiles in milliseconds.
    """
    with Engine(bundle, threads=threads) as engine:
        engine.run(setup.ids(min(4096, setup.lengths[0])))  # warm-up

        def run(length: int, _: Any) -> None:
            engine.run(setup.ids(length))

        runs = {str(length): functools.partial(run, length) for length in setup.lengths}
        rows = measure(runs, [1], [1], rounds=rounds, warm_up=False)
    return {row["contender"]: {name: row[name] for name in ("p50_ms", "p5_ms", "p95_ms")} for row in rows}


def child(options: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Run a step, in the child process; returns its measurements."""
    bundle = options.work / options.bundle
    if options.child == "export":
        from lfx.export import export

        export(setup.model(1 if options.bundle == ONE_LAYER else setup.layers), bundle)
        return {}
    if options.child == "time":
        return time_lengths(setup, bundle, options.threads, options.rounds)
    return run_once(setup, bundle, options.length, options.threads, options.work / f"{options.length}.npz")


def _parent(options: argparse.Namespace, setup: Setup, work: Path) -> list[dict[str, Any]]:
    shape = [f"--threads={options.threads}", f"--layers={setup.layers}", *(["--tiny"] if options.tiny else [])]
    shape.append(f"--lengths={','.join(map(str, setup.lengths))}")
    for bundle in ("whole", ONE_LAYER):
        if not (work / bundle).exists():
            run_child("long", *shape, child="export", work=work, bundle=bundle)
    times = run_child("long", *shape, child="time", work=work, bundle="whole", rounds=options.rounds)
    memory, saved, checks = {}, {}, {}
    for length in setup.lengths:
        memory[length] = run_child("long", *shape, child="memory", work=work, bundle="whole", length=length)
        saved[length] = dict(np.load(work / f"{length}.npz"))
        print(length, times[str(length)], memory[length], flush=True)
    for length in setup.lengths:
        run_child("long", *shape, child="memory", work=work, bundle=ONE_LAYER, length=length)
        checks[length] = check_layer(setup, length, np.load(work / f"{length}.npz")["rows"])
    slices = check_slices(setup, saved.__getitem__)
    about = _about(options, setup, work)
    return [
        {
            **about,
            "seqlen": length,
            "median_ms": times[str(length)]["p50_ms"],
            "p5_ms": times[str(length)]["p5_ms"],
            "p95_ms": times[str(length)]["p95_ms"],
            "tokens_per_second": 1000 * length / times[str(length)]["p50_ms"],
            **memory[length],
            "checks": [*slices[length], checks[length]],
        }
        for length in setup.lengths
    ]


def _about(options: argparse.Namespace, setup: Setup, work: Path) -> dict[str, Any]:
    return {
        **record.environment(),
        "shape": "tiny" if options.tiny else "longformer-base",
        "layers": setup.layers,
        "window": setup.window,
        "dtype": "fp32",
        "threads": options.threads,
        "batch": 1,
        "globals": 0,
        "rounds": options.rounds,
        "model_sha256": Manifest.read(work / "whole").source["sha256"],
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--rounds", type=int, default=2, help="timed runs of each length (default: 2)")
    made.add_argument("--layers", type=int, help="layers of the model (default: 12)")
    made.add_argument("--lengths", type=lambda text: tuple(sorted(map(int, text.split(",")))))
    made.add_argument("--tiny", action="store_true", help="a tiny model and short sequences, to try the script")
    made.add_argument("--work", type=Path, help="keep bundles in this folder, and reuse those in it")
    made.add_argument("--output", type=Path, help="write this file (default: docs/records/long.jsonl)")
    made.add_argument("--child", choices=["export", "time", "memory"], help=argparse.SUPPRESS)
    made.add_argument("--bundle", help=argparse.SUPPRESS)
    made.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return made


def setup_of(options: argparse.Namespace) -> Setup:
    """Return the setup that the options ask for."""
    given = {name: getattr(options, name) for name in ("layers", "lengths") if getattr(options, name) is not None}
    return Setup(**{**vars(TINY if options.tiny else Setup()), **given})


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the record; in a child process, run one step."""
    options = parser().parse_args(arguments)
    setup = setup_of(options)
    if options.child is not None:
        print(json.dumps(child(options, setup)))
        return
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="lfx-long-") as folder:
        work = options.work if options.work is not None else Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        rows = _parent(options, setup, work)
    print(record.write(options.output or "long", rows))
    if not all(check["passed"] for row in rows for check in row["checks"]):
        raise SystemExit("rows are out of tolerance")


if __name__ == "__main__":
    main()
