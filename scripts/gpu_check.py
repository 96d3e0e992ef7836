"""Check kernels, plugin, lfx.torch, bundles and plans on an NVIDIA GPU, and write docs/records/gpu.jsonl.

    python -m scripts.gpu_check --headers DIR     # TensorRT's headers, to build the plugin's library
    python -m scripts.gpu_check --dry-run         # builds and counts the cases; needs no GPU

It builds the library for this GPU with nvcc, then

1. runs both kernels over the cases of the parity suite and more (dilation, causal, head sizes, wide heads), in
   float32, float16 and bfloat16, on random inputs, with outputs filled with NaN before, against the dense float64
   definition; `tests/plugins/problems.py` derives the tolerance;
2. runs some of the cases through the plugin's creator and `enqueue`, as TensorRT does, and in a captured CUDA graph;
3. compares accelerated models (`lfx.torch`) with the dense float64 definition: called as they are, in a CUDA graph and
   under torch.compile;
4. runs bundles on ONNX Runtime's CUDA provider, if installed, with the custom ops and without, and compares them with
   PyTorch;
5. builds plans with TensorRT and TensorRT-RTX, if installed, and compares them with PyTorch.

Checks of different parts and precisions may run side by side with --resume and one record.

To run it under compute-sanitizer: compute-sanitizer --tool memcheck python -m scripts.gpu_check --quick
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import fcntl
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lfx.parity import Case, Report, full_cases
from scripts import record
from scripts.bench import gpu, rivals, timing
from scripts.bench.launch import Kernels, dtype_of, in_lfx_torch, run_banded, run_global
from tests.plugins.problems import Banded, Global, banded, enqueue_through_creator, global_

PRECISIONS = ("fp32", "fp16", "bf16")
PARTS = ("kernels", "torch", "onnxruntime", "plans")
LED_ENCODER = "LED's encoder"
SLOTS = 128  # for the global tokens of a row, where their number is fixed
Problem = Banded | Global
Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]


def main() -> None:
    """Build the library, run the checks and write the record; exits with 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=Path, help="folder of NvInfer.h")
    parser.add_argument("--record", type=Path, default=record.RECORDS / "gpu.jsonl")
    parser.add_argument("--library", type=Path, help="use this library instead of building one")
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the kernels' cases; default: all")
    parser.add_argument("--resume", action="store_true", help="keep the record's rows of other parts and precisions")
    parser.add_argument("--quick", action="store_true", help="check every tenth case only, for compute-sanitizer")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.quick and options.part not in (None, "kernels"):
        parser.error("--quick checks kernels only; leave --part out, or give --part kernels")
    precisions = PRECISIONS if options.precision is None else (options.precision,)
    problems = list(cases(precisions))[:: 10 if options.quick else 1]
    with tempfile.TemporaryDirectory(prefix="lfx-gpu-") as scratch:
        library = options.library or gpu.build(Path(scratch), options.headers)
        print(f"{len(problems)} kernel cases in {', '.join(precisions)}; library: {library.name}", flush=True)
        if options.dry_run:
            print("dry run: nothing was run on a GPU")
            return
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "kernels": lambda: check(library, problems, options.headers is not None),
            "torch": lambda: models(library),
            "onnxruntime": bundles,
            "plans": plans,
        }
        chosen = PARTS if options.part is None else (options.part,)
        rows = [row for part in chosen if part == "kernels" or not options.quick for row in parts[part]()]
    write(options.record, rows, options.resume)
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows)} rows in {options.record}, {len(failed)} failed")
    for row in failed[:20]:
        print(json.dumps(row))
    sys.exit(1 if failed else 0)


def write(path: Path, rows: list[dict[str, Any]], resume: bool) -> None:
    """Write the record; other checks, which run side by side with this one, may write theirs to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record.write(path, [*(kept(path, rows) if resume else []), *rows])


def kept(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a record, of the GPU and commit of `rows`, that `rows` do not replace."""
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    machines = {(row["gpu"], row["commit"]) for row in rows}
    key = ("op", "precision", "way", "flavor", "plugin")
    new = {tuple(row.get(name) for name in key) for row in rows}
    return [
        row
        for row in old
        if (row["gpu"], row["commit"]) in machines and tuple(row.get(name) for name in key) not in new
    ]


