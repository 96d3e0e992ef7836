"""Benchmark BandedAttention against PyTorch's attentions on an NVIDIA GPU, and write docs/records/gpu_kernels.jsonl.

    python -m scripts.bench.gpu_kernels --quick       # the cases of the claims
    python -m scripts.bench.gpu_kernels --minutes 9   # then as many other cases as the time allows
    python -m scripts.bench.gpu_kernels --dry-run     # builds, lists cases and bounds, reads machine code: needs no GPU
    python -m scripts.bench.gpu_kernels --profile     # only launches the first case's kernel three times, for ncu

For each case it first measures all contenders' errors against float64, on the CUDA graph that is timed, with outputs
filled with NaN before; ours may be at most twice the error of plain PyTorch operations in the same dtype. Then all
contenders alternate in one process (A B C A B C). A round replays one CUDA graph of each, which runs once over all
buffer sets; the sets together are larger than twice the L2, which is also flushed before each replay. Times are device
time per call, by CUDA events. huggingface and onnxruntime are called instead of replayed: their times, by the host's
clock, include the launches.

The compared operation is attention of each query over its window and the global keys, with one softmax. The first
tokens of all rows are global, which is the best case for a block mask. The context of the global tokens is an input of
ours (GlobalAttention computes it); the others compute the band rows of these tokens instead, which is cheaper.

    lfx          BandedAttention, (batch, length, heads * size) as a linear layer outputs it
    flex         FlexAttention, compiled, default blocks; (batch, heads, length, size), transposes not timed
    flex-64      the same with blocks of 64 for mask and kernel: fewer masked keys are computed
    sdpa         scaled_dot_product_attention with a dense additive mask, fused kernels only
    huggingface  LongformerSelfAttention's chunk functions in its order, without projections and with precomputed
                 indices of global tokens, by the host's clock: it copies numbers from the host, which no graph captures
    flex-flash   FlexAttention with its FLASH backend
    flash2, flash3, cudnn
                 the band of FlashAttention 2 and 3 and of cuDNN, and a pass for the global keys; see rivals.py
    onnxruntime  com.microsoft::LongformerAttention by the host's clock, projections and global rows included
    copy, matmul a copy of 1 GiB, and a product of two square matrices of 8192: the ceilings

Useful work is two products of head size D for each unmasked (query, key) pair; masked pairs that tiles compute do not
count.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripts import record
from scripts.bench import gpu, rivals, sass, timing
from scripts.bench.band_cases import PEAKS, Case, band_or_global, cases, floors, kernel_costs, least_bytes, useful_flops
from scripts.bench.gpu import Rows
from scripts.bench.launch import Kernels, dtype_of, run_banded
from scripts.bench.timing import Contender

MATMUL, COPY_BYTES = 8192, 1 << 30
FASTER_THAN_FLEX, FASTER_THAN_FLASH, SHARE_OF_MATMUL = 1.3, 1.0, 0.5  # the claims
SDPA_MASK_LIMIT = 1 << 30  # bytes of the dense mask
EAGER_LIMIT = 8 << 30  # bytes of Hugging Face's scores
EAGER_BYTES = 24  # per score: diagonals, columns and probabilities in the dtype, softmax in float32, padded copies
SECONDS_PER_CASE, MOST_ROUNDS, MAX_SETS = 2.0, 50, 40


# ---- contenders ---------------------------------------------------------------------------------------------------


def visible(case: Case, queries: Any, keys: Any) -> Any:
    """Return the attention mask of local queries, (queries, keys) bool."""
    return band_or_global(case.window, case.globals)(0, 0, queries[:, None], keys[None, :])


def plain(case: Case, q: Any, k: Any, v: Any, block: int = 512) -> Any:
    """Compute the band rows block by block with plain PyTorch operations in q's dtype, softmax in float32 or float64.

    In float64 it is the reference, in another dtype the witness.
    """
    import torch

    q, k, v = (x.unflatten(2, (case.heads, case.head_size)).transpose(1, 2) for x in (q, k, v))
    out = torch.empty_like(q)
    positions = torch.arange(case.seqlen, device=q.device)
    for first in range(0, case.seqlen, block):
        queries = positions[first : first + block]
        keys = positions[max(first - case.window, case.globals) : first + block + case.window]
        keys = torch.cat([positions[: case.globals], keys])
        scores = q[:, :, queries] @ k[:, :, keys].transpose(2, 3) * case.head_size**-0.5
        scores = scores.masked_fill(~visible(case, queries, keys), -torch.inf)
        softmax_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out[:, :, queries] = scores.softmax(-1, dtype=softmax_dtype).to(q.dtype) @ v[:, :, keys]
    return out.transpose(1, 2).flatten(2)


def flex(case: Case, device: str, block: int = 128, options: dict[str, Any] | None = None) -> Callable[[Any], Any]:
    """Make FlexAttention with a block mask, which is not timed, and options of its kernel; compiled on a GPU."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask_function = band_or_global(case.window, case.globals)
    mask = create_block_mask(mask_function, None, None, case.seqlen, case.seqlen, device=device, BLOCK_SIZE=block)
    # The kernel's block size must divide the mask's.
    options = options if block == 128 else {"BLOCK_M": block, "BLOCK_N": block}
    attend = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    return lambda s: attend(s.q4, s.k4, s.v4, block_mask=mask, kernel_options=options)


