"""Shared parts of the scripts for NVIDIA GPUs: building the library, its ops on torch tensors, and timing."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# `tests` comes from the clone, and so does lfx if it is not installed.
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "src"))

import numpy as np  # noqa: E402

from lfx.machine import package_versions  # noqa: E402
from lfx.runtime.plugin import TYPES, BandedParams, GlobalParams, Kernels  # noqa: E402

DEVICE = "cuda"
FLUSH_BYTES = 1 << 29  # written before each timing: larger than any L2, and long enough to hide the launch latency
Rows = list[dict[str, Any]]


# ---- the library --------------------------------------------------------------------------------------------------


def build(folder: Path, headers: Path | None, default_target: str = "sm_80") -> Path:
    """Build the library for this GPU, or for `default_target` without a GPU; without headers, the kernels only."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not on the PATH; install the CUDA toolkit")
    capability = _query_gpu("compute_cap")
    target = f"sm_{capability.replace('.', '')}" if capability else default_target
    sources = ["banded_attention.cu", "global_attention.cu", "limits.cpp"]
    flags = []
    if headers is not None:
        sources.append("plugin.cpp")
        flags.append(f"-I{headers}")
        test = [nvcc, "-std=c++17", "-shared", "-Xcompiler", "-fPIC", *flags, "-o", str(folder / "libenqueue.so")]
        subprocess.run([*test, str(ROOT / "tests" / "plugins" / "enqueue.cpp"), "-ldl"], check=True)
    command = [nvcc, "-std=c++17", "-O3", f"-arch={target}", "-lineinfo", "-shared", "-Xcompiler", "-fPIC", *flags]
    library = folder / "liblfx_plugins.so"
    paths = [str(ROOT / "plugins" / source) for source in sources]
    subprocess.run([*command, "-o", str(library), *paths], check=True)
    return library


def _query_gpu(fields: str) -> str:
    """Query fields of the first GPU with nvidia-smi; returns an empty string without a GPU."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def environment(torch: Any) -> dict[str, Any]:
    """Return date, commit, GPU and versions, for each row of a record."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "gpu": _query_gpu("name,driver_version") or torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "versions": package_versions(("triton", "transformers")),
    }


def machine_code(library: Path) -> dict[str, str] | None:
    """Disassemble the kernels of a library.

    Returns:
        Kernel name -> the compiler's resource line and the disassembly; None without cuobjdump.
    """
    tool = shutil.which("cuobjdump") or next(
        (str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/cuobjdump")), None
    )
    if tool is None:
        return None
    # cuobjdump calls nvdisasm, which is in its folder.
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])}

    def run(option: str) -> str:
        return subprocess.run([tool, option, library], check=True, capture_output=True, text=True, env=env).stdout

    resources = dict(re.findall(r"Function (\w+):\s+(REG:.*)", run("--dump-resource-usage")))
    parts = run("-sass").split("Function : ")[1:]
    return {part.split()[0]: f"{resources[part.split()[0]]}\n{part}" for part in parts}


def _instructions(code: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Parse a disassembly; returns (address, opcode without suffix) of the instructions, (from, to) of the branches."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", code)
    branches = [(address, re.search(r"0x([0-9a-f]+)", rest)) for address, name, rest in lines if name[:3] == "BRA"]
    return (
        [(int(address, 16), name.split(".")[0]) for address, name, _ in lines],
        [(int(address, 16), int(to[1], 16)) for address, to in branches if to is not None],
    )


def straight_runs(code: str) -> list[list[str]]:
    """Split a disassembly at branches and branch targets; returns the opcodes of each straight run."""
    instructions, branches = _instructions(code)
    starts = {to for _, to in branches} | {address + 16 for address, _ in branches}
    runs: list[list[str]] = [[]]
    for address, name in instructions:
        if address in starts:
            runs.append([])
        runs[-1].append(name)
    return [run for run in runs if run]


def require() -> None:
    """Exit if there is no GPU."""
    if not _torch().cuda.is_available():
        sys.exit("PyTorch sees no NVIDIA GPU; --dry-run shows what can be seen without one")


# ---- the ops on torch tensors -------------------------------------------------------------------------------------


def _type(tensor: Any) -> int:
    names = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
    return TYPES[names[str(tensor.dtype)]]


def _pointers(**tensors: Any) -> dict[str, int]:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name} is not contiguous and 16-byte aligned")
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _launch(function: Any, params: ctypes.Structure, tensor: Any) -> None:
    """Launch on torch's current stream, which is the captured one inside torch.cuda.graph; CPU tensors have none."""
    stream = None
    if tensor.is_cuda:
        import torch

        stream = torch.cuda.current_stream(tensor.device).cuda_stream
    status = function(ctypes.byref(params), stream)
    if status:
        raise RuntimeError(f"the launch failed: CUDA error {status}")


