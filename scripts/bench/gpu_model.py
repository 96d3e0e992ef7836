"""Benchmark the base model in float16 on an NVIDIA GPU, and write docs/records/gpu_model.jsonl.

    python -m scripts.bench.gpu_model --minutes 9     # starts with the shapes of the claims
    python -m scripts.bench.gpu_model --dry-run       # builds, and lists the shapes and their work; needs no GPU

The model has 12 layers, hidden size 768, 12 heads, attention_window 512 and random weights; the first token is global,
and there is no padding. The time is from ids on the device to last_hidden_state and pooler_output on the device, except
for lfx-tensorrt and lfx-onnxruntime. All contenders alternate in one process, and the L2 is flushed before each:

    lfx                   lfx.torch.accelerate, the layers compiled, one CUDA graph
    lfx-eager             the same without torch.compile, one CUDA graph
    lfx-calls             lfx.torch.accelerate, called as it is, by the host's clock
    flex, flex-eager      FlexAttention instead of our kernels, in the same two variants; it is compiled in both
    lfx-tensorrt          the plan of `build_engine` in lfx.runtime.Engine, from host to host, with both copies
    lfx-onnxruntime       the float16 bundle in lfx.runtime.Engine, on ONNX Runtime's CUDA provider with our custom ops,
                          from host to host, with both copies
    huggingface           LongformerModel unchanged, by the host's clock: it reads a value from the device in each
                          layer, which no graph captures
    huggingface-compiled  torch.compile of huggingface, by the host's clock

The context of the global token is the same work in lfx and flex: both fold the key projection into the query, ours with
GlobalAttention, flex with plain PyTorch. Layers are compiled one by one, so that the twelve share one compilation.

The error of an output, against the model in float32, may be at most twice the error of Hugging Face's float16. float32
replaces float64 here: its error is three orders of magnitude smaller than those compared.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.longformer.modeling_longformer import LongformerLayer, LongformerSelfAttention

from lfx.errors import DependencyError
from lfx.torch import accelerate
from scripts import record
from scripts.bench import gpu, rivals, timing
from scripts.bench.band_cases import PEAKS, band_or_global, base_model_flops
from scripts.bench.gpu import Rows
from scripts.bench.launch import in_lfx_torch
from scripts.bench.timing import Contender
from scripts.checkpoints import HIDDEN, INTERMEDIATE, LAYERS, WINDOW, base_model

LIMITS_MS = {(4096, 1): 3.0, (16384, 1): 12.0}  # (length, batch) -> claimed milliseconds
SHAPES = [
    *LIMITS_MS,
    *((n, b) for b in (1, 8) for n in (512, 1024, 2048, 4096, 8192, 16384) if (n, b) not in LIMITS_MS),
]
GLOBALS = 1
MAX_SEQLEN = max(seqlen for seqlen, _ in SHAPES)
SECONDS_PER_SHAPE, MOST_ROUNDS = 4.0, 50
OURS = ("lfx", "lfx-eager", "lfx-calls", "lfx-tensorrt", "lfx-onnxruntime")


# ---- the model around another attention ---------------------------------------------------------------------------


class FlexAttention(LongformerSelfAttention):  # type: ignore[misc]
    """Self-attention with FlexAttention. `block_masks` (by window) are for global tokens at the start of each row."""

    block_masks: dict[int, Any]
    attend = staticmethod(flex_attention)

    def forward(self, hidden_states: Any, attention_mask: Any = None, **_: Any) -> tuple[Any]:
        """Compute the context of an input without padding and unused slots.

        Args:
            hidden_states: (B, S, hidden).
            attention_mask: key_mask (B, S) int32 and global_index (B, G) int32.
        """
        key_mask, index = attention_mask
        shape = (self.num_heads, self.head_dim)
        q, k, v = (
            project(hidden_states).unflatten(2, shape).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        mask = self.block_masks[self.one_sided_attn_window_size]
        context = self.attend(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)

        def attend_tokens(folded: Any) -> Any:
            scores = folded @ hidden_states.transpose(1, 2) * self.head_dim**-0.5
            scores = scores.masked_fill(key_mask[:, None, :] == 0, -torch.inf)
            return scores.softmax(-1, dtype=torch.float32).to(scores.dtype) @ hidden_states

        rows = folded_rows(self, hidden_states, index, attend_tokens)
        return (context.scatter_(1, positions(index, rows.shape[2]), rows),)


def positions(index: Any, width: int) -> Any:
    """Return the positions of the global tokens for gather and scatter, (B, G, width) int64; 0 for unused slots."""
    return index.clamp(min=0).long()[..., None].expand(-1, -1, width)


def folded_rows(module: Any, hidden: Any, index: Any, attend_tokens: Callable[[Any], Any]) -> Any:
    """Compute the context of the global tokens, with scores (q·W_k)·x and context W_v·(Σ p·x) + b_v.

    Args:
        attend_tokens: attention of (B, H·G, hidden) queries over the hidden states, in one head of the hidden size.
    Returns:
        (B, G, hidden).
    """
    heads, size, width = module.num_heads, module.head_dim, hidden.shape[2]
    batch, slots = index.shape
    query = (
        module.query_global(hidden.gather(1, positions(index, width))).unflatten(2, (heads, size)).transpose(1, 2)
    )  # (B, H, G, D)
    folded = query @ module.key_global.weight.view(heads, size, width)  # (B, H, G, hidden)
    weighted_sum = attend_tokens(folded.reshape(batch, heads * slots, width)).view(batch, heads, slots, width)
    context = weighted_sum @ module.value_global.weight.view(heads, size, width).transpose(1, 2)  # (B, H, G, D)
    return context.transpose(1, 2).flatten(2) + module.value_global.bias


class Whole(nn.Module):
    """A LongformerModel with another self-attention, from ids to both outputs, without copies to the host.

    Args:
        attention: the class that replaces the self-attention.
        slots: number of global slots in a row; unused slots are -1.
        attributes: set on each self-attention module.
    """

    def __init__(self, model: Any, attention: type[LongformerSelfAttention], slots: int, **attributes: Any) -> None:
        super().__init__()
        self.model, self.slots = copy.deepcopy(model), slots
        for module in self.model.modules():
            if isinstance(module, LongformerSelfAttention):
                module.__class__ = attention
                vars(module).update(attributes)

    def forward(self, ids: Any, mask: Any, marks: Any) -> tuple[Any, Any]:
        """Run the model.

        Args:
            ids, mask, marks: input_ids, attention_mask and global_attention_mask, (B, S) int64.
        Returns:
            last_hidden_state and pooler_output.
        """
        top = torch.topk((mask * marks).int(), self.slots, dim=1)
        index = torch.where(top.values > 0, top.indices.int(), -1)
        hidden = self.model.embeddings(input_ids=ids)
        for layer in self.model.encoder.layer:
            hidden = layer(hidden, attention_mask=(mask.int(), index))[0]
        return hidden, self.model.pooler(hidden)


def compile_layers(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compile each layer for a fixed shape; the layers share one compilation, since only their weights differ."""
    for module in model.modules():
        if isinstance(module, LongformerLayer):
            module.compile(dynamic=False, backend=backend)
    return model