def sdpa(case: Case, device: str, dtype: Any) -> Callable[[Any], Any]:
    """Make scaled_dot_product_attention with a dense additive mask; on a GPU only fused kernels are allowed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    positions = torch.arange(case.seqlen, device=device)
    mask = torch.zeros((1, 1, case.seqlen, case.seqlen), dtype=dtype, device=device)
    for first in range(0, case.seqlen, 1024):
        masked = ~visible(case, positions[first : first + 1024], positions)
        mask[0, 0, first : first + 1024].masked_fill_(masked, -torch.inf)
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

    def run(s: Any) -> Any:
        with sdpa_kernel(backends) if device == "cuda" else contextlib.nullcontext():
            return scaled_dot_product_attention(s.q4, s.k4, s.v4, attn_mask=mask)

    return run


def huggingface(case: Case, device: str) -> Callable[[Any], Any]:
    """Make the part of LongformerSelfAttention.forward between projections and global rows, from its own functions."""
    import torch
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    hidden = case.heads * case.head_size
    config = LongformerConfig(
        hidden_size=hidden, num_attention_heads=case.heads, attention_window=[2 * case.window], num_hidden_layers=1
    )
    with torch.device("meta"):
        module = LongformerSelfAttention(config, layer_id=0).eval()
    is_global = torch.zeros((case.batch, case.seqlen), dtype=torch.bool, device=device)
    is_global[:, : case.globals] = True
    is_masked = torch.zeros_like(is_global)
    count, *slot_indices = module._get_global_attn_indices(is_global)
    indices = (int(count), *slot_indices) if case.globals else None
    return lambda s: _chunked(module, s.q, s.k, s.v, is_masked, is_global, indices)


def _chunked(module: Any, q: Any, k: Any, v: Any, is_masked: Any, is_global: Any, indices: Any) -> Any:
    import torch

    heads, window = module.num_heads, module.one_sided_attn_window_size
    q, k, v = (x.unflatten(2, (heads, module.head_dim)) for x in (q / math.sqrt(module.head_dim), k, v))
    scores = module._sliding_chunks_query_key_matmul(q, k, window)
    removed = (is_global | is_masked)[:, :, None, None]
    bias = removed.type_as(q).masked_fill(removed, torch.finfo(q.dtype).min)
    scores += module._sliding_chunks_query_key_matmul(bias.new_ones(size=bias.size()), bias, window)
    if indices is not None:
        count, positions, used_slots, unused_slots = indices
        global_scores = module._concat_with_global_key_attn_probs(k, q, count, positions, used_slots, unused_slots)
        scores = torch.cat((global_scores, scores), dim=-1)
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    weights = torch.masked_fill(weights, is_masked[:, :, None, None], 0.0).type_as(scores)
    if indices is not None:
        context = module._compute_attn_output_with_global_indices(v, weights, count, positions, used_slots)
    else:
        context = module._sliding_chunks_matmul_attn_probs_value(weights, v, window)
    batch, seqlen = is_global.shape
    return context.transpose(0, 1).reshape(seqlen, batch, -1).contiguous().transpose(0, 1)


def lfx(case: Case, kernels: Kernels, device: str, dtype: Any) -> tuple[Callable[[Any], Any], Any]:
    """Make BandedAttention; returns it, and its input global_context (batch, slots, heads * size)."""
    import torch

    slots = max(case.globals, 1)
    index = torch.arange(slots, dtype=torch.int32, device=device) if case.globals else torch.tensor([-1])
    index = index.to(device, torch.int32).repeat(case.batch, 1)
    mask = torch.ones((case.batch, case.seqlen), dtype=torch.int32, device=device)
    rows = torch.randn((case.batch, slots, case.heads * case.head_size), dtype=dtype, device=device)
    shared = {"key_mask": mask, "global_index": index, "global_context": rows}

    def run(s: Any) -> Any:
        inputs = {"query": s.q, "key": s.k, "value": s.v, **shared}
        return run_banded(kernels, inputs, s.out, num_heads=case.heads, window=case.window)

    return run, rows


def skipped(case: Case) -> dict[str, str]:
    """Return the contenders that are skipped in this case, and the reasons; memory is estimated, not allocated."""
    reasons = {}
    mask = 2 * case.seqlen**2
    if mask > SDPA_MASK_LIMIT:
        reasons["sdpa"] = f"a dense mask of {mask / 1e9:.1f} GB is above {SDPA_MASK_LIMIT / 1e9:.1f}"
    scores = EAGER_BYTES * case.batch * case.heads * case.seqlen * (2 * case.window + 1 + case.globals)
    if scores > EAGER_LIMIT:
        reasons["huggingface"] = f"scores of about {scores / 1e9:.0f} GB are above {EAGER_LIMIT / 1e9:.1f}"
    if not case.required:
        reasons["flex-64"] = "only where a claim is about the case"
    return reasons


def flattened(out: Any) -> Any:
    """Reshape a contender's output to (batch, length, heads * size)."""
    return out.transpose(1, 2).flatten(2) if out.dim() == 4 else out