def banded(
    kernels: Kernels, query: Any, key: Any, value: Any, key_mask: Any, index: Any, rows: Any, out: Any, **sizes: int
) -> Any:
    """Run BandedAttention and write its output to `out`, which is returned.

    Args:
        query, key, value, out: (B, S, H·D).
        key_mask: (B, S) int32.
        index: (B, G) int32, positions of the global tokens.
        rows: (B, G, H·D), their context.
        sizes: num_heads and window.
    """
    batch, seqlen, width = query.shape
    heads = sizes["num_heads"]
    tensors = {"query": query, "key": key, "value": value, "key_mask": key_mask, "context": out}
    params = BandedParams(
        **_pointers(**tensors, global_index=index, global_context=rows),
        batch=batch,
        seqlen=seqlen,
        slots=index.shape[1],
        num_heads=heads,
        head_size=width // heads,
        window=sizes["window"],
        dilation=1,
        causal=0,
        scale=(width // heads) ** -0.5,
        type=_type(query),
    )
    _launch(kernels.banded, params, query)
    return out


def global_(kernels: Kernels, query: Any, key: Any, value: Any, key_mask: Any, num_heads: int, scale: float) -> Any:
    """Run GlobalAttention: query (B, G, H·D), key and value (B, S, H·D), key_mask (B, S) int32; returns (B, G, H·D)."""
    batch, queries, width = query.shape
    head_size = width // num_heads
    out = query.new_empty(query.shape)
    scratch = query.new_empty(kernels.workspace_bytes(batch, queries, num_heads, head_size), dtype=_torch().uint8)
    tensors = {"query": query, "key": key, "value": value, "key_mask": key_mask, "context": out}
    params = GlobalParams(
        **_pointers(**tensors, workspace=scratch),
        batch=batch,
        seqlen=key.shape[1],
        queries=queries,
        num_heads=num_heads,
        head_size=head_size,
        scale=scale,
        type=_type(query),
    )
    _launch(kernels.global_, params, query)
    return out


def _torch() -> Any:
    import torch

    return torch


_LOADED: list[Kernels] = []


@functools.cache
def _define_ops() -> None:
    torch = _torch()

    def banded_op(
        query: Any, key: Any, value: Any, key_mask: Any, index: Any, rows: Any, num_heads: int, window: int
    ) -> Any:
        inputs = [x.contiguous() for x in (query, key, value, key_mask, index, rows)]
        out = torch.empty_like(inputs[0])
        return banded(_LOADED[-1], *inputs, out, num_heads=num_heads, window=window)

    def global_op(query: Any, hidden: Any, key_mask: Any, num_heads: int, scale: float) -> Any:
        query, hidden, key_mask = (x.contiguous() for x in (query, hidden, key_mask))
        return global_(_LOADED[-1], query, hidden, hidden, key_mask, num_heads, scale)

    # Explicit schemas: torch cannot infer them from annotations that are strings.
    tensors = "Tensor query, Tensor key, Tensor value, Tensor key_mask, Tensor index, Tensor rows"
    schema = f"({tensors}, int num_heads, int window) -> Tensor"
    banded_custom = torch.library.custom_op("lfx_bench::banded_attention", banded_op, mutates_args=(), schema=schema)
    schema = "(Tensor query, Tensor hidden, Tensor key_mask, int num_heads, float scale) -> Tensor"
    global_custom = torch.library.custom_op("lfx_bench::global_attention", global_op, mutates_args=(), schema=schema)
    for op in (banded_custom, global_custom):
        op.register_fake(lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format))


def register(kernels: Kernels) -> None:
    """Define torch.ops.lfx_bench.banded_attention and global_attention, which run `kernels`, for any device.

    torch.compile does not decompose custom ops, and CUDA graphs capture them.
    """
    _LOADED.append(kernels)
    _define_ops()


# ---- masks --------------------------------------------------------------------------------------------------------


def band_or_global(window: int, globals_: int) -> Callable[..., Any]:
    """Return FlexAttention's mask function: keys at most `window` tokens away, and the first `globals_` keys."""
    if globals_ == 0:
        return lambda batch, head, query, key: (query - key).abs() <= window
    return lambda batch, head, query, key: ((query - key).abs() <= window) | (key < globals_)