def compile_flex() -> Callable[..., Any]:
    """Compile FlexAttention."""
    return torch.compile(flex_attention, dynamic=False)


def compile_model(model: Any) -> Any:
    """Compile Hugging Face's model for a fixed shape."""
    return torch.compile(model, dynamic=False)


# ---- one shape on the GPU -----------------------------------------------------------------------------------------


def inputs_of(seqlen: int, batch: int, device: str) -> tuple[Any, Any, Any]:
    """Make random ids, a mask of ones, and a global mask of the first token; each (batch, seqlen) int64."""
    ids = torch.randint(3, 50000, (batch, seqlen), device=device)
    marks = torch.zeros_like(ids)
    marks[:, :GLOBALS] = 1
    return ids, torch.ones_like(ids), marks


def eager(model: Any, ids: Any, mask: Any, marks: Any) -> tuple[Any, Any]:
    """Run Hugging Face's forward; returns last_hidden_state and pooler_output."""
    outputs = model(ids, attention_mask=mask, global_attention_mask=marks)
    return outputs.last_hidden_state, outputs.pooler_output


def by_row(model: Any, inputs: tuple[Any, Any, Any]) -> Any:
    """Run Hugging Face's forward row by row, which needs the least memory; returns last_hidden_state."""
    rows = zip(*(x.split(1) for x in inputs), strict=True)
    return torch.cat([eager(model, *row)[0] for row in rows])


