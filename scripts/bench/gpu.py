"""The command of the GPU benchmarks: the library of the kernels, the options, the record and the verdicts.

They run from a clone; where lfx is not installed, with PYTHONPATH=src.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import record

ROOT = record.ROOT
Rows = list[dict[str, Any]]


def build(folder: Path, headers: Path | None, default_target: str = "sm_80") -> Path:
    """Build the library for this GPU, or for `default_target` without a GPU; without headers, the kernels only."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not on the PATH; install the CUDA toolkit")
    target = architecture(default_target)
    sources = ["banded/banded_attention.cu", "global/global_attention.cu", "limits.cpp"]
    flags = [f"-I{ROOT / 'plugins'}"]
    if headers is not None:
        sources += [f"tensorrt/{path.name}" for path in sorted((ROOT / "plugins" / "tensorrt").glob("*.cpp"))]
        sources.append("op_traits.cpp")
        flags += ["-isystem", str(headers)]
        test = [nvcc, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", *flags, "-o", str(folder / "libenqueue.so")]
        subprocess.run([*test, str(ROOT / "tests" / "plugins" / "enqueue.cpp"), "-ldl"], check=True)
    code = target.removeprefix("sm_") + ("a" if target == "sm_90" else "")  # as plugins/architectures.cmake does
    command = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{code},code=sm_{code}", "-lineinfo", "-shared"]
    command += ["-Xcompiler", "-fPIC", *flags]
    library = folder / "liblfx_plugins.so"
    paths = [str(ROOT / "plugins" / source) for source in sources]
    subprocess.run([*command, "-o", str(library), *paths], check=True)
    return library


def architecture(default: str) -> str:
    """Return the architecture of this GPU, such as sm_90, or `default` without a GPU."""
    capability = record.query_gpu("compute_cap")
    return f"sm_{capability.replace('.', '')}" if capability else default


def require() -> None:
    """Exit if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no NVIDIA GPU; --dry-run shows what can be seen without one")


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Make a parser with the options of all GPU benchmarks; the record is `name`.jsonl."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="measure the cases of the claims only")
    result.add_argument("--minutes", type=float, default=9.0, help="start no case after this time; default %(default)s")
    result.add_argument("--dry-run", action="store_true", help="build and list the cases; needs no GPU")
    result.add_argument("--library", type=Path, help="use this library instead of building one")
    result.add_argument("--resume", action="store_true", help="keep the record's cases of this GPU and commit")
    result.add_argument("--record", type=Path, default=record.RECORDS / f"{name}.jsonl")
    return result


def measure_all(
    cases: Sequence[Any],
    measure: Callable[[Any], dict[str, Any]],
    verdicts: Callable[[Rows], Rows],
    deadline: float,
    path: Path,
    done: Rows | None = None,
    case_of: Callable[[dict[str, Any]], Any] = lambda row: row,
) -> Rows:
    """Measure the cases until `deadline` (of time.monotonic); returns a row for each measured one.

    The record, with all rows and their verdicts, is written after each case.

    Args:
        done: rows of an earlier call, of `resumed`; their cases, which `case_of` returns, are not measured again.
    """
    import torch

    rows: Rows = [*(done or [])]
    earlier = [case_of(row) for row in rows]
    todo = [case for case in cases if case not in earlier]
    with torch.no_grad():
        for i, case in enumerate(todo):
            if time.monotonic() > deadline:
                print(f"time is over: {len(todo) - i} of {len(cases)} were not started", flush=True)
                break
            rows.append(measure(case))
            record.write(path, rows + verdicts(rows))
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def resumed(path: Path, about: dict[str, Any]) -> Rows:
    """Return the measured rows of a record that have the GPU, commit and versions of `about`; dates may differ."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if all(row.get(name) == about[name] for name in about if name != "date")]


def conclude(table: str, verdicts: Rows) -> None:
    """Print table and verdicts and exit, with 1 unless the first verdict, on the errors, holds."""
    print(table)
    for verdict in verdicts:
        word = {True: "HOLDS", False: "FAILS", None: "OPEN "}[verdict["holds"]]
        print(f"{word} {verdict['claim']}: {verdict['figure']}")
    sys.exit(0 if verdicts[0]["holds"] else 1)
