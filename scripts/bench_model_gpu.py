"""Time the whole base model in float16 on an NVIDIA GPU, and write docs/records/gpu_model.jsonl.

    python scripts/bench_model_gpu.py --minutes 9     # the shapes that a claim is about come first
    python scripts/bench_model_gpu.py --dry-run       # builds, lists the shapes and their work, and stops

The model: 12 layers, hidden size 768, 12 heads, attention_window 512, random weights, one global token in front, no
padding. From ids on the device to last_hidden_state and pooler_output on the device, except where said. Contenders take
turns in one process, the L2 emptied before each:

    lfx                   our kernels as torch custom ops, the layers compiled, one CUDA graph
    lfx-eager             the same without torch.compile, one CUDA graph
    flex, flex-eager      FlexAttention in their place, in the same two ways; it alone is always compiled
    lfx-tensorrt          the plan of `build_engine` by lfx.runtime.Engine; host to host, so with both copies
    huggingface           LongformerModel as it is: reads a number back from the device in every layer, so no graph
    huggingface-compiled  torch.compile of that

The rows of the global token cost the same in lfx and flex: both fold the key projection into the query, ours with
GlobalAttention, flex with plain PyTorch. Layers are compiled one by one, which compiles a single one of the twelve.

An output may be at most twice as far from the model in float32 as Hugging Face's own float16 is. float32 stands for
float64 here: its own error is three orders of magnitude below those that are compared.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import torch
from band_cases import PEAKS, Case, useful_flops
from checkpoints import base_model
from gpu import Contender, Rows
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from lfx.runtime.plugin import Kernels

LIMITS_MS = {(4096, 1): 3.0, (16384, 1): 12.0}  # the claims, by length and batch
SHAPES = [
    *LIMITS_MS,
    *((n, b) for b in (1, 8) for n in (512, 1024, 2048, 4096, 8192, 16384) if (n, b) not in LIMITS_MS),
]
LAYERS, HIDDEN, HEADS, INNER, WINDOW, GLOBALS = 12, 768, 12, 3072, 256, 1
MAX_SEQLEN = max(seqlen for seqlen, _ in SHAPES)
SECONDS_A_SHAPE, MOST_ROUNDS = 4.0, 50
OURS = ("lfx", "lfx-eager", "lfx-tensorrt")
OPS = torch.ops.lfx_bench


# ---- the model around another attention ---------------------------------------------------------------------------


class KernelAttention(LongformerSelfAttention):  # type: ignore[misc]
    """Self-attention by our kernels, through the custom ops that gpu.register makes."""

    def forward(self, hidden_states: Any, attention_mask: Any = None, **_: Any) -> tuple[Any]:
        """hidden_states (B, S, hidden); attention_mask is key_mask (B, S) int32 and global_index (B, G) int32."""
        key_mask, index = attention_mask
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)

        def over_tokens(folded: Any) -> Any:
            return OPS.global_attention(folded, hidden_states, key_mask, 1, self.head_dim**-0.5)

        rows = folded_rows(self, hidden_states, index, over_tokens)
        window = self.one_sided_attn_window_size
        return (OPS.banded_attention(query, key, value, key_mask, index, rows, self.num_heads, window),)


class FlexAttention(LongformerSelfAttention):  # type: ignore[misc]
    """Self-attention by FlexAttention. The global tokens are the first ones, as `block_masks` (by window) has it."""

    block_masks: dict[int, Any]
    attend = staticmethod(flex_attention)

    def forward(self, hidden_states: Any, attention_mask: Any = None, **_: Any) -> tuple[Any]:
        """As KernelAttention's, without padding and with every slot used."""
        key_mask, index = attention_mask
        shape = (self.num_heads, self.head_dim)
        q, k, v = (
            project(hidden_states).unflatten(2, shape).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        mask = self.block_masks[self.one_sided_attn_window_size]
        context = self.attend(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)

        def over_tokens(folded: Any) -> Any:
            scores = folded @ hidden_states.transpose(1, 2) * self.head_dim**-0.5
            scores = scores.masked_fill(key_mask[:, None, :] == 0, -torch.inf)
            return scores.softmax(-1, dtype=torch.float32).to(scores.dtype) @ hidden_states

        rows = folded_rows(self, hidden_states, index, over_tokens)
        return (context.scatter_(1, positions(index, rows.shape[2]), rows),)


def positions(index: Any, width: int) -> Any:
    """The slots' tokens, (B, G, width) int64 for gather and scatter; token 0 for unused slots."""
    return index.clamp(min=0).long()[..., None].expand(-1, -1, width)


def folded_rows(module: Any, hidden: Any, index: Any, over_tokens: Callable[[Any], Any]) -> Any:
    """The rows of the global tokens, (B, G, hidden): (q·W_k)·x for the scores and W_v·(Σ p·x) + b_v for the context.

    Args:
        over_tokens: (B, H·G, hidden) queries over the tokens themselves, one head as wide as the hidden size.
    """
    heads, size, width = module.num_heads, module.head_dim, hidden.shape[2]
    batch, slots = index.shape
    query = (
        module.query_global(hidden.gather(1, positions(index, width))).unflatten(2, (heads, size)).transpose(1, 2)
    )  # (B, H, G, D)
    folded = query @ module.key_global.weight.view(heads, size, width)  # (B, H, G, hidden)
    mixed = over_tokens(folded.reshape(batch, heads * slots, width)).view(batch, heads, slots, width)
    context = mixed @ module.value_global.weight.view(heads, size, width).transpose(1, 2)  # (B, H, G, D)
    return context.transpose(1, 2).flatten(2) + module.value_global.bias


class Whole(nn.Module):
    """A LongformerModel with another self-attention, from ids to its two outputs, without a read-back to the host.

    Args:
        slots: global tokens of a row at most; unused ones of another row are -1.
    """

    def __init__(self, model: Any, attention: type[LongformerSelfAttention], slots: int, **attributes: Any) -> None:
        super().__init__()
        self.model, self.slots = copy.deepcopy(model), slots
        for module in self.model.modules():
            if isinstance(module, LongformerSelfAttention):
                module.__class__ = attention
                vars(module).update(attributes)

    def forward(self, ids: Any, mask: Any, marks: Any) -> tuple[Any, Any]:
        """ids, attention mask and global attention mask, (B, S) int64; last_hidden_state and pooler_output."""
        found = torch.topk((mask * marks).int(), self.slots, dim=1)
        index = torch.where(found.values > 0, found.indices.int(), -1)
        hidden = self.model.embeddings(input_ids=ids)
        for layer in self.model.encoder.layer:
            hidden = layer(hidden, attention_mask=(mask.int(), index))[0]
        return hidden, self.model.pooler(hidden)


def compile_layers(whole: Whole, backend: str = "inductor") -> Whole:
    """Each layer compiled for its shape; they share one compilation, since only their weights differ."""
    for layer in whole.model.encoder.layer:
        layer.compile(dynamic=False, backend=backend)
    return whole


def compile_flex() -> Callable[..., Any]:
    """FlexAttention alone compiled."""
    return torch.compile(flex_attention, dynamic=False)


def compile_model(model: Any) -> Any:
    """Hugging Face's model as torch.compile takes it."""
    return torch.compile(model, dynamic=False)


# ---- one shape on the GPU -----------------------------------------------------------------------------------------


def inputs_of(seqlen: int, batch: int, device: str) -> tuple[Any, Any, Any]:
    """Random ids, a mask of ones, and one global token in front; each (batch, seqlen) int64."""
    ids = torch.randint(3, 50000, (batch, seqlen), device=device)
    marks = torch.zeros_like(ids)
    marks[:, :GLOBALS] = 1
    return ids, torch.ones_like(ids), marks


def eager(model: Any, ids: Any, mask: Any, marks: Any) -> tuple[Any, Any]:
    """Hugging Face's own forward."""
    found = model(ids, attention_mask=mask, global_attention_mask=marks)
    return found.last_hidden_state, found.pooler_output


def by_row(model: Any, inputs: tuple[Any, Any, Any]) -> Any:
    """last_hidden_state of Hugging Face's forward, one row of the batch at a time, which needs the least memory."""
    rows = zip(*(x.split(1) for x in inputs), strict=True)
    return torch.cat([eager(model, *row)[0] for row in rows])


def makers(
    half: Any, exact: Any, kernels: Kernels, shape: tuple[int, int], inputs: tuple[Any, Any, Any], folder: Path
) -> dict[str, Callable[[], tuple[Contender, Any]]]:
    """How each contender is made: its Contender, and the last_hidden_state that it computes, (B, S, hidden)."""

    def graph(whole: Whole) -> tuple[Contender, Any]:
        captured, outputs = gpu.capture(lambda given: whole(*given), [inputs])
        outputs[0][0].fill_(float("nan"))
        captured.replay()
        return Contender(captured.replay), outputs[0][0]

    def on_host(model: Any) -> tuple[Contender, Any]:
        return Contender(lambda: eager(model, *inputs), on_host=True), eager(model, *inputs)[0]

    def ours() -> Whole:
        gpu.register(kernels)
        return Whole(half, KernelAttention, GLOBALS)

    def flex(**attributes: Any) -> Whole:
        see = gpu.band_or_global(WINDOW, GLOBALS)
        mask = create_block_mask(see, None, None, shape[0], shape[0], device=gpu.DEVICE)
        return Whole(half, FlexAttention, GLOBALS, block_masks={WINDOW: mask}, **attributes)

    return {
        "lfx": lambda: graph(compile_layers(ours())),
        "lfx-eager": lambda: graph(ours()),
        "flex": lambda: graph(compile_layers(flex())),
        "flex-eager": lambda: graph(flex(attend=compile_flex())),
        "lfx-tensorrt": lambda: tensorrt(exact, shape, inputs, folder),
        "huggingface": lambda: on_host(half),
        "huggingface-compiled": lambda: on_host(compile_model(half)),
    }


def tensorrt(model: Any, shape: tuple[int, int], inputs: tuple[Any, Any, Any], folder: Path) -> tuple[Contender, Any]:
    """A plan for this one shape; arrays of the host in and out."""
    from lfx.export import export
    from lfx.runtime import Engine, build_engine

    bundle = folder / "base"
    if not bundle.exists():
        export(copy.deepcopy(model).cpu(), bundle)
    seqlen, batch = shape
    plan = build_engine(
        bundle,
        folder / f"{batch}x{seqlen}.plan",
        precision="fp16",
        batch=[str(batch)],
        seqlen=[str(seqlen)],
        max_global=GLOBALS,
    )
    engine = Engine(plan)
    ids, mask, marks = (x.cpu().numpy() for x in inputs)

    def run() -> np.ndarray:
        return np.asarray(engine.run(ids, mask, marks)["last_hidden_state"])

    return Contender(run, on_host=True), torch.from_numpy(run()).to(gpu.DEVICE)


def skipped(shape: tuple[int, int], compile_all: bool) -> dict[str, str]:
    """Contenders that are left out, and why."""
    reasons = {}
    if not any(importlib.util.find_spec(module) for module in ("tensorrt", "tensorrt_rtx")):
        reasons["lfx-tensorrt"] = "no TensorRT on this machine"
    if shape not in LIMITS_MS and not compile_all:
        reasons["huggingface-compiled"] = "it compiles for minutes; --compile-all does it for every shape"
    return reasons


def measure(
    shape: tuple[int, int], exact: Any, half: Any, kernels: Kernels, folder: Path, compile_all: bool
) -> dict[str, Any]:
    """Check and time one shape; the row of the record."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a layer that shares no code with another still gets its own
    seqlen, batch = shape
    inputs = inputs_of(seqlen, batch, gpu.DEVICE)
    wanted = by_row(exact, inputs)
    witness = float((by_row(half, inputs).float() - wanted).abs().max())
    results: dict[str, dict[str, Any]] = {name: {"skipped": why} for name, why in skipped(shape, compile_all).items()}
    racing: dict[str, Contender] = {}
    for name, maker in makers(half, exact, kernels, shape, inputs, folder).items():
        if name in results:
            continue
        started = time.perf_counter()
        try:
            racing[name], out = maker()
            error = float((out.float() - wanted).abs().max())
            results[name] = {"max_error": error, "seconds_to_make": round(time.perf_counter() - started, 1)}
        except Exception as error:  # one contender that fails must not end the run
            results[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(f"{seqlen}x{batch} {name}: {results[name]}", flush=True)
    flush = gpu.flusher()
    rounds = gpu.rounds_for(racing, flush, SECONDS_A_SHAPE, MOST_ROUNDS) if racing else 0
    times = gpu.interleaved(racing, rounds, flush)
    for name, found in times.items():
        results[name].update(gpu.summary(found))
        if "lfx" in times:
            results[name]["times_slower"] = gpu.ratio(found, times["lfx"])
    return {
        "seqlen": seqlen,
        "batch": batch,
        "globals": GLOBALS,
        "precision": "fp16",
        "rounds": rounds,
        "witness_error": witness,
        "contenders": results,
    }


# ---- what the rows say --------------------------------------------------------------------------------------------


def work(shape: tuple[int, int]) -> dict[str, float]:
    """GFLOP of the linear layers and of attention's useful pairs, and the float16 weights' MB."""
    seqlen, batch = shape
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * INNER)
    attention = LAYERS * useful_flops(Case(seqlen, WINDOW, GLOBALS, batch, HEADS, "fp16"))
    return {"linear": 2e-9 * weights * seqlen * batch, "attention": 1e-9 * attention, "weights_mb": 2e-6 * weights}


def right(row: dict[str, Any], name: str) -> bool:
    """Whether a contender's error is at most twice that of Hugging Face's float16."""
    return bool(row["contenders"].get(name, {}).get("max_error", float("inf")) <= 2 * row["witness_error"])


def fastest(row: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest of ours that is right, and its milliseconds."""
    found = {name: row["contenders"].get(name, {}).get("median_us") for name in OURS if right(row, name)}
    times = {name: us / 1e3 for name, us in found.items() if us is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def table(rows: Rows) -> str:
    """Milliseconds, median (p5 to p95), of every contender."""
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    lines = [["tokens", "batch", *names], ["---"] * (2 + len(names))]
    for row in rows:
        line = [f"{row['seqlen']:,}", str(row["batch"])]
        for name in names:
            found = row["contenders"].get(name, {})
            text = "failed" if "failed" in found else "skipped" if "skipped" in found else "-"
            if "median_us" in found:
                median, p5, p95 = (found[key] / 1e3 for key in ("median_us", "p5_us", "p95_us"))
                text = f"{median:.2f} ({p5:.2f}-{p95:.2f})" + ("" if right(row, name) else " WRONG")
            line.append(text)
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def verdicts(rows: Rows) -> Rows:
    """For each claim: whether it holds (None = not measured), and the figure."""
    wrong = [
        f"{name} at {row['seqlen']}x{row['batch']}"
        for row in rows
        for name in OURS
        if "max_error" in row["contenders"].get(name, {}) and not right(row, name)
    ]
    checked = any("max_error" in row["contenders"].get(name, {}) for row in rows for name in OURS)
    claim = "ours is right to twice Hugging Face's own float16 error"
    found = [{"claim": claim, "holds": not wrong if checked else None, "figure": ", ".join(wrong) or "no exception"}]
    for (seqlen, batch), limit in LIMITS_MS.items():
        best = next((fastest(row) for row in rows if (row["seqlen"], row["batch"]) == (seqlen, batch)), None)
        found.append(
            {
                "claim": f"base shape, float16, {seqlen:,} tokens, batch {batch}: under {limit:g} ms",
                "holds": None if best is None else best[1] < limit,
                "figure": "not measured" if best is None else f"{best[1]:.2f} ms ({best[0]})",
            }
        )
    return found


# ---- the command --------------------------------------------------------------------------------------------------


def main() -> None:
    """Build, check, time, write the record; exit 1 when a result is wrong."""
    parser = gpu.parser(__doc__, "gpu_model")
    parser.add_argument(
        "--compile-all", action="store_true", help="torch.compile of Hugging Face's model at every shape"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    shapes = list(LIMITS_MS) if options.quick else SHAPES
    with tempfile.TemporaryDirectory(prefix="lfx-bench-") as folder:
        library = options.library or gpu.build(Path(folder), None, "sm_90")
        print(f"library: {library.name}", flush=True)
        if options.dry_run:
            dry_run(shapes)
            return
        rows = run(library, shapes, deadline, options.record, options.compile_all, Path(folder))
    gpu.conclude(table(rows), verdicts(rows))


def run(
    library: Path, shapes: list[tuple[int, int]], deadline: float, record: Path, compile_all: bool, folder: Path
) -> Rows:
    """Every shape, as gpu.measure_all does it."""
    gpu.require()
    kernels, about = Kernels(library), gpu.environment(torch)
    exact = base_model(MAX_SEQLEN).to(gpu.DEVICE)
    half = copy.deepcopy(exact).half()

    def one(shape: tuple[int, int]) -> dict[str, Any]:
        return {**about, **measure(shape, exact, half, kernels, folder, compile_all), "gflop": work(shape)}

    return gpu.measure_all(shapes, one, verdicts, deadline, record)


def dry_run(shapes: list[tuple[int, int]]) -> None:
    """The shapes, their work, and its time at the H100's published rate."""
    rate = PEAKS["NVIDIA H100 80GB HBM3"].flops
    for shape in shapes:
        found = work(shape)
        floor = 1e12 * (found["linear"] + found["attention"]) / rate
        limit = f"; the claim: under {LIMITS_MS[shape]:g} ms" if shape in LIMITS_MS else ""
        print(
            f"{shape[0]} tokens, batch {shape[1]}: {found['linear']:.0f} GFLOP in linear layers, "
            f"{found['attention']:.0f} in attention, {floor:.2f} ms at the H100's published rate{limit}"
        )
    print(f"dry run: {len(shapes)} shapes listed, nothing was run on a GPU")


if __name__ == "__main__":
    main()
