"""Check the plugin and the plans on a machine with an NVIDIA GPU, and write what was found to docs/records/gpu.jsonl.

    python scripts/gpu_check.py --headers DIR     # TensorRT's headers, for the plugin's library
    python scripts/gpu_check.py --dry-run         # builds, lists the cases, and stops: needs no GPU

It builds the library for this GPU with nvcc, then

1. runs every kernel over the case list of the parity suite and more (dilation, causal, head sizes, wide heads), in
   float32, float16 and bfloat16, on fresh random inputs, outputs poisoned with NaN, against the dense definition in
   float64; an error may be at most what rounding leaves (`tests/plugins/problems.py` derives it);
2. runs some of them through the plugin's creator and `enqueue`, as TensorRT does, and inside a captured CUDA graph;
3. where TensorRT or TensorRT-RTX is installed, builds plans and runs them end to end against PyTorch.

compute-sanitizer runs over it with: compute-sanitizer --tool memcheck python scripts/gpu_check.py --quick
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu  # first: it makes lfx and tests importable from a clone
import numpy as np

from lfx.parity import Case, full_cases
from lfx.runtime.plugin import TYPES, BandedParams, GlobalParams, Kernels
from tests.plugins.problems import Banded, Global, banded, enqueue_through_creator, global_

PRECISIONS = ("fp32", "fp16", "bf16")
Problem = Banded | Global


def main() -> None:
    """Build, check, write the record; exit 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=Path, help="the folder of NvInfer.h")
    parser.add_argument("--record", type=Path, default=gpu.ROOT / "docs" / "records" / "gpu.jsonl")
    parser.add_argument("--quick", action="store_true", help="every tenth case, for compute-sanitizer")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    problems = list(cases())[:: 10 if options.quick else 1]
    with tempfile.TemporaryDirectory(prefix="lfx-gpu-") as scratch:
        library = gpu.build(Path(scratch), options.headers)
        print(f"{len(problems)} kernel cases in {', '.join(PRECISIONS)}; library: {library.name}", flush=True)
        if options.dry_run:
            print("dry run: nothing was run on a GPU")
            return
        rows = check(library, problems, options.headers is not None)
        rows += plans() if not options.quick else []
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows)} rows in {options.record}, {len(failed)} failed")
    for row in failed[:20]:
        print(json.dumps(row))
    sys.exit(1 if failed else 0)


def cases() -> Iterator[tuple[str, Problem]]:
    """(precision, problem) of every kernel check."""
    for precision in PRECISIONS:
        for case in full_cases(8, None):
            yield precision, banded(case, 2, 16, 8, precision=precision)
        for case in full_cases(64, None)[::4]:
            yield precision, banded(case, 2, 64, 64, precision=precision)
        for dilation, causal in ((1, 1), (2, 0), (3, 1)):
            for case in full_cases(20, None)[::5]:
                yield precision, banded(case, 2, 32, 20, precision=precision, dilation=dilation, causal=causal)
        for head_size in (8, 40, 64, 128):
            yield precision, banded(Case(2, 700, "scattered", "right"), 3, head_size, 256, precision=precision)
        yield precision, banded(Case(1, 4096, "scattered"), 2, 64, 256, precision=precision)
        for queries, heads, size in ((1, 2, 64), (17, 2, 32), (64, 12, 64), (12, 1, 768), (16, 1, 1024), (5, 3, 128)):
            for case in (Case(1, 31), Case(2, 500, "none", "left"), Case(1, 4096, "none", "holes")):
                yield precision, global_(case, queries, heads, size, precision=precision)


def check(library: Path, problems: list[tuple[str, Problem]], through_creator: bool) -> list[dict[str, Any]]:
    """Run every problem; a row for each kernel and precision, and for each that fails."""
    import torch

    kernels = Kernels(library)
    about = gpu.environment(torch)
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for i, (precision, problem) in enumerate(problems):
        ways = ["launch"]
        if i % 7 == 0:
            ways += ["graph", *(["enqueue"] if through_creator else [])]
        right = problem.dense()
        for way in ways:
            op = "BandedAttention" if isinstance(problem, Banded) else "GlobalAttention"
            error = float(np.abs(run(kernels, library, problem, way, torch) - right).max())
            share = error / problem.tolerance()
            row = rows.setdefault(
                (op, precision, way), {**about, "op": op, "precision": precision, "way": way, "cases": 0}
            )
            row["cases"] += 1
            row["largest_error"] = max(row.get("largest_error", 0.0), float("inf") if np.isnan(error) else error)
            row["largest_share_of_tolerance"] = max(row.get("largest_share_of_tolerance", 0.0), share)
            row["passed"] = row.get("passed", True) and bool(share <= 1.0)
            if not share <= 1.0:
                row.setdefault("failed", []).append(describe(problem, error))
    return list(rows.values())