# ---- timing -------------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """A function to time.

    Attributes:
        run: enqueues the work of one round.
        calls: number of calls of the measured operation in one round.
        on_host: timed by the host's clock, with a synchronization before and after; otherwise by events on the stream.
    """

    run: Callable[[], Any]
    calls: int = 1
    on_host: bool = False


def capture(run: Callable[[Any], Any], sets: Iterable[Any]) -> tuple[Any, list[Any]]:
    """Capture one CUDA graph of run(s) for all s in `sets`, after a warm-up; returns the graph and the outputs.

    The outputs stay alive during the capture, so that no two calls write to the same memory.
    """
    torch = _torch()
    sets = list(sets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: libraries create handles and workspaces, torch.compile compiles
        for one in [*sets[:1], *sets]:
            run(one)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(one) for one in sets]
    return graph, outputs


def interleaved(contenders: dict[str, Contender], rounds: int, flush: Callable[[], Any]) -> dict[str, list[float]]:
    """Time all contenders, alternating; returns microseconds per call in each round.

    Args:
        flush: enqueued before each contender. It evicts the L2, and keeps the device busy while the host enqueues the
            work, so that the events measure device time without launch latency.
    """
    torch = _torch()
    times: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            flush()
            if contender.on_host:
                torch.cuda.synchronize()
                started = time.perf_counter()
                contender.run()
                torch.cuda.synchronize()
                times[name].append(1e6 * (time.perf_counter() - started) / contender.calls)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contender.run()
            end.record()
            times[name].append((start, end))
    torch.cuda.synchronize()
    for name, measured in times.items():
        calls = contenders[name].calls
        times[name] = [t if isinstance(t, float) else 1e3 * t[0].elapsed_time(t[1]) / calls for t in measured]
    return times


def flusher() -> Callable[[], Any]:
    """Return a function that overwrites the L2."""
    torch = _torch()
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    return scratch.zero_


def rounds_for(contenders: dict[str, Contender], flush: Callable[[], Any], seconds: float, limit: int) -> int:
    """Return the number of rounds that fit into `seconds`, 5 to `limit`, by timing one."""
    torch = _torch()
    interleaved(contenders, 1, flush)
    torch.cuda.synchronize()
    started = time.perf_counter()
    interleaved(contenders, 1, flush)
    return max(5, min(limit, int(seconds / (time.perf_counter() - started))))


def summary(microseconds: list[float]) -> dict[str, float]:
    """Return median, 5th and 95th percentile."""
    p5, p95 = np.percentile(microseconds, [5, 95])
    return {"median_us": statistics.median(microseconds), "p5_us": float(p5), "p95_us": float(p95)}


def ratio(times: list[float], baseline: list[float]) -> float:
    """Return the median over the rounds of time over baseline time."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))


# ---- a benchmark's command ----------------------------------------------------------------------------------------


def parser(doc: str | None, record: str) -> argparse.ArgumentParser:
    """Make a parser with the options of all GPU benchmarks; the record is `record`.jsonl."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="measure the cases of the claims only")
    result.add_argument("--minutes", type=float, default=9.0, help="start no case after this time; default %(default)s")
    result.add_argument("--dry-run", action="store_true", help="build and list the cases; needs no GPU")
    result.add_argument("--library", type=Path, help="use this library instead of building one")
    result.add_argument("--record", type=Path, default=ROOT / "docs" / "records" / f"{record}.jsonl")
    return result


def measure_all(
    cases: Sequence[Any],
    measure: Callable[[Any], dict[str, Any]],
    verdicts: Callable[[Rows], Rows],
    deadline: float,
    record: Path,
) -> Rows:
    """Measure the cases until `deadline` (of time.monotonic); returns a row for each measured one.

    The record, with all rows and their verdicts, is written after each case.
    """
    torch = _torch()
    rows: Rows = []
    record.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for case in cases:
            if time.monotonic() > deadline:
                print(f"time is over: {len(cases) - len(rows)} of {len(cases)} were not started", flush=True)
                break
            rows.append(measure(case))
            record.write_text("".join(json.dumps(row) + "\n" for row in rows + verdicts(rows)), encoding="utf-8")
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def conclude(table: str, verdicts: Rows) -> None:
    """Print table and verdicts and exit, with 1 unless the first verdict, on the errors, holds."""
    print(table)
    for verdict in verdicts:
        word = {True: "HOLDS", False: "FAILS", None: "OPEN "}[verdict["holds"]]
        print(f"{word} {verdict['claim']}: {verdict['figure']}")
    sys.exit(0 if verdicts[0]["holds"] else 1)
