"""Time BandedAttention beside what PyTorch offers, on an NVIDIA GPU, and write docs/records/gpu_kernels.jsonl.

    python scripts/bench_kernels.py --quick       # the cases that the claims are about
    python scripts/bench_kernels.py --minutes 9   # and then as many of the others as the time allows
    python scripts/bench_kernels.py --dry-run     # builds, lists cases and floors, reads the machine code: needs no GPU

It builds the library, then takes the cases one by one. Each is checked first: every contender's error against float64,
on the graph that is timed, its output poisoned with NaN; ours may be at most twice that of plain PyTorch operations in
the same type. Then all contenders take turns in one process (A B C A B C): a round replays one CUDA graph of each,
which goes once over every buffer set; together the sets are larger than twice the L2, which is also emptied before
each replay. Figures are device time by CUDA events, per call.

What is compared: queries over their window and the global keys, one softmax. Global tokens are the first ones, in
every row alike, which is the best case for a block mask. The rows of the global tokens themselves are inputs to ours
(GlobalAttention makes them); the others compute their band rows in that place, which is the cheaper thing to do.

    lfx          BandedAttention, (batch, length, heads * size) as a linear layer leaves it
    flex         FlexAttention, compiled, its own default blocks; (batch, heads, length, size), no transpose counted
    flex-64      the same with blocks of 64 for mask and kernel: fewer hidden keys computed
    sdpa         scaled_dot_product_attention with the mask as a dense additive tensor, fused kernels only
    huggingface  LongformerSelfAttention's own chunk functions in its order, without projections; its indices of global
                 tokens are found beforehand, so that it fits into a graph: Hugging Face without its launch gaps
    copy, matmul a copy of 1 GiB, and a product of two square matrices of 8192: the ceilings

Useful work: two products of head size D for each pair of a query and a key that it sees; what tiles compute beyond
that gets no credit.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
from band_cases import PEAKS, Case, cases, floors, kernel_costs, least_bytes, useful_flops
from gpu import Contender, Rows

from lfx.runtime.plugin import Kernels

MATMUL, COPY_BYTES = 8192, 1 << 30
FASTER_THAN_FLEX, SHARE_OF_MATMUL = 1.3, 0.5  # the claims
SDPA_MASK_LIMIT = 1 << 30  # bytes of the dense mask
EAGER_LIMIT = 8 << 30  # bytes of Hugging Face's scores
EAGER_BYTES = 24  # a score: diagonals, columns and probabilities in the type, softmax in float32, padded copies
SECONDS_A_CASE, MOST_ROUNDS, MOST_SETS = 2.0, 50, 40


# ---- contenders ---------------------------------------------------------------------------------------------------


def visible(case: Case, queries: Any, keys: Any) -> Any:
    """(queries, keys) booleans: whether a local query sees a key."""
    return gpu.band_or_global(case.window, case.globals)(0, 0, queries[:, None], keys[None, :])


def plain(case: Case, q: Any, k: Any, v: Any, block: int = 512) -> Any:
    """The band rows by plain PyTorch operations in the type of q, softmax in float32 at least, block by block.

    In float64 it is what the errors are measured against, in another type the witness.
    """
    import torch

    q, k, v = (x.unflatten(2, (case.heads, case.head_size)).transpose(1, 2) for x in (q, k, v))
    out = torch.empty_like(q)
    at = torch.arange(case.seqlen, device=q.device)
    for first in range(0, case.seqlen, block):
        queries = at[first : first + block]
        keys = at[max(first - case.window, case.globals) : first + block + case.window]
        keys = torch.cat([at[: case.globals], keys])
        scores = q[:, :, queries] @ k[:, :, keys].transpose(2, 3) * case.head_size**-0.5
        scores = scores.masked_fill(~visible(case, queries, keys), -torch.inf)
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        out[:, :, queries] = scores.softmax(-1, dtype=kind).to(q.dtype) @ v[:, :, keys]
    return out.transpose(1, 2).flatten(2)


def flex(case: Case, device: str, block: int = 128) -> Callable[[Any], Any]:
    """FlexAttention with a block mask, which is made here and not timed; compiled on a GPU."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    see = gpu.band_or_global(case.window, case.globals)
    mask = create_block_mask(see, None, None, case.seqlen, case.seqlen, device=device, BLOCK_SIZE=block)
    # Blocks of the kernel must divide those of the mask.
    options = None if block == 128 else {"BLOCK_M": block, "BLOCK_N": block}
    attend = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    return lambda s: attend(s.q4, s.k4, s.v4, block_mask=mask, kernel_options=options)