def cases(precisions: Sequence[str] = PRECISIONS) -> Iterator[tuple[str, Problem]]:
    """Yield the precision and the problem of each kernel check."""
    for precision in precisions:
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
    """Run all problems; returns a row for each op, precision and way of launching it, with the failed problems."""
    import torch

    kernels = Kernels(library)
    if through_creator and not library.with_name("libenqueue.so").exists():
        print(f"the creator is not checked: {library.parent} has no libenqueue.so", flush=True)
        through_creator = False
    about = record.gpu_environment(torch)
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for i, (precision, problem) in enumerate(problems):
        ways = ["launch"]
        if i % 7 == 0:
            ways += ["graph", "packed", *(["enqueue"] if through_creator else [])]
        expected = problem.dense()
        for way in ways:
            op = "BandedAttention" if isinstance(problem, Banded) else "GlobalAttention"
            error = float(np.abs(run(kernels, library, problem, way, torch) - expected).max())
            share = error / problem.tolerance()
            row = rows.setdefault(
                (op, precision, way), {**about, "op": op, "precision": precision, "way": way, "cases": 0}
            )
            row["cases"] += 1
            row["largest_error"] = max(row.get("largest_error", 0.0), float("inf") if np.isnan(error) else error)
            row["largest_share_of_tolerance"] = max(
                row.get("largest_share_of_tolerance", 0.0), float("inf") if np.isnan(share) else share
            )
            row["passed"] = row.get("passed", True) and bool(share <= 1.0)
            if not share <= 1.0:
                row.setdefault("failed", []).append(describe(problem, error))
    return list(rows.values())


def describe(problem: Problem, error: float) -> dict[str, Any]:
    """Return the error, tolerance, shapes and attributes of a failed problem."""
    shapes = {name: list(array.shape) for name, array in problem.inputs.items()}
    attributes = {k: v for k, v in vars(problem).items() if k != "inputs"}
    return {"error": error, "tolerance": problem.tolerance(), "shapes": shapes, **attributes}


