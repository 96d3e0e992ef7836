"""Benchmark the CPU backends and PyTorch: base shape, alternating in one process.

    python -m scripts.bench.backends                      # everything: an hour and more, and 24 GB
    python -m scripts.bench.backends --measures latency --batch 8 --lengths 4096 --only "Hugging Face eager fp32" \\
        --only "lfx, ONNX Runtime fp32" --only "lfx, ONNX Runtime int8"                                # in less memory

latency: docs/records/backends.jsonl, one row per contender, length and batch, written as soon as it is measured. The
int8 model is calibrated on the example document. lfx refuses a precision that the CPU has no instructions for, so it is
not measured. Without bfloat16 instructions Hugging Face's bfloat16 takes minutes per run, so it is measured at batch 1
only. Rows of other CPUs are kept.
blocks: docs/records/blocks.jsonl, latency of one sequence by the number of queries in a block of the attention.
attention: docs/records/attention.jsonl, ONNX Runtime's Attention operator and the nodes that the graph has instead.
profile: docs/records/profile.jsonl, share of the parts of the model in the latency, by the backends' own profilers.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx.inliner import inline_local_functions

from lfx.errors import DependencyError
from lfx.export import export
from lfx.export.functions import BLOCK, MASK_FILL
from lfx.export.quantize import quantize
from lfx.files import link_or_copy
from lfx.machine import cpu_name
from lfx.manifest import MODEL
from lfx.runtime import Engine, custom_ops
from lfx.runtime.backends.onnxruntime import DISABLED_ON_CPU
from lfx.runtime.backends.openvino import OPENVINO_TYPES
from lfx.runtime.bench import measure
from scripts import record
from scripts.bench.contenders import Run, differences, engine_run, huggingface_run
from scripts.checkpoints import DOCUMENT, save_base_checkpoint

LENGTHS = (512, 1024, 2048, 4096)
ROUNDS = {1: 5, 8: 1}  # batch -> rounds; at batch 8 one run of all contenders takes minutes
PROFILED = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
HAS_BFLOAT16 = "amx_bf16" in cpu_name()
MEASURES = ("latency", "blocks", "attention", "profile")
BLOCKS = (64, 96, 128, 192, 256)
Feeds = dict[str, np.ndarray]
Counted = list[tuple[str, str, float]]  # name, operator and seconds of each node of one run
EAGER, EAGER_BF16 = "Hugging Face eager fp32", "Hugging Face eager bf16"


def main() -> None:
    """Run the benchmarks of --measures and write their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measures", type=lambda text: text.split(","), default=list(MEASURES))
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=list(ROUNDS))
    parser.add_argument(
        "--only", action="append", help="measure this contender (repeatable); all at batch 8 and 4,096 take 24 GB"
    )
    options = parser.parse_args()
    if options.only is not None and EAGER not in options.only:
        parser.error(f"all contenders are compared with {EAGER!r}; give it with --only too")
    about = {**record.environment(), "shape": "longformer-base", "threads": options.threads}
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        checkpoint = save_base_checkpoint(Path(folder) / "checkpoint")
        bundle = export(checkpoint, Path(folder) / "fp32")
        if "profile" in options.measures:
            for length in dict.fromkeys((options.lengths[0], options.lengths[-1])):
                for backend, precision in PROFILED:
                    if precision == "bf16" and not HAS_BFLOAT16:
                        continue
                    row = profile(backend, precision, bundle, length, options.threads)
                    record.update("profile", {**about, **row}, ("cpu", "seqlen", "backend", "precision"))
        if "attention" in options.measures:
            record.write("attention", [{**about, **row} for row in attention(options.lengths[-1], options.threads)])
        if "blocks" in options.measures:
            with tempfile.TemporaryDirectory(prefix="lfx-bench-") as scratch:
                rows = blocks(bundle, Path(scratch), options.lengths[-1], options.threads)
            record.write("blocks", [{**about, **row} for row in rows])
        if "latency" in options.measures:
            runs = contenders(checkpoint, bundle, Path(folder), options.threads)
            selected = {name: run for name, run in runs.items() if options.only is None or name in options.only}
            runs.clear()  # free the memory of the others
            latency(selected, options.lengths, options.batch, about)