def sdpa(case: Case, device: str, dtype: Any) -> Callable[[Any], Any]:
    """scaled_dot_product_attention with a dense additive mask; on a GPU the unfused fallback is refused."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    at = torch.arange(case.seqlen, device=device)
    mask = torch.zeros((1, 1, case.seqlen, case.seqlen), dtype=dtype, device=device)
    for first in range(0, case.seqlen, 1024):
        hidden = ~visible(case, at[first : first + 1024], at)
        mask[0, 0, first : first + 1024].masked_fill_(hidden, -torch.inf)
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

    def run(s: Any) -> Any:
        with sdpa_kernel(backends) if device == "cuda" else contextlib.nullcontext():
            return scaled_dot_product_attention(s.q4, s.k4, s.v4, attn_mask=mask)

    return run


def huggingface(case: Case, device: str) -> Callable[[Any], Any]:
    """What LongformerSelfAttention.forward does between its projections and its global rows, by its own functions."""
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
    count, at, used, unused = module._get_global_attn_indices(is_global)
    found = (int(count), at, used, unused)
    return lambda s: _chunked(module, s.q, s.k, s.v, is_masked, is_global, found if case.globals else None)


def _chunked(module: Any, q: Any, k: Any, v: Any, is_masked: Any, is_global: Any, found: Any) -> Any:
    import torch

    heads, window = module.num_heads, module.one_sided_attn_window_size
    q, k, v = (x.unflatten(2, (heads, module.head_dim)) for x in (q / math.sqrt(module.head_dim), k, v))
    scores = module._sliding_chunks_query_key_matmul(q, k, window)
    removed = (is_global | is_masked)[:, :, None, None]
    bias = removed.type_as(q).masked_fill(removed, torch.finfo(q.dtype).min)
    scores += module._sliding_chunks_query_key_matmul(bias.new_ones(size=bias.size()), bias, window)
    if found is not None:
        count, at, used, unused = found
        of_globals = module._concat_with_global_key_attn_probs(k, q, count, at, used, unused)
        scores = torch.cat((of_globals, scores), dim=-1)
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    weights = torch.masked_fill(weights, is_masked[:, :, None, None], 0.0).type_as(scores)
    if found is not None:
        context = module._compute_attn_output_with_global_indices(v, weights, count, at, used)
    else:
        context = module._sliding_chunks_matmul_attn_probs_value(weights, v, window)
    batch, seqlen = is_global.shape
    return context.transpose(0, 1).reshape(seqlen, batch, -1).contiguous().transpose(0, 1)


def lfx(case: Case, kernels: Kernels, device: str, dtype: Any) -> tuple[Callable[[Any], Any], Any]:
    """BandedAttention, and the rows that it is given for the global tokens, (batch, slots, heads * size)."""
    import torch

    slots = max(case.globals, 1)
    index = torch.arange(slots, dtype=torch.int32, device=device) if case.globals else torch.tensor([-1])
    index = index.to(device, torch.int32).repeat(case.batch, 1)
    mask = torch.ones((case.batch, case.seqlen), dtype=torch.int32, device=device)
    rows = torch.randn((case.batch, slots, case.heads * case.head_size), dtype=dtype, device=device)
    sizes = {"num_heads": case.heads, "window": case.window}
    return (lambda s: gpu.banded(kernels, s.q, s.k, s.v, mask, index, rows, s.out, **sizes)), rows


def skipped(case: Case) -> dict[str, str]:
    """Contenders that this case leaves out, and why; by bytes, before anything is allocated."""
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


def dtype_of(precision: str) -> Any:
    """torch's name for it."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def flattened(out: Any) -> Any:
    """(batch, length, heads * size) of what a contender returns."""
    return out.transpose(1, 2).flatten(2) if out.dim() == 4 else out


# ---- one case on the GPU ------------------------------------------------------------------------------------------