# ---- one case on the GPU ------------------------------------------------------------------------------------------


def buffer_sets(case: Case, l2_bytes: int, device: str, dtype: Any) -> list[SimpleNamespace]:
    """Make sets of random inputs, together larger than twice the L2: q, k, v, out, and q4, k4, v4 per head."""
    import torch

    count = max(2, min(MAX_SETS, math.ceil(2 * l2_bytes / least_bytes(case))))
    shape = (case.batch, case.seqlen, case.heads * case.head_size)
    sets = []
    for _ in range(count):
        flat = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]
        by_head = [x.unflatten(2, (case.heads, case.head_size)).transpose(1, 2).contiguous() for x in flat]
        names = ("q", "k", "v", "q4", "k4", "v4")
        sets.append(SimpleNamespace(**dict(zip(names, [*flat, *by_head], strict=True)), out=torch.empty_like(flat[0])))
    return sets


def ceilings(dtype: Any) -> dict[str, Contender]:
    """Make the contenders that measure attainable rates: a copy and a large matrix product, on random numbers."""
    import torch

    a, b = (torch.randn((MATMUL, MATMUL), dtype=dtype, device=timing.DEVICE) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=timing.DEVICE)
    target = torch.empty_like(source)
    return {
        "matmul": Contender(lambda: torch.mm(a, b, out=product)),
        "copy": Contender(lambda: target.copy_(source)),
    }