def latency(runs: dict[str, Run], lengths: list[int], batches: list[int], about: dict[str, Any]) -> None:
    """Measure all runs at all lengths and batch sizes; each row is recorded at once."""
    for batch in batches:
        selected = {name: run for name, run in runs.items() if batch == 1 or HAS_BFLOAT16 or name != EAGER_BF16}
        for length in lengths:
            largest = differences(selected, length) if batch == 1 else {}
            rounds = ROUNDS.get(batch, 1)
            for row in measure(selected, [length], [batch], rounds=rounds, warm_up=False, vocab_size=50000):
                row["max_difference"] = largest.get(row["contender"])
                record.update("backends", {**about, **row}, ("cpu", "batch", "seqlen", "contender"))
                figures = f"{row['p50_ms']:.0f} ms {row['times_the_first']:.3f}"
                print(batch, length, row["contender"], figures, flush=True)


def blocks(bundle: Path, folder: Path, length: int, threads: int) -> list[dict[str, Any]]:
    """Measure the graph with other block sizes, alternating, in both backends."""
    runs: dict[str, Run] = {}
    for size in BLOCKS:
        target = folder / f"block-{size}"
        target.mkdir()
        model = onnx.load(str(bundle / MODEL), load_external_data=False)
        (body,) = (function for function in model.functions if function.name == "BandedAttention")
        constants = (a.t for node in body.node for a in node.attribute if a.name == "value")
        (constant,) = (t for t in constants if onnx.numpy_helper.to_array(t).tolist() == [BLOCK])
        constant.CopyFrom(onnx.numpy_helper.from_array(np.array([size], np.int64)))
        onnx.save(model, str(target / MODEL))
        for data in bundle.glob(f"{MODEL}.*"):
            link_or_copy(data, target / data.name)
        for backend in ("onnxruntime", "openvino"):
            engine = Engine(target / MODEL, backend, threads=threads, kernels="function")
            runs[f"{backend} {size}"] = engine_run(engine)
    rows = measure(runs, [length], [1], rounds=3, vocab_size=50000)
    for row in rows:
        backend, _, size = row.pop("contender").partition(" ")
        row.update(backend=backend, block=int(size))
        print(row["backend"], row["block"], f"{row['p50_ms']:.0f} ms", flush=True)
    return rows


def attention(length: int, threads: int) -> list[dict[str, Any]]:
    """Measure the attention of one layer after the gather: the graph's nodes, and opset 23's Attention operator."""
    count, keys = -(-length // BLOCK), BLOCK + 512 + 1  # one-sided window 256, one global slot
    inputs = f"float[{count},12,{BLOCK},64] q, float[{count},12,{keys},64] k, float[{count},12,{keys},64] v"
    interface = f"({inputs}, float[{count},1,{BLOCK},{keys}] bias) => (float[{count},12,{BLOCK},64] out)"
    variants = {
        "MatMul, Add, Softmax, MatMul": "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) a = Add (s, bias) "
        "p = Softmax <axis = -1> (a) out = MatMul (p, v)",
        "Attention (opset 23)": "out = Attention <scale = 1.0> (q, k, v, bias)",
    }
    random = np.random.default_rng(0)
    feeds = {
        name: random.standard_normal((count, heads, rows, columns), dtype=np.float32)
        for name, heads, rows, columns in (("q", 12, BLOCK, 64), ("k", 12, keys, 64), ("v", 12, keys, 64))
    }
    feeds["bias"] = np.where(random.random((count, 1, BLOCK, keys)) < 0.2, MASK_FILL, 0).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    runs: dict[str, Run] = {}
    for name, nodes in variants.items():
        text = f'<ir_version: 10, opset_import: ["" : 23]> g {interface} {{ {nodes} }}'
        session = onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString(), options)
        runs[name] = lambda _, session=session: session.run(None, feeds)[0]
    largest = max(differences(runs, length).values())
    rows = measure(runs, [length], [1], rounds=15, vocab_size=50000)
    for row in rows:
        row["max_difference"] = largest
        print(row["contender"], f"{row['p50_ms']:.0f} ms", flush=True)
    return rows