def buffer_sets(case: Case, l2_bytes: int, device: str, dtype: Any) -> list[SimpleNamespace]:
    """Fresh random inputs, as many as are larger than twice the L2: q, k, v, out, and q4, k4, v4 by head."""
    import torch

    count = max(2, min(MOST_SETS, math.ceil(2 * l2_bytes / least_bytes(case))))
    shape = (case.batch, case.seqlen, case.heads * case.head_size)
    found = []
    for _ in range(count):
        flat = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]
        by_head = [x.unflatten(2, (case.heads, case.head_size)).transpose(1, 2).contiguous() for x in flat]
        names = ("q", "k", "v", "q4", "k4", "v4")
        found.append(SimpleNamespace(**dict(zip(names, [*flat, *by_head], strict=True)), out=torch.empty_like(flat[0])))
    return found


def ceilings(dtype: Any) -> dict[str, Contender]:
    """A plain copy and a plain large product, on random numbers."""
    import torch

    a, b = (torch.randn((MATMUL, MATMUL), dtype=dtype, device=gpu.DEVICE) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=gpu.DEVICE)
    target = torch.empty_like(source)
    return {
        "matmul": Contender(lambda: torch.mm(a, b, out=product)),
        "copy": Contender(lambda: target.copy_(source)),
    }