def measure(case: Case, kernels: Kernels, ceiling: dict[str, Contender], l2_bytes: int) -> dict[str, Any]:
    """Measure errors and times of one case; returns the row of the record."""
    import torch

    torch._dynamo.reset()  # each case compiles for its own shape
    device, dtype = timing.DEVICE, dtype_of(case.precision)
    sets = buffer_sets(case, l2_bytes, device, dtype)
    ours, global_context = lfx(case, kernels, device, dtype)
    make: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "lfx": lambda: ours,
        "flex": lambda: flex(case, device),
        "flex-64": lambda: flex(case, device, block=64),
        "sdpa": lambda: sdpa(case, device, dtype),
        "huggingface": lambda: huggingface(case, device),
    }
    for name in rivals.MODULES:
        make[name] = functools.partial(rivals.maker, name, case, device, flex)
    first = sets[0]
    reference = plain(case, first.q.double(), first.k.double(), first.v.double())
    local = slice(case.globals, None)
    left_out = skipped(case) | rivals.missing(case)
    results: dict[str, dict[str, Any]] = {name: {"skipped": reason} for name, reason in left_out.items()}
    contenders: dict[str, Contender] = dict(ceiling)
    witness = _error(plain(case, first.q, first.k, first.v), reference, local)
    for name, maker in make.items():
        if name in results:
            continue
        try:
            if name == "huggingface":
                run = maker()
                results[name] = {"max_error": _error(run(first), reference, local)}
                contenders[name] = Contender(functools.partial(run_all, run, sets), len(sets), on_host=True)
                continue
            graph, outputs = timing.capture(maker(), sets)
            for out in outputs:
                out.fill_(float("nan"))
            graph.replay()
            results[name] = {"max_error": _error(outputs[0], reference, local)}
            contenders[name] = Contender(graph.replay, len(sets))
            if name == "lfx":
                kept = torch.equal(flattened(outputs[0])[:, : case.globals], global_context[:, : case.globals])
                written = all(bool(torch.isfinite(out).all()) for out in outputs)
                results[name]["global_rows_kept"], results[name]["all_written"] = kept, written
            del outputs
        except Exception as error:  # one contender that fails must not end the run
            results[name] = failed(error)
    if "onnxruntime" not in results:
        try:
            contenders["onnxruntime"], out, projected = rivals.onnxruntime_contender(case, first)
            exact = plain(case, *projected)
            rounded = plain(case, *(x.to(dtype) for x in projected))
            results["onnxruntime"] = {
                "max_error": _error(out, exact, local),
                "witness_error": _error(rounded, exact, local),  # projections are rounded too
            }
        except Exception as error:
            results["onnxruntime"] = failed(error)
    del reference
    rounds, times = timing.measure(contenders, SECONDS_PER_CASE, MOST_ROUNDS)
    for name, measured in times.items():
        results.setdefault(name, {}).update(measured)
    return {**asdict(case), "rounds": rounds, "buffer_sets": len(sets), "witness_error": witness, "contenders": results}


def run_all(run: Callable[[Any], Any], sets: Sequence[Any]) -> None:
    """Run a function over all buffer sets."""
    for one in sets:
        run(one)


def failed(error: Exception) -> dict[str, str]:
    """Return the result of a contender that could not be made."""
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _error(out: Any, reference: Any, local: slice) -> float:
    """Return the largest absolute error of the local rows; infinity if one is NaN."""
    error = float((flattened(out)[:, local].double() - reference[:, local]).abs().max())
    return math.inf if math.isnan(error) else error


# ---- what the rows say --------------------------------------------------------------------------------------------


def case_of(row: dict[str, Any]) -> Case:
    """Return the case of a row."""
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def passed(row: dict[str, Any]) -> bool:
    """Return whether ours is in tolerance: all rows written, and an error at most twice PyTorch's in the same dtype."""
    ours = row["contenders"].get("lfx", {})
    complete = ours.get("global_rows_kept") is True and ours.get("all_written") is True
    return complete and ours["max_error"] <= 2 * row["witness_error"]


def rates(row: dict[str, Any]) -> dict[str, float]:
    """Return our useful TFLOP/s, and its share of the measured product's, of the copy's, and of the larger share."""
    case, results = case_of(row), row["contenders"]
    seconds = results["lfx"]["median_us"] / 1e6
    product = 2 * MATMUL**3 / (results["matmul"]["median_us"] / 1e6)
    copy = 2 * COPY_BYTES / (results["copy"]["median_us"] / 1e6)
    of_product, of_copy = useful_flops(case) / seconds / product, least_bytes(case) / seconds / copy
    return {
        "tflops": useful_flops(case) / seconds / 1e12,
        "of_matmul": of_product,
        "of_copy": of_copy,
        "of_ceiling": max(of_product, of_copy),
        # The claim counts the band only: at most 2 * window + 1 keys per query, without the global key.
        "band_of_matmul": useful_flops(replace(case, globals=0)) / seconds / product,
    }


def least_ratio(row: dict[str, Any], names: Sequence[str]) -> float | None:
    """Return our speed relative to the fastest of some contenders; None if none of them ran."""
    ratios = [row["contenders"].get(name, {}).get("times_slower") for name in names]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def disagreeing(row: dict[str, Any]) -> list[str]:
    """Return the other contenders whose error is above twice that of plain PyTorch operations.

    All compute the same numbers: one that disagrees is wrong itself, several mean that the reference may be wrong.
    """
    return [
        name
        for name, result in row["contenders"].items()
        if name != "lfx" and result.get("max_error", 0.0) > 2 * result.get("witness_error", row["witness_error"])
    ]


