"""What the scripts for a machine with an NVIDIA GPU share: the library, its ops on torch tensors, and the timing."""

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
# From a clone; an installed lfx, which has the plugin library, comes before the clone's.
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "src"))

import numpy as np  # noqa: E402

from lfx.machine import package_versions  # noqa: E402
from lfx.runtime.plugin import TYPES, BandedParams, GlobalParams, Kernels  # noqa: E402

DEVICE = "cuda"
FLUSH_BYTES = 1 << 29  # written before each timing: more than any L2, and time for the host to get ahead
Rows = list[dict[str, Any]]


# ---- the library --------------------------------------------------------------------------------------------------


def build(folder: Path, headers: Path | None, default_target: str = "sm_80") -> Path:
    """The library for this GPU (for `default_target` where there is none to ask); without headers the kernels alone."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not on the PATH; install the CUDA toolkit")
    asked = _ask("compute_cap")
    target = f"sm_{asked.replace('.', '')}" if asked else default_target
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


def _ask(fields: str) -> str:
    """What nvidia-smi says of the first GPU; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else ""


def environment(torch: Any) -> dict[str, Any]:
    """What the record says of the machine."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "gpu": _ask("name,driver_version") or torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "versions": package_versions(("triton", "transformers")),
    }


def machine_code(library: Path) -> dict[str, str] | None:
    """Kernel -> its disassembly, with the compiler's resource line in front; None where cuobjdump is missing."""
    tool = shutil.which("cuobjdump") or next(
        (str(found) for folder in sys.path for found in Path(folder).glob("nvidia/*/bin/cuobjdump")), None
    )
    if tool is None:
        return None
    # It calls nvdisasm, which stands beside it.
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])}

    def run(option: str) -> str:
        return subprocess.run([tool, option, library], check=True, capture_output=True, text=True, env=env).stdout

    resources = dict(re.findall(r"Function (\w+):\s+(REG:.*)", run("--dump-resource-usage")))
    parts = run("-sass").split("Function : ")[1:]
    return {part.split()[0]: f"{resources[part.split()[0]]}\n{part}" for part in parts}