def describe(problem: Problem, error: float) -> dict[str, Any]:
    """What fails."""
    shapes = {name: list(array.shape) for name, array in problem.inputs.items()}
    attributes = {k: v for k, v in vars(problem).items() if k != "inputs"}
    return {"error": error, "tolerance": problem.tolerance(), "shapes": shapes, **attributes}


def run(kernels: Kernels, library: Path, problem: Problem, way: str, torch: Any) -> np.ndarray:
    """One problem on the GPU: by the launch, in a captured graph, or through the creator."""
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    kind = kinds[problem.precision]
    tensors = {}
    for name, array in problem.inputs.items():
        exact = array if array.dtype == np.int32 else array.astype(np.float32)
        tensors[name] = torch.from_numpy(exact).to("cuda", torch.int32 if array.dtype == np.int32 else kind)
    batch, rows, width = problem.inputs["query"].shape
    size = width // problem.num_heads
    out = torch.full((batch, rows, width), float("nan"), dtype=kind, device="cuda")
    scratch_bytes = kernels.workspace_bytes(batch, rows, problem.num_heads, size)
    scratch = torch.full((scratch_bytes // 4,), float("nan"), device="cuda")
    values: dict[str, Any] = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    values.update(context=out.data_ptr(), batch=batch, num_heads=problem.num_heads, head_size=size)
    values.update(scale=size**-0.5, type=TYPES[problem.precision], seqlen=problem.inputs["key"].shape[1])
    params: Any
    if isinstance(problem, Banded):
        slots = problem.inputs["global_index"].shape[1]
        params = BandedParams(
            **values, slots=slots, window=problem.window, dilation=problem.dilation, causal=problem.causal
        )
        launch = kernels.banded
    else:
        params = GlobalParams(**values, queries=rows, workspace=scratch.data_ptr())
        launch = kernels.global_
    torch.cuda.synchronize()
    if way == "launch":
        stream = torch.cuda.current_stream().cuda_stream
        assert launch(ctypes.byref(params), stream) == 0
    elif way == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert launch(ctypes.byref(params), torch.cuda.current_stream().cuda_stream) == 0
        out.fill_(float("nan"))
        graph.replay()
    else:
        helper = ctypes.CDLL(str(library.with_name("libenqueue.so")))
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        workspace = (scratch.data_ptr(), scratch_bytes)
        stream = torch.cuda.current_stream().cuda_stream
        assert not enqueue_through_creator(helper, str(library), problem, addresses, out.data_ptr(), workspace, stream)
    torch.cuda.synchronize()
    return np.asarray(out.double().cpu())


def plans() -> list[dict[str, Any]]:
    """Plans end to end against PyTorch, where TensorRT and the export side are installed; else a row that says why."""
    flavors = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    found = [name for name, module in flavors.items() if importlib.util.find_spec(module) is not None]
    needed = [m for m in ("transformers", "onnxscript", "onnxruntime", "cuda.bindings") if not _installed(m)]
    if not found or needed:
        missing = "no TensorRT" if not found else f"no {', '.join(needed)}"
        return [{"op": "plans", "passed": True, "skipped": f"{missing} on this machine"}]
    from lfx.export import export
    from lfx.export.validate import compare_engine
    from lfx.parity import full_cases
    from lfx.runtime import Engine, build_engine, device
    from tests.models import tiny_model

    rows = []
    target = device.compute_capability()
    with tempfile.TemporaryDirectory(prefix="lfx-plans-") as folder:
        module = tiny_model()
        bundle = export(module, Path(folder) / "tiny")
        for flavor in found:
            for precision in PRECISIONS:
                for plugin in (True, False):
                    row = {"op": "plan", "flavor": flavor, "precision": precision, "plugin": plugin, "target": target}
                    start = time.perf_counter()
                    try:
                        ahead = target if flavor == "tensorrt-rtx" else None
                        plan = build_engine(
                            bundle,
                            Path(folder) / "tiny.plan",
                            precision=precision,
                            flavor=flavor,
                            plugin=plugin,
                            target=ahead,
                        )
                        with Engine(plan) as engine:
                            report = compare_engine(engine, module, full_cases, lambda step: None)
                        row |= {
                            "passed": not report.failures(),
                            "failures": report.failures(),
                            "cases": len(report.rows),
                        }
                        row["outputs"] = report.to_dict()["outputs"]
                    except Exception as error:
                        row |= {"passed": False, "failures": [f"{type(error).__name__}: {error}"]}
                    rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
    return rows


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    main()