OTHERS = ("flex", "flex-64", "sdpa", "huggingface", *rivals.NAMES)
HEADER = ["case", "right", "lfx µs (p5-p95)", "TFLOP/s", "of matmul", "of ceiling", *OTHERS]


def table_row(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row; a contender's cell is its time relative to ours, or the reason for no time."""
    results, name = row["contenders"], str(case_of(row))
    if "median_us" not in results.get("lfx", {}):
        return [name, "NO", results.get("lfx", {}).get("failed", "not run"), *["-"] * (len(HEADER) - 3)]
    ours, rate = results["lfx"], rates(row)
    line = [name, "yes" if passed(row) else "NO"]
    line.append(f"{ours['median_us']:.1f} ({ours['p5_us']:.1f}-{ours['p95_us']:.1f})")
    line += [f"{rate['tflops']:.0f}", f"{rate['of_matmul']:.0%}", f"{rate['of_ceiling']:.0%}"]
    for other in OTHERS:
        result = results.get(other, {})
        words = "failed" if "failed" in result else "skipped" if "skipped" in result else "-"
        line.append(f"{result['times_slower']:.2f}x" if "times_slower" in result else words)
    return line


def table(rows: Rows) -> str:
    """Make a Markdown table of all rows."""
    lines = [HEADER, ["---"] * len(HEADER), *map(table_row, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def verdicts(rows: Rows) -> Rows:
    """Return for each claim whether it holds (None = no case was measured), and the measured figure."""
    timed = [row for row in rows if "median_us" in row["contenders"].get("lfx", {})]
    required = [row for row in timed if case_of(row).required]
    wrong = [str(case_of(row)) for row in rows if not passed(row)]
    results = [
        {
            "claim": "every case is right to twice PyTorch's own error in the same type against float64",
            "holds": not wrong if rows else None,
            "figure": f"{len(rows) - len(wrong)} of {len(rows)} cases",
            "worst": wrong[0] if wrong else None,
        }
    ]
    flex_names, flash_names = ("flex", "flex-64"), ("flex-flash",)
    ratios = [(value, row) for row in required if (value := least_ratio(row, flex_names)) is not None]
    flash_ratios = [(value, row) for row in required if (value := least_ratio(row, flash_names)) is not None]
    shares = [(rates(row)["band_of_matmul"], row) for row in required if row["batch"] == 8]
    claims = (
        (f"{FASTER_THAN_FLEX} times FlexAttention at 4,096 tokens and more", FASTER_THAN_FLEX, ratios, "{:.2f} times"),
        (f"{SHARE_OF_MATMUL:.0%} of the measured dense product, batch 8", SHARE_OF_MATMUL, shares, "{:.1%}"),
    )
    flash_claim = f"{FASTER_THAN_FLASH} times its FLASH backend at 4,096 tokens and more"
    claims = (*claims, (flash_claim, FASTER_THAN_FLASH, flash_ratios, "{:.2f} times"))
    for claim, threshold, measured, unit in claims:
        least, row = min(measured, key=lambda pair: pair[0], default=(None, None))
        verdict = {"claim": f"window 256, one global: {claim}", "holds": None, "figure": "not measured", "worst": None}
        if least is not None and row is not None:
            figure = f"{unit.format(least)} at worst, {len(measured)} cases"
            verdict.update(holds=least >= threshold, figure=figure, worst=str(case_of(row)))
        results.append(verdict)
    return results


# ---- the command --------------------------------------------------------------------------------------------------


def main() -> None:
    """Build the library, measure all cases and write the record; exits with 1 if an error is out of tolerance."""
    parser = gpu.parser(__doc__, "gpu_kernels")
    parser.add_argument("--profile", action="store_true", help="launch our kernel three times, and measure nothing")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        library = options.library or gpu.build(Path(folder), None, "sm_90")
        print(f"library: {library.name}", flush=True)
        if options.dry_run:
            dry_run(library, cases(options.quick))
            return
        if options.profile:
            gpu.require()
            launch_for_profile(Kernels(library), cases(quick=True)[0])
            return
        deadline = started + 60 * options.minutes
        rows = run(library, cases(options.quick), deadline, options.record, options.resume)
    gpu.conclude(table(rows), verdicts(rows))


def run(library: Path, selected: list[Case], deadline: float, path: Path, resume: bool = False) -> Rows:
    """Measure the cases on the GPU; see gpu.measure_all."""
    import torch

    gpu.require()
    kernels, about = Kernels(library), record.gpu_environment(torch)
    l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    peaks = next((peaks for name, peaks in PEAKS.items() if name in about["gpu"]), None)
    ceilings_of: dict[str, dict[str, Contender]] = {}

    def measure_one(case: Case) -> dict[str, Any]:
        if case.precision not in ceilings_of:
            ceilings_of.clear()  # free the memory of the other dtype's
            ceilings_of[case.precision] = ceilings(dtype_of(case.precision))
        row = {**about, **measure(case, kernels, ceilings_of[case.precision], l2_bytes), **kernel_costs(case)}
        row |= {"useful_flops": useful_flops(case), "least_bytes": least_bytes(case), "passed": passed(row)}
        row["disagreeing"] = disagreeing(row)
        row |= {"floors": floors(case, peaks)} if peaks is not None else {}
        row |= {"rates": rates(row)} if "median_us" in row["contenders"]["lfx"] else {}
        print(" | ".join(table_row(row)), flush=True)
        return row

    done = gpu.resumed(path, about) if resume else None
    return gpu.measure_all(selected, measure_one, verdicts, deadline, path, done, case_of)


def launch_for_profile(kernels: Kernels, case: Case) -> None:
    """Launch our kernel three times."""
    dtype = dtype_of(case.precision)
    run, _ = lfx(case, kernels, timing.DEVICE, dtype)
    run_all(run, 3 * buffer_sets(case, 1, timing.DEVICE, dtype)[:1])


def dry_run(library: Path, selected: list[Case]) -> None:
    """Print the cases with their work and lower bounds, and the kernel's resources from its machine code."""
    peaks = PEAKS["NVIDIA H100 80GB HBM3"]
    print("useful GFLOP, MB of least traffic, µs at the H100's published rates: arithmetic, bytes, exponentials, and")
    print("shared memory as this kernel uses it; then pairs computed over useful ones, and MB through the L2")
    for case in selected:
        floor, cost = floors(case, peaks), kernel_costs(case)
        line = f"{case}: {useful_flops(case) / 1e9:.2f} GFLOP, {least_bytes(case) / 1e6:.1f} MB; "
        line += ", ".join(f"{value:.1f}" for value in floor.values())
        line += f"; {cost['computed_over_useful']:.3f}, {cost['l2_bytes'] / 1e6:.0f} MB"
        print(line + "".join(f"; {name} skipped: {why}" for name, why in skipped(case).items() if name != "flex-64"))
    for name, why in rivals.missing(selected[0]).items():
        print(f"{name} would be skipped on this machine: {why}")
    print(code_report(library))
    print(f"dry run: {len(selected)} cases listed, nothing was run on a GPU")


def code_report(library: Path) -> str:
    """Return registers and instructions of the kernel of 128 queries a block, head size 64, float16, as text."""
    if sass.TOOL is None:
        return "machine code: not read, cuobjdump is not installed"
    name = "bandedAttentionTensorCoresI6__halfLi64ELi2E"
    key, code = next(item for item in sass.machine_code(library).items() if name in item[0][1])
    resources = sass.resources(library)[key]
    runs = sass.straight_runs(code)
    products = sorted((run for run in runs if "HMMA" in run), key=lambda run: run.count("HMMA"))
    scores, context = sorted(products[-2:], key=len)  # those before are for few global tokens
    copies = [len(run) for run in runs if run.count("LDGSTS") == 8]

    def described(run: list[str]) -> str:
        names = ", ".join(f"{count} {name}" for name, count in Counter(run).most_common(10))
        return f"{len(run)} instructions: {names}"

    used = ", ".join(f"{count} {name}" for name, count in resources.items())
    return (
        f"machine code of {key[0]}, 128 queries, head size 64, float16: {used}; "
        f"{65536 // (128 * (-(-resources['REG'] // 8) * 8))} blocks of 128 threads per multiprocessor by registers\n"
        f"  scores of 32 queries and 32 keys, per warp: {described(scores)}\n"
        f"  their weights and context: {described(context)}\n"
        f"  the 8 asynchronous copies of a tile of the band, a thread: {min(copies)} to {max(copies)} instructions\n"
    )


if __name__ == "__main__":
    main()