def _instructions(code: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """(address, opcode without suffix) of every instruction, and (from, to) of every branch."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", code)
    jumps = [(at, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in found if name[:3] == "BRA"]
    return (
        [(int(at, 16), name.split(".")[0]) for at, name, _ in found],
        [(int(at, 16), int(to[1], 16)) for at, to in jumps if to is not None],
    )


def straight_runs(code: str) -> list[list[str]]:
    """The opcodes between two branches or branch targets."""
    instructions, jumps = _instructions(code)
    cuts = {to for _, to in jumps} | {at + 16 for at, _ in jumps}
    runs: list[list[str]] = [[]]
    for at, name in instructions:
        if at in cuts:
            runs.append([])
        runs[-1].append(name)
    return [run for run in runs if run]


def require() -> None:
    """Ends the script where there is no GPU."""
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
    """On torch's current stream, which is the capturing one inside torch.cuda.graph; none on the emulated machine."""
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
    """BandedAttention into `out`.

    Args:
        query, key, value, out: (B, S, H·D). key_mask: (B, S) int32. index: (B, G) int32. rows: (B, G, H·D).
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
    """GlobalAttention: query (B, G, H·D), key and value (B, S, H·D), key_mask (B, S) int32; returns (B, G, H·D)."""
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

    # Spelled out, because annotations are strings in this file.
    tensors = "Tensor query, Tensor key, Tensor value, Tensor key_mask, Tensor index, Tensor rows"
    schema = f"({tensors}, int num_heads, int window) -> Tensor"
    of_band = torch.library.custom_op("lfx_bench::banded_attention", banded_op, mutates_args=(), schema=schema)
    schema = "(Tensor query, Tensor hidden, Tensor key_mask, int num_heads, float scale) -> Tensor"
    of_globals = torch.library.custom_op("lfx_bench::global_attention", global_op, mutates_args=(), schema=schema)
    for op in (of_band, of_globals):
        op.register_fake(lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format))


def register(kernels: Kernels) -> None:
    """Make torch.ops.lfx_bench.banded_attention and global_attention run `kernels`, for any device.

    As custom ops they stay whole in torch.compile, and CUDA graphs capture them.
    """
    _LOADED.append(kernels)
    _define_ops()


# ---- masks --------------------------------------------------------------------------------------------------------


def band_or_global(window: int, globals_: int) -> Callable[..., Any]:
    """FlexAttention's mask function: keys at most `window` away, and the first `globals_` keys."""
    if globals_ == 0:
        return lambda batch, head, query, key: (query - key).abs() <= window
    return lambda batch, head, query, key: ((query - key).abs() <= window) | (key < globals_)


# ---- timing -------------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """Something to time.

    Attributes:
        run: enqueues the work of one round; waits for it where `on_host`.
        calls: how many calls of the thing one round is.
        on_host: timed by the host's clock, the device idle before and after; otherwise by events on the stream.
    """

    run: Callable[[], Any]
    calls: int = 1
    on_host: bool = False


def capture(run: Callable[[Any], Any], sets: Iterable[Any]) -> tuple[Any, list[Any]]:
    """One CUDA graph of run(s) for every s in `sets`, after a warm-up; and what each call returned.

    What a call returns stays alive until the graph is whole, so that no two calls write to the same memory.
    """
    torch = _torch()
    sets = list(sets)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their handles and workspaces, and compilers compile, before capture
        for one in [*sets[:1], *sets]:
            run(one)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(one) for one in sets]
    return graph, outputs


def interleaved(contenders: dict[str, Contender], rounds: int, flush: Callable[[], Any]) -> dict[str, list[float]]:
    """Microseconds a call in each round: every contender once a round, in turn.

    Args:
        flush: enqueued before each contender: empties the L2, and keeps the device busy while the host gets ahead, so
            that the time between the events is the device's alone.
    """
    torch = _torch()
    found: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            flush()
            if contender.on_host:
                torch.cuda.synchronize()
                started = time.perf_counter()
                contender.run()
                torch.cuda.synchronize()
                found[name].append(1e6 * (time.perf_counter() - started) / contender.calls)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contender.run()
            end.record()
            found[name].append((start, end))
    torch.cuda.synchronize()
    for name, times in found.items():
        calls = contenders[name].calls
        found[name] = [t if isinstance(t, float) else 1e3 * t[0].elapsed_time(t[1]) / calls for t in times]
    return found


def flusher() -> Callable[[], Any]:
    """Writes more than any L2 holds."""
    torch = _torch()
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    return scratch.zero_


def rounds_for(contenders: dict[str, Contender], flush: Callable[[], Any], seconds: float, most: int) -> int:
    """How many rounds fit into `seconds`, by timing one; 5 at least, `most` at most."""
    torch = _torch()
    interleaved(contenders, 1, flush)
    torch.cuda.synchronize()
    started = time.perf_counter()
    interleaved(contenders, 1, flush)
    return max(5, min(most, int(seconds / (time.perf_counter() - started))))


def summary(microseconds: list[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile."""
    p5, p95 = np.percentile(microseconds, [5, 95])
    return {"median_us": statistics.median(microseconds), "p5_us": float(p5), "p95_us": float(p95)}


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


# ---- a benchmark's command ----------------------------------------------------------------------------------------


def parser(doc: str | None, record: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; the record is `record`.jsonl."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="only what a claim is about")
    found.add_argument("--minutes", type=float, default=9.0, help="begin nothing after this; default %(default)s")
    found.add_argument("--dry-run", action="store_true")
    found.add_argument("--library", type=Path, help="a library that is already built")
    found.add_argument("--record", type=Path, default=ROOT / "docs" / "records" / f"{record}.jsonl")
    return found


def measure_all(
    wanted: Sequence[Any],
    measure: Callable[[Any], dict[str, Any]],
    verdicts: Callable[[Rows], Rows],
    deadline: float,
    record: Path,
) -> Rows:
    """A row for each of `wanted` until `deadline` (of time.monotonic).

    After each row the record is written: all rows so far, and their verdicts.
    """
    torch = _torch()
    rows: Rows = []
    record.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for one in wanted:
            if time.monotonic() > deadline:
                print(f"time is over: {len(wanted) - len(rows)} of {len(wanted)} were not started", flush=True)
                break
            rows.append(measure(one))
            record.write_text("".join(json.dumps(row) + "\n" for row in rows + verdicts(rows)), encoding="utf-8")
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def conclude(table: str, verdicts: Rows) -> None:
    """Print both; the exit status is 1 unless the first verdict, that the numbers are right, holds."""
    print(table)
    for verdict in verdicts:
        word = {True: "HOLDS", False: "FAILS", None: "OPEN "}[verdict["holds"]]
        print(f"{word} {verdict['claim']}: {verdict['figure']}")
    sys.exit(0 if verdicts[0]["holds"] else 1)