def measure(case: Case, kernels: Kernels, plain_rates: dict[str, Contender], l2_bytes: int) -> dict[str, Any]:
    """Check and time one case; the row of the record."""
    import torch

    torch._dynamo.reset()  # each case compiles for its own shape
    device, dtype = gpu.DEVICE, dtype_of(case.precision)
    sets = buffer_sets(case, l2_bytes, device, dtype)
    ours, given = lfx(case, kernels, device, dtype)
    make: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "lfx": lambda: ours,
        "flex": lambda: flex(case, device),
        "flex-64": lambda: flex(case, device, block=64),
        "sdpa": lambda: sdpa(case, device, dtype),
        "huggingface": lambda: huggingface(case, device),
    }
    first = sets[0]
    exact = plain(case, first.q.double(), first.k.double(), first.v.double())
    local = slice(case.globals, None)
    results: dict[str, dict[str, Any]] = {name: {"skipped": why} for name, why in skipped(case).items()}
    racing: dict[str, Contender] = dict(plain_rates)
    witness = _error(plain(case, first.q, first.k, first.v), exact, local)
    for name, maker in make.items():
        if name in results:
            continue
        try:
            graph, outputs = gpu.capture(maker(), sets)
            for out in outputs:
                out.fill_(float("nan"))
            graph.replay()
            results[name] = {"max_error": _error(outputs[0], exact, local)}
            racing[name] = Contender(graph.replay, len(sets))
            if name == "lfx":
                kept = torch.equal(flattened(outputs[0])[:, : case.globals], given[:, : case.globals])
                written = all(bool(torch.isfinite(out).all()) for out in outputs)
                results[name]["global_rows_kept"], results[name]["all_written"] = kept, written
            del outputs
        except Exception as error:  # one contender that fails must not end the run
            results[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    del exact
    flush = gpu.flusher()
    rounds = gpu.rounds_for(racing, flush, SECONDS_A_CASE, MOST_ROUNDS)
    times = gpu.interleaved(racing, rounds, flush)
    for name, found in times.items():
        results.setdefault(name, {}).update(gpu.summary(found))
        if name not in plain_rates and "lfx" in times:
            results[name]["times_slower"] = gpu.ratio(found, times["lfx"])
    return {**asdict(case), "rounds": rounds, "buffer_sets": len(sets), "witness_error": witness, "contenders": results}


def _error(out: Any, exact: Any, local: slice) -> float:
    """Largest absolute error of the local rows; infinite where any is not a number."""
    found = float((flattened(out)[:, local].double() - exact[:, local]).abs().max())
    return math.inf if math.isnan(found) else found


# ---- what the rows say --------------------------------------------------------------------------------------------


def case_of(row: dict[str, Any]) -> Case:
    """The case of a row."""
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def passed(row: dict[str, Any]) -> bool:
    """Whether ours is right: everything written, and an error at most twice that of PyTorch in the same type."""
    ours = row["contenders"].get("lfx", {})
    whole = ours.get("global_rows_kept") is True and ours.get("all_written") is True
    return whole and ours["max_error"] <= 2 * row["witness_error"]


def rates(row: dict[str, Any]) -> dict[str, float]:
    """Ours in a row: useful TFLOP/s, and shares of the measured product, of the copy, and of the nearer of the two."""
    case, found = case_of(row), row["contenders"]
    seconds = found["lfx"]["median_us"] / 1e6
    product = 2 * MATMUL**3 / (found["matmul"]["median_us"] / 1e6)
    copy = 2 * COPY_BYTES / (found["copy"]["median_us"] / 1e6)
    of_product, of_copy = useful_flops(case) / seconds / product, least_bytes(case) / seconds / copy
    return {
        "tflops": useful_flops(case) / seconds / 1e12,
        "of_matmul": of_product,
        "of_copy": of_copy,
        "of_ceiling": max(of_product, of_copy),
        # The claim counts the band alone: at most 2 * window + 1 keys a query, and no global key.
        "band_of_matmul": useful_flops(replace(case, globals=0)) / seconds / product,
    }


def flex_ratio(row: dict[str, Any]) -> float | None:
    """How many times as fast as the faster of FlexAttention's two; None where none of them ran."""
    found = [row["contenders"].get(name, {}).get("times_slower") for name in ("flex", "flex-64")]
    return min((x for x in found if x is not None), default=None)


HEADER = ["case", "right", "lfx µs (p5-p95)", "TFLOP/s", "of matmul", "of ceiling", "flex", "flex-64", "sdpa", "hf"]


def table_row(row: dict[str, Any]) -> list[str]:
    """One line of the table; a contender's column is how many times slower it is, or why there is no figure."""
    found, name = row["contenders"], str(case_of(row))
    if "median_us" not in found.get("lfx", {}):
        return [name, "NO", found.get("lfx", {}).get("failed", "not run"), *["-"] * (len(HEADER) - 3)]
    ours, rate = found["lfx"], rates(row)
    line = [name, "yes" if passed(row) else "NO"]
    line.append(f"{ours['median_us']:.1f} ({ours['p5_us']:.1f}-{ours['p95_us']:.1f})")
    line += [f"{rate['tflops']:.0f}", f"{rate['of_matmul']:.0%}", f"{rate['of_ceiling']:.0%}"]
    for other in ("flex", "flex-64", "sdpa", "huggingface"):
        result = found.get(other, {})
        words = "failed" if "failed" in result else "skipped" if "skipped" in result else "-"
        line.append(f"{result['times_slower']:.2f}x" if "times_slower" in result else words)
    return line


def table(rows: Rows) -> str:
    """A Markdown table of all rows."""
    lines = [HEADER, ["---"] * len(HEADER), *map(table_row, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def verdicts(rows: Rows) -> Rows:
    """For each claim: whether it holds (None = no case of it was measured) and the figure that decides."""
    timed = [row for row in rows if "median_us" in row["contenders"].get("lfx", {})]
    required = [row for row in timed if case_of(row).required]
    wrong = [str(case_of(row)) for row in rows if not passed(row)]
    found = [
        {
            "claim": "every case is right to twice PyTorch's own error in the same type against float64",
            "holds": not wrong if rows else None,
            "figure": f"{len(rows) - len(wrong)} of {len(rows)} cases",
            "worst": wrong[0] if wrong else None,
        }
    ]
    ratios = [(value, row) for row in required if (value := flex_ratio(row)) is not None]
    shares = [(rates(row)["band_of_matmul"], row) for row in required if row["batch"] == 8]
    claims = (
        (f"{FASTER_THAN_FLEX} times FlexAttention at 4,096 tokens and more", FASTER_THAN_FLEX, ratios, "{:.2f} times"),
        (f"{SHARE_OF_MATMUL:.0%} of the measured dense product, batch 8", SHARE_OF_MATMUL, shares, "{:.1%}"),
    )
    for claim, wanted, measured, unit in claims:
        least, row = min(measured, key=lambda pair: pair[0], default=(None, None))
        verdict = {"claim": f"window 256, one global: {claim}", "holds": None, "figure": "not measured", "worst": None}
        if least is not None and row is not None:
            figure = f"{unit.format(least)} at worst, {len(measured)} cases"
            verdict.update(holds=least >= wanted, figure=figure, worst=str(case_of(row)))
        found.append(verdict)
    return found


# ---- the command --------------------------------------------------------------------------------------------------


def main() -> None:
    """Build, check, time, write the record; exit 1 when a result is wrong."""
    options = gpu.parser(__doc__, "gpu_kernels").parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        library = options.library or gpu.build(Path(folder), None, "sm_90")
        print(f"library: {library.name}", flush=True)
        if options.dry_run:
            dry_run(library, cases(options.quick))
            return
        rows = run(library, cases(options.quick), started + 60 * options.minutes, options.record)
    gpu.conclude(table(rows), verdicts(rows))


def run(library: Path, wanted: list[Case], deadline: float, record: Path) -> Rows:
    """Every case, as gpu.measure_all does it."""
    import torch

    gpu.require()
    kernels, about = Kernels(library), gpu.environment(torch)
    l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    peaks = next((peaks for name, peaks in PEAKS.items() if name in about["gpu"]), None)
    made: dict[str, dict[str, Contender]] = {}

    def one(case: Case) -> dict[str, Any]:
        if case.precision not in made:
            made.clear()  # the other type's ceilings hold memory
            made[case.precision] = ceilings(dtype_of(case.precision))
        row = {**about, **measure(case, kernels, made[case.precision], l2_bytes), **kernel_costs(case)}
        row |= {"useful_flops": useful_flops(case), "least_bytes": least_bytes(case), "passed": passed(row)}
        row |= {"floors": floors(case, peaks)} if peaks is not None else {}
        row |= {"rates": rates(row)} if "median_us" in row["contenders"]["lfx"] else {}
        print(" | ".join(table_row(row)), flush=True)
        return row

    return gpu.measure_all(wanted, one, verdicts, deadline, record)


def dry_run(library: Path, wanted: list[Case]) -> None:
    """The cases with their work and floors, and what the machine code says."""
    peaks = PEAKS["NVIDIA H100 80GB HBM3"]
    print("useful GFLOP, MB of least traffic, µs at the H100's published rates: arithmetic, bytes, exponentials, and")
    print("shared memory as this kernel uses it; then pairs computed over useful ones, and MB through the L2")
    for case in wanted:
        floor, cost = floors(case, peaks), kernel_costs(case)
        line = f"{case}: {useful_flops(case) / 1e9:.2f} GFLOP, {least_bytes(case) / 1e6:.1f} MB; "
        line += ", ".join(f"{value:.1f}" for value in floor.values())
        line += f"; {cost['computed_over_useful']:.3f}, {cost['l2_bytes'] / 1e6:.0f} MB"
        print(line + "".join(f"; {name} skipped: {why}" for name, why in skipped(case).items() if name != "flex-64"))
    print(code_report(library))
    print(f"dry run: {len(wanted)} cases listed, nothing was run on a GPU")


def code_report(library: Path) -> str:
    """Registers, shared memory and instructions of the kernel for head size 64, float16."""
    codes = gpu.machine_code(library)
    if codes is None:
        return "machine code: not read, cuobjdump is not installed"
    code = next(code for name, code in codes.items() if "bandedAttentionTensorCoresI6__halfLi64" in name)
    registers = int(code.split("REG:")[1].split()[0])
    runs = gpu.straight_runs(code)
    products = sorted((run for run in runs if "HMMA" in run), key=lambda run: run.count("HMMA"))
    copies = [len(run) for run in runs if run.count("LDGSTS") == 8]

    def described(run: list[str]) -> str:
        names = ", ".join(f"{count} {name}" for name, count in Counter(run).most_common(10))
        return f"{len(run)} instructions: {names}"

    return (
        f"machine code, head size 64, float16: {code.splitlines()[0].split(' CONSTANT')[0]}; "
        f"{65536 // (128 * (-(-registers // 8) * 8))} blocks of 128 threads a multiprocessor by registers\n"
        f"  a tile of 64 keys wholly seen, a warp: {described(products[-1])}\n"
        f"  a group of 16 keys of another tile: {described(products[0])}\n"
        f"  the 8 asynchronous copies of a tile of the band, a thread: {min(copies)} to {max(copies)} instructions\n"
    )


if __name__ == "__main__":
    main()