def run(kernels: Kernels, library: Path, problem: Problem, way: str, torch: Any) -> np.ndarray:
    """Run one problem on the GPU.

    Args:
        way: "launch" calls the launcher, "graph" replays a captured CUDA graph, "packed" calls the launcher with query,
            key and value in the rows of one tensor, as far as they have as many rows, and a context with gaps, and
            "enqueue" goes through the creator.
    Returns:
        The context, float64.
    """
    dtype = dtype_of(problem.precision)
    tensors = {}
    for name, array in problem.inputs.items():
        tensor = torch.from_numpy(array if array.dtype == np.int32 else array.astype(np.float32))
        tensors[name] = tensor.to("cuda", torch.int32 if array.dtype == np.int32 else dtype)
    batch, rows, width = problem.inputs["query"].shape
    out = torch.full((batch, rows, width), float("nan"), dtype=dtype, device="cuda")
    if way == "packed":
        names = [name for name in ("query", "key", "value") if tensors[name].shape == tensors["key"].shape]
        packed = torch.cat([tensors[name] for name in names], dim=2)
        tensors |= dict(zip(names, packed.split(width, dim=2), strict=True))
        out = torch.full((batch, rows, 2 * width), float("nan"), dtype=dtype, device="cuda")[:, :, :width]
    scratch_bytes = kernels.workspace_bytes(batch, rows, problem.num_heads, width // problem.num_heads)
    scratch = torch.full((scratch_bytes // 4,), float("nan"), device="cuda")

    def launch() -> None:
        if isinstance(problem, Banded):
            run_banded(kernels, tensors, out, **problem.attributes)
        else:
            run_global(kernels, tensors, out, scratch, problem.num_heads)

    torch.cuda.synchronize()
    if way in ("launch", "packed"):
        launch()
    elif way == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
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


def models(library: Path) -> list[dict[str, Any]]:
    """Compare accelerated models with the dense definition; returns a row for each model, precision and way.

    The witness of the tolerance is Hugging Face's model on this GPU, in the same precision.
    """
    import torch

    from lfx.export.torch_runners import reference_runner
    from lfx.torch import accelerate
    from tests.models import tiny_led, tiny_model

    about = record.gpu_environment(torch)
    rows = []
    with in_lfx_torch(library):
        for name, model in (("Longformer", tiny_model()), (LED_ENCODER, tiny_led("LEDModel").encoder)):
            reference = remembered(reference_runner(model))
            for precision in PRECISIONS:
                witness = copy.deepcopy(model).to(timing.DEVICE, dtype_of(precision))
                fixed = accelerate(copy.deepcopy(witness), max_global=SLOTS)
                ways = {
                    "calls": (as_called(accelerate(copy.deepcopy(witness))), some_cases()),
                    "graph": (in_graph(fixed), some_cases()),
                    "compiled": (as_called(torch.compile(fixed, fullgraph=True)), some_cases()[-2:]),  # each compiles
                }
                for way, (candidate, cases_of_way) in ways.items():
                    if (name, precision) == (LED_ENCODER, "fp16") and way != "calls":
                        continue  # Hugging Face's encoder reads its hidden states in float16: see docs/torch.md
                    row = {**about, "op": name, "precision": precision, "way": way}
                    rows.append({**row, **compared(reference, as_called(witness), candidate, precision, cases_of_way)})
                    print(json.dumps(rows[-1]), flush=True)
        rows.append({**about, "op": "LED", "precision": "fp32", "way": "generate", **generated()})
    rows.append({**about, "op": "Longformer", "precision": "fp32", "way": "too many global tokens", **refused(library)})
    return rows


def some_cases() -> list[Case]:
    """Return every fourth case of the parity suite for the tiny models."""
    from tests.models import WINDOW

    return full_cases(WINDOW, SLOTS)[::4]


def as_called(model: Any) -> Run:
    """Return a model on the GPU as a function of arrays."""
    import torch

    def run(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            return to_arrays(model(**on_device(inputs)))

    return run


def in_graph(model: Any) -> Run:
    """Return a model as a function of arrays, which captures a CUDA graph on other inputs and replays it on these."""
    import torch

    def run(inputs: Arrays) -> Arrays:
        tensors = on_device(inputs)
        held = {name: tensor.roll(1, dims=1) for name, tensor in tensors.items()}
        with torch.inference_mode():
            graph, outputs = timing.capture(lambda given: model(**given), [held])
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
            graph.replay()
            return to_arrays(outputs[0])

    return run


def on_device(inputs: Arrays) -> dict[str, Any]:
    """Return arrays as tensors on the GPU."""
    import torch

    return {name: torch.from_numpy(array).to(timing.DEVICE) for name, array in inputs.items()}


def to_arrays(outputs: Any) -> Arrays:
    """Return a model's tensors as float32 arrays by name."""
    import torch

    return {name: x.float().cpu().numpy() for name, x in outputs.items() if isinstance(x, torch.Tensor)}


def remembered(run: Run) -> Run:
    """Return a function that runs each of its inputs once."""
    known: dict[tuple[bytes, ...], Arrays] = {}

    def lookup(inputs: Arrays) -> Arrays:
        key = tuple(array.tobytes() for array in inputs.values())
        if key not in known:
            known[key] = run(inputs)
        return known[key]

    return lookup


def compared(reference: Run, witness: Run, candidate: Run, precision: str, some: Sequence[Case]) -> dict[str, Any]:
    """Compare a function of a model's inputs with the dense definition; returns the entries of a row."""
    from lfx.parity import compare, inputs_of
    from tests.models import VOCAB_SIZE

    return outcome(
        lambda: compare(
            some,
            lambda case: inputs_of(case, vocab_size=VOCAB_SIZE, pad_token_id=1),
            reference=reference,
            witness=witness,
            candidate=candidate,
            precision=precision,
            layers=2,
        )
    )


def outcome(compare: Callable[[], Report]) -> dict[str, Any]:
    """Run a comparison; returns the entries of a row. An error is a failure, and does not end the other checks."""
    started = time.perf_counter()
    try:
        report = compare()
        result = {"passed": not report.failures(), "failures": report.failures(), "cases": len(report.rows)}
        result["outputs"] = report.to_dict()["outputs"]
    except Exception as error:
        result = {"passed": False, "failures": [f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"]}
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def generated() -> dict[str, Any]:
    """Compare the tokens that an accelerated LED generates on the GPU with Hugging Face's on the CPU."""
    import torch

    from lfx.torch import accelerate
    from tests.models import VOCAB_SIZE, tiny_led

    model = tiny_led()
    ids = torch.randint(3, VOCAB_SIZE, (3, 70), generator=torch.Generator().manual_seed(0))
    options = {
        "max_new_tokens": 20,
        "num_beams": 2,
        "global_attention_mask": (torch.arange(70) < 1).long().repeat(3, 1),
    }
    expected = model.generate(ids, **options)
    options["global_attention_mask"] = options["global_attention_mask"].to(timing.DEVICE)
    actual = accelerate(model.to(timing.DEVICE)).generate(ids.to(timing.DEVICE), **options).cpu()
    return {"passed": torch.equal(actual, expected), "cases": len(ids)}


def refused(library: Path) -> dict[str, Any]:
    """Give an accelerated model more global tokens than it has slots, in a process of its own, which cannot go on."""
    code = (
        "import sys, torch; from lfx.torch import accelerate; from scripts.bench.launch import in_lfx_torch\n"
        "from tests.models import tiny_model\n"
        "model = accelerate(tiny_model().cuda(), max_global=2); ids = torch.full((1, 20), 5, device='cuda')\n"
        "with in_lfx_torch(sys.argv[1]):\n"
        "    model(ids, global_attention_mask=torch.ones_like(ids)).last_hidden_state.cpu()\n"
        "print('it returned')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], check=False, capture_output=True, text=True, cwd=record.ROOT
    )
    says_so = [line for line in done.stderr.splitlines() if "device-side assert" in line or "max_global=2" in line]
    passed = done.returncode != 0 and "it returned" not in done.stdout and bool(says_so)
    return {"passed": passed, "cases": 1, "message": says_so[:4]}


def bundles(provider: str = "cuda", precisions: Sequence[str] = PRECISIONS) -> list[dict[str, Any]]:
    """Run bundles on ONNX Runtime's CUDA provider and compare them with PyTorch; without it, one row that says so."""
    import torch

    about = record.gpu_environment(torch)
    if f"{provider.upper()}ExecutionProvider" not in rivals.providers():
        return [{**about, "op": "bundle", "passed": True, "skipped": "no onnxruntime-gpu on this machine"}]
    from lfx.export import export
    from lfx.export.validate import compare_engine
    from lfx.runtime import Engine
    from tests.models import tiny_model

    rows = []
    module = tiny_model()
    with tempfile.TemporaryDirectory(prefix="lfx-bundles-") as folder:

        def compare(precision: str, kernels: str) -> Report:
            bundle = Path(folder) / precision
            if not bundle.exists():
                export(module, bundle, precision=precision)
            with Engine(bundle, "onnxruntime", provider=provider, kernels=kernels) as engine:
                return compare_engine(engine, module, lambda *_: some_cases(), lambda step: None)

        for precision, kernels in itertools.product(precisions, ("fused", "function")):
            row = {**about, "op": "bundle", "precision": precision, "way": kernels}
            rows.append({**row, **outcome(functools.partial(compare, precision, kernels))})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def plans() -> list[dict[str, Any]]:
    """Build plans and compare them with PyTorch; a missing package gives one row that names it."""
    import torch

    about = record.gpu_environment(torch)
    modules = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    flavors = [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]
    missing = [m for m in ("transformers", "onnxscript", "onnxruntime", "cuda.bindings") if not _installed(m)]
    if not flavors or missing:
        reason = "no TensorRT" if not flavors else f"no {', '.join(missing)}"
        return [{**about, "op": "plans", "passed": True, "skipped": f"{reason} on this machine"}]
    from lfx.export import export
    from lfx.export.validate import compare_engine
    from lfx.runtime import Engine, build_engine, device
    from tests.models import tiny_model

    rows = []
    target = device.compute_capability()
    with tempfile.TemporaryDirectory(prefix="lfx-plans-") as folder:
        module = tiny_model()
        bundle = export(module, Path(folder) / "tiny")

        def compare(options: dict[str, Any]) -> Report:
            # TensorRT builds for the GPU of this machine, and refuses a target.
            own_target = target if options["flavor"] == "tensorrt-rtx" else None
            plan = build_engine(bundle, Path(folder) / "tiny.plan", target=own_target, **options)
            with Engine(plan) as engine:
                return compare_engine(engine, module, full_cases, lambda step: None)

        for flavor, precision, plugin in itertools.product(flavors, PRECISIONS, (True, False)):
            options = {"flavor": flavor, "precision": precision, "plugin": plugin}
            row = {**about, "op": "plan", **options, "target": target}
            rows.append({**row, **outcome(functools.partial(compare, options))})
    return rows


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    main()