def profile(backend: str, precision: str, bundle: Path, length: int, threads: int) -> dict[str, Any]:
    """Return the share of each part of the model in a backend's latency, in the fastest of five profiled runs."""
    ids = np.random.default_rng(0).integers(3, 50000, (1, length))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "global_attention_mask": np.zeros_like(ids)}
    if backend == "onnxruntime":
        runs = onnxruntime_counters(bundle, feeds, threads, "fused")
    else:
        runs = openvino_counters(bundle, feeds, threads, OPENVINO_TYPES[precision])
    run = min(runs, key=lambda nodes: sum(seconds for _, _, seconds in nodes))
    parts = {"linear layers": 0.0, "attention": 0.0, "the rest": 0.0}
    for name, operator, seconds in run:
        if is_attention(name, operator):
            parts["attention"] += seconds
        else:
            parts["linear layers" if operator in ("MatMul", "Gemm", "FullyConnected") else "the rest"] += seconds
    total = sum(parts.values())
    shares = {part: seconds / total for part, seconds in parts.items()}
    print(backend, precision, length, {part: f"{share:.1%}" for part, share in shares.items()}, flush=True)
    return {"backend": backend, "precision": precision, "seqlen": length, "seconds": total, "shares": shares}


def is_attention(name: str, operator: str) -> bool:
    """Whether a node is part of attention: of a function body, whose nodes the inliner renames, or a custom op."""
    is_named = re.match(r"_inlfunc_|n\d+__\d+|.*#global_rows|.*attention\.self/", name)
    return bool(is_named) or operator in ("BandedAttention", "GlobalAttention")


def onnxruntime_counters(bundle: Path, feeds: Feeds, threads: int, kernels: str) -> list[Counted]:
    """Profile five runs in ONNX Runtime; returns name, operator and seconds of each node, per run."""
    options = onnxruntime.SessionOptions()
    if kernels == "fused":
        options.register_custom_ops_library(str(custom_ops.library()))
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(bundle / MODEL), options, disabled_optimizers=DISABLED_ON_CPU)
        for _ in range(5):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: list[Counted] = []
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["name"] == "model_run":
            runs.append([])
        # The nodes in the branches of an If have events of their own.
        elif event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "If":
            name = event["name"].removesuffix("_kernel_time")
            runs[-1].append((name, event["args"]["op_name"], event["dur"] / 1e6))
    return runs


def openvino_counters(bundle: Path, feeds: Feeds, threads: int, precision: str) -> list[Counted]:
    """Profile five runs in OpenVINO; returns name, type and seconds of each layer, per run."""
    with tempfile.TemporaryDirectory() as folder:
        inlined = Path(folder) / MODEL
        onnx.save(inline_local_functions(onnx.load(str(bundle / MODEL), load_external_data=False)), str(inlined))
        for data in bundle.glob(f"{MODEL}.*"):
            link_or_copy(data, Path(folder) / data.name)
        settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        request = core.compile_model(core.read_model(str(inlined)), "CPU", settings).create_infer_request()
    runs: list[Counted] = []
    for _ in range(5):
        request.infer(feeds)
        layers = request.get_profiling_info()
        runs.append([(layer.node_name, layer.node_type, layer.real_time.total_seconds()) for layer in layers])
    return runs


def contenders(checkpoint: Path, fp32: Path, folder: Path, threads: int) -> dict[str, Run]:
    """Return the contenders: name -> a function that runs ids; the others are compared with the first."""
    int8 = quantize(fp32, folder / "int8", calibration=DOCUMENT)
    runs: dict[str, Run] = {
        EAGER: huggingface_run(checkpoint, threads),
        EAGER_BF16: huggingface_run(checkpoint, threads, "bfloat16"),
    }
    for name, bundle, backend, precision in (
        ("ONNX Runtime fp32", fp32, "onnxruntime", None),
        ("ONNX Runtime int8", int8, "onnxruntime", None),
        ("OpenVINO fp32", fp32, "openvino", "fp32"),
        ("OpenVINO bf16", fp32, "openvino", "bf16"),
        ("OpenVINO int8", int8, "openvino", None),
    ):
        try:
            engine = Engine(bundle, backend, precision=precision, threads=threads)
        except DependencyError as error:
            print(f"{name} is not measured: {error}")
            continue
        runs[f"lfx, {name}"] = engine_run(engine)
    return runs


if __name__ == "__main__":
    main()