def makers(
    half: Any, exact: Any, shape: tuple[int, int], inputs: tuple[Any, Any, Any], folder: Path
) -> dict[str, Callable[[], tuple[Contender, Any]]]:
    """Return for each contender a function that makes it, and computes last_hidden_state (B, S, hidden) once."""

    def graph(run: Callable[..., Any]) -> tuple[Contender, Any]:
        captured, outputs = timing.capture(lambda tensors: run(*tensors), [inputs])
        outputs[0][0].fill_(float("nan"))
        captured.replay()
        return Contender(captured.replay), outputs[0][0]

    def called(model: Any) -> tuple[Contender, Any]:
        return Contender(lambda: eager(model, *inputs), on_host=True), eager(model, *inputs)[0]

    def ours(change: Callable[[Any], Any] = lambda model: model) -> Callable[..., Any]:
        model = change(accelerate(copy.deepcopy(half), max_global=GLOBALS))
        return lambda *tensors: eager(model, *tensors)

    def flex(**attributes: Any) -> Whole:
        mask_function = band_or_global(WINDOW, GLOBALS)
        mask = create_block_mask(mask_function, None, None, shape[0], shape[0], device=timing.DEVICE)
        return Whole(half, FlexAttention, GLOBALS, block_masks={WINDOW: mask}, **attributes)

    return {
        "lfx": lambda: graph(ours(compile_layers)),
        "lfx-eager": lambda: graph(ours()),
        "lfx-calls": lambda: called(accelerate(copy.deepcopy(half))),
        "flex": lambda: graph(compile_layers(flex())),
        "flex-eager": lambda: graph(flex(attend=compile_flex())),
        "lfx-tensorrt": lambda: tensorrt(exact, shape, inputs, folder),
        "lfx-onnxruntime": lambda: onnxruntime(exact, inputs, folder),
        "huggingface": lambda: called(half),
        "huggingface-compiled": lambda: called(compile_model(half)),
    }


def tensorrt(model: Any, shape: tuple[int, int], inputs: tuple[Any, Any, Any], folder: Path) -> tuple[Contender, Any]:
    """Make the contender that runs a plan for one shape, with input and output arrays on the host."""
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
    return host_to_host(Engine(plan), inputs)


def onnxruntime(
    model: Any, inputs: tuple[Any, Any, Any], folder: Path, provider: str = "cuda", precision: str = "fp16"
) -> tuple[Contender, Any]:
    """Make the contender that runs a bundle in ONNX Runtime with lfx's custom ops, with arrays on the host.

    Raises:
        DependencyError: the library has no kernels for this provider and precision, or they cannot be registered.
    """
    from lfx.export import export
    from lfx.runtime import Engine

    bundle = folder / f"base-{precision}"
    if not bundle.exists():
        export(copy.deepcopy(model).cpu(), bundle, precision=precision, max_global=GLOBALS)
    return host_to_host(Engine(bundle, "onnxruntime", provider=provider, kernels="fused"), inputs)


def host_to_host(engine: Any, inputs: tuple[Any, Any, Any]) -> tuple[Contender, Any]:
    """Make the contender that runs an Engine; returns it, and last_hidden_state on the device."""
    ids, mask, marks = (x.cpu().numpy() for x in inputs)

    def run() -> np.ndarray:
        return np.asarray(engine.run(ids, mask, marks)["last_hidden_state"])

    return Contender(run, on_host=True), torch.from_numpy(run()).to(timing.DEVICE)


def skipped(compile_all: bool) -> dict[str, str]:
    """Return the contenders that are skipped, and the reasons."""
    reasons = {}
    if not any(importlib.util.find_spec(module) for module in ("tensorrt", "tensorrt_rtx")):
        reasons["lfx-tensorrt"] = "no TensorRT on this machine"
    if "CUDAExecutionProvider" not in rivals.providers():
        reasons["lfx-onnxruntime"] = "onnxruntime-gpu is not installed"
    if not compile_all:
        reasons["huggingface-compiled"] = "it compiles for minutes; --compile-all does it"
    return reasons


def measure(shape: tuple[int, int], exact: Any, half: Any, folder: Path, compile_all: bool) -> dict[str, Any]:
    """Measure errors and times of one shape; returns the row of the record."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # enough for a compilation per layer, if the layers cannot share one
    seqlen, batch = shape
    inputs = inputs_of(seqlen, batch, timing.DEVICE)
    expected = by_row(exact, inputs)
    witness = float((by_row(half, inputs).float() - expected).abs().max())
    results: dict[str, dict[str, Any]] = {name: {"skipped": text} for name, text in skipped(compile_all).items()}
    contenders: dict[str, Contender] = {}
    for name, maker in makers(half, exact, shape, inputs, folder).items():
        if name in results:
            continue
        started = time.perf_counter()
        try:
            contenders[name], out = maker()
            error = float((out.float() - expected).abs().max())
            results[name] = {"max_error": error, "seconds_to_make": round(time.perf_counter() - started, 1)}
        except DependencyError as error:  # such as a library without kernels for the CUDA provider
            results[name] = {"skipped": " ".join(str(error).split())}
        except Exception as error:  # one contender that fails must not end the run
            results[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(f"{seqlen}x{batch} {name}: {results[name]}", flush=True)
    rounds, times = timing.measure(contenders, SECONDS_PER_SHAPE, MOST_ROUNDS) if contenders else (0, {})
    for name, measured in times.items():
        results[name].update(measured)
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
    """Return GFLOP of the linear layers and of attention over unmasked pairs, and MB of the float16 weights."""
    linear, attention = base_model_flops(shape[0], GLOBALS, shape[1])
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * INTERMEDIATE)
    return {"linear": 1e-9 * linear, "attention": 1e-9 * attention, "weights_mb": 2e-6 * weights}


def is_right(row: dict[str, Any], name: str) -> bool:
    """Return whether a contender's error is at most twice that of Hugging Face's float16."""
    return bool(row["contenders"].get(name, {}).get("max_error", float("inf")) <= 2 * row["witness_error"])


def fastest(row: dict[str, Any]) -> tuple[str, float] | None:
    """Return the fastest of our contenders that is in tolerance, and its milliseconds."""
    medians = {name: row["contenders"].get(name, {}).get("median_us") for name in OURS if is_right(row, name)}
    times = {name: median_us / 1e3 for name, median_us in medians.items() if median_us is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def table(rows: Rows) -> str:
    """Make a Markdown table of milliseconds, median (p5 to p95), of all contenders."""
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    lines = [["tokens", "batch", *names], ["---"] * (2 + len(names))]
    for row in rows:
        line = [f"{row['seqlen']:,}", str(row["batch"])]
        for name in names:
            result = row["contenders"].get(name, {})
            text = "failed" if "failed" in result else "skipped" if "skipped" in result else "-"
            if "median_us" in result:
                median, p5, p95 = (result[key] / 1e3 for key in ("median_us", "p5_us", "p95_us"))
                text = f"{median:.2f} ({p5:.2f}-{p95:.2f})" + ("" if is_right(row, name) else " WRONG")
            line.append(text)
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def verdicts(rows: Rows) -> Rows:
    """Return for each claim whether it holds (None = not measured), and the measured figure."""
    wrong = [
        f"{name} at {row['seqlen']}x{row['batch']}"
        for row in rows
        for name in OURS
        if "max_error" in row["contenders"].get(name, {}) and not is_right(row, name)
    ]
    checked = any("max_error" in row["contenders"].get(name, {}) for row in rows for name in OURS)
    claim = "ours is right to twice Hugging Face's own float16 error"
    results = [{"claim": claim, "holds": not wrong if checked else None, "figure": ", ".join(wrong) or "no exception"}]
    for (seqlen, batch), limit in LIMITS_MS.items():
        best = next((fastest(row) for row in rows if (row["seqlen"], row["batch"]) == (seqlen, batch)), None)
        results.append(
            {
                "claim": f"base shape, float16, {seqlen:,} tokens, batch {batch}: under {limit:g} ms",
                "holds": None if best is None else best[1] < limit,
                "figure": "not measured" if best is None else f"{best[1]:.2f} ms ({best[0]})",
            }
        )
    return results


# ---- the command --------------------------------------------------------------------------------------------------


def main() -> None:
    """Build the library, measure all shapes and write the record; exits with 1 if an error is out of tolerance."""
    parser = gpu.parser(__doc__, "gpu_model")
    parser.add_argument(
        "--compile-all", action="store_true", help="measure Hugging Face's model compiled, which takes minutes, too"
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
        rows = run(library, shapes, deadline, options.record, options.compile_all, Path(folder), options.resume)
    gpu.conclude(table(rows), verdicts(rows))


def run(
    library: Path,
    shapes: list[tuple[int, int]],
    deadline: float,
    path: Path,
    compile_all: bool,
    folder: Path,
    resume: bool = False,
) -> Rows:
    """Measure the shapes on the GPU; see gpu.measure_all."""
    gpu.require()
    about = record.gpu_environment(torch)
    exact = base_model(MAX_SEQLEN).to(timing.DEVICE)
    half = copy.deepcopy(exact).half()

    def measure_one(shape: tuple[int, int]) -> dict[str, Any]:
        return {**about, **measure(shape, exact, half, folder, compile_all), "gflop": work(shape)}

    done = gpu.resumed(path, about) if resume else None
    with in_lfx_torch(library):
        return gpu.measure_all(
            shapes, measure_one, verdicts, deadline, path, done, lambda row: (row["seqlen"], row["batch"])
        )


def dry_run(shapes: list[tuple[int, int]]) -> None:
    """Print the shapes, their work, and its time at the H100's published rate."""
    rate = PEAKS["NVIDIA H100 80GB HBM3"].flops
    for shape in shapes:
        gflop = work(shape)
        floor = 1e12 * (gflop["linear"] + gflop["attention"]) / rate
        limit = f"; the claim: under {LIMITS_MS[shape]:g} ms" if shape in LIMITS_MS else ""
        print(
            f"{shape[0]} tokens, batch {shape[1]}: {gflop['linear']:.0f} GFLOP in linear layers, "
            f"{gflop['attention']:.0f} in attention, {floor:.2f} ms at the H100's published rate{limit}"
        )
    for name, reason in skipped(compile_all=True).items():
        print(f"{name} is skipped here: {reason}")
    print(f"dry run: {len(shapes)} shapes listed, nothing was run on a GPU")


if __name__ == "__main__":
    main()
