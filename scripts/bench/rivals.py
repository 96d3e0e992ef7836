"""Other attentions with a band, as contenders of scripts/bench/gpu_kernels.py and as oracles of our results.

FlashAttention and cuDNN have no global keys. They compute the pure band and the log-sum-exp of each row; a second pass
computes the global keys outside the band, |query - key| > window, and both are merged. FlexAttention computes both at
once on another backend. ONNX Runtime's op is the only one that projects its input itself.

A rival that is not installed, or does not run on this GPU, is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from scripts.bench import timing
from scripts.bench.band_cases import Case
from scripts.bench.timing import Contender

Attention = Callable[[Any], Any]  # a buffer set -> context
Band = Callable[[Any], tuple[Any, Any]]  # a buffer set -> context (B, S, H, D) and log-sum-exp (B, H, S) of the band

MODULES = {
    "flex-flash": "flash_attn.cute",
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "cudnn": "cudnn",
}
NAMES = (*MODULES, "onnxruntime")


def missing(case: Case) -> dict[str, str]:
    """Return the rivals that cannot take part in a case, and the reasons."""
    reasons = {name: f"{module} is not installed" for name, module in MODULES.items() if not _installed(module)}
    if "CUDAExecutionProvider" not in providers():
        reasons["onnxruntime"] = "onnxruntime-gpu is not installed"
    elif case.precision == "bf16":
        reasons["onnxruntime"] = "LongformerAttention has no bfloat16"
    elif case.seqlen % (2 * case.window):
        reasons["onnxruntime"] = "LongformerAttention needs a length that is a multiple of twice the window"
    return reasons


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime."""
    if not _installed("onnxruntime"):
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


# ---- a band and a pass for the global keys -------------------------------------------------------------------------


def merge(context: Any, lse: Any, other_context: Any, other_lse: Any) -> Any:
    """Merge the attention over two sets of keys into the attention over both.

    Args:
        context, other_context: (B, S, H, D); any number where there is no key.
        lse, other_lse: (B, H, S) float32, natural log of the sum of exp(score); -inf where there is no key.
    Returns:
        (B, S, H, D) in the dtype of `context`; zeros where neither set has a key.
    """
    import torch

    largest = torch.maximum(lse, other_lse)
    largest = torch.where(largest.isinf(), 0.0, largest)
    weight, other = ((x - largest).exp().transpose(1, 2)[..., None] for x in (lse, other_lse))  # (B, S, H, 1)
    total = (weight + other).clamp(min=torch.finfo(torch.float32).tiny)
    # A context without keys may be NaN, which a weight of 0 would keep.
    parts = (torch.where(w > 0, x, 0.0).float() * (w / total) for w, x in ((weight, context), (other, other_context)))
    return sum(parts).to(context.dtype)


def global_pass(case: Case, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Compute attention over the global keys that are outside the band of their query.

    Args:
        q, k, v: (B, S, H, D).
    Returns:
        Context (B, S, H, D), zeros where there is no key, and log-sum-exp (B, H, S) float32.
    """
    import torch

    count = case.globals
    query, key = torch.arange(case.seqlen, device=q.device), torch.arange(count, device=q.device)
    in_band = (query[:, None] - key).abs() <= case.window
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :count]).float() * case.head_size**-0.5
    scores = scores.masked_fill(in_band, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp().to(v.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :count]), lse


def with_global_keys(case: Case, band: Band, compiled: bool) -> Attention:
    """Make the attention over band and global keys from the attention over the band."""
    import torch

    def finish(context: Any, lse: Any, q: Any, k: Any, v: Any) -> Any:
        return merge(context, lse, *global_pass(case, q, k, v))

    finish = torch.compile(finish, dynamic=False) if compiled else finish

    def run(s: Any) -> Any:
        context, lse = band(s)
        if case.globals:
            context = finish(context, lse, *by_token(case, s))
        return context.flatten(2)

    return run


def by_token(case: Case, s: Any) -> tuple[Any, ...]:
    """Return queries, keys and values of a buffer set, (B, S, H, D), without a copy."""
    return tuple(x.unflatten(2, (case.heads, case.head_size)) for x in (s.q, s.k, s.v))


# ---- the rivals ----------------------------------------------------------------------------------------------------


def flash2_band(case: Case) -> Band:
    """Make the band of FlashAttention 2."""
    from flash_attn import flash_attn_func

    def run(s: Any) -> tuple[Any, Any]:
        window = (case.window, case.window)
        context, lse, _ = flash_attn_func(*by_token(case, s), window_size=window, return_attn_probs=True)
        return context, lse

    return run


def flash3_band(case: Case) -> Band:
    """Make the band of FlashAttention 3, which is for Hopper."""
    import inspect

    from flash_attn_interface import flash_attn_func

    # The argument was added in 2025; before, both results were always returned.
    accepts = "return_attn_probs" in inspect.signature(flash_attn_func).parameters
    wanted = {"return_attn_probs": True} if accepts else {}

    def run(s: Any) -> tuple[Any, Any]:
        context, lse, *_ = flash_attn_func(*by_token(case, s), window_size=(case.window, case.window), **wanted)
        return context, lse

    return run


def cudnn_band(case: Case) -> Band:
    """Make the band of cuDNN, through its frontend."""
    import cudnn
    import torch

    handle = cudnn.create_handle()
    io_type = cudnn.data_type.HALF if case.precision == "fp16" else cudnn.data_type.BFLOAT16
    graph = cudnn.pygraph(
        io_data_type=io_type,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    dims = [case.batch, case.heads, case.seqlen, case.head_size]
    width = case.heads * case.head_size
    strides = [case.seqlen * width, case.head_size, width, 1]  # of (B, S, H, D)
    q, k, v = (graph.tensor(name=name, dim=dims, stride=strides, data_type=io_type) for name in "qkv")
    context, stats = graph.sdpa(
        name="band",
        q=q,
        k=k,
        v=v,
        attn_scale=case.head_size**-0.5,
        generate_stats=True,
        diagonal_band_left_bound=case.window + 1,  # counts the query itself
        diagonal_band_right_bound=case.window,
    )
    context.set_output(True).set_dim(dims).set_stride(strides)
    rows = [case.batch, case.heads, case.seqlen, 1]
    stats.set_output(True).set_dim(rows).set_stride([case.heads * case.seqlen, case.seqlen, 1, 1])
    stats.set_data_type(cudnn.data_type.FLOAT)
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=timing.DEVICE)

    def run(s: Any) -> tuple[Any, Any]:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        queries, keys, values = by_token(case, s)
        out = torch.empty_like(queries)
        lse = torch.empty(rows, dtype=torch.float32, device=timing.DEVICE)
        graph.execute({q: queries, k: keys, v: values, context: out, stats: lse}, workspace, handle=handle)
        return out, lse[..., 0]

    return run


def maker(name: str, case: Case, device: str, flex: Callable[..., Attention]) -> Attention:
    """Make a rival that a CUDA graph can capture.

    Args:
        flex: makes FlexAttention with options of its kernel.
    """
    if name == "flex-flash":
        return flex(case, device, options={"BACKEND": "FLASH"})
    bands = {"flash2": flash2_band, "flash3": flash3_band, "cudnn": cudnn_band}
    return with_global_keys(case, bands[name](case), compiled=device == "cuda")


# ---- ONNX Runtime's own op -----------------------------------------------------------------------------------------


def onnxruntime_model(case: Case, weight: Any) -> bytes:
    """Make a model of one `com.microsoft::LongformerAttention`; see onnxruntime's docs/ContribOperators.md.

    Args:
        weight: (hidden, 3 · hidden) of queries, keys and values, numpy; global tokens use the same.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    dtype = np.dtype(np.float16 if case.precision == "fp16" else np.float32)
    element = TensorProto.FLOAT16 if case.precision == "fp16" else TensorProto.FLOAT
    hidden = case.heads * case.head_size
    shape = (case.batch, case.seqlen)
    marks = np.broadcast_to(np.arange(case.seqlen) < case.globals, shape).astype(np.int32)
    weight, bias = weight.astype(dtype), np.zeros(3 * hidden, dtype)
    constants = {
        "weight": weight,
        "bias": bias,
        "mask": np.zeros(shape, dtype),  # added to the scores
        "global_weight": weight,
        "global_bias": bias,
        "global": marks,
    }
    node = helper.make_node(
        "LongformerAttention",
        ["x", *constants],
        ["context"],
        domain="com.microsoft",
        num_heads=case.heads,
        window=case.window,
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info("x", element, [*shape, hidden])],
        [helper.make_tensor_value_info("context", element, [*shape, hidden])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def onnxruntime_contender(case: Case, s: Any) -> tuple[Contender, Any, tuple[Any, Any, Any]]:
    """Make the contender of ONNX Runtime, whose time includes the projections and the rows of the global tokens.

    Returns:
        The contender, its output (B, S, H·D), and the float64 queries, keys and values that it projects `s.q` to.
    """
    import numpy as np
    import onnxruntime
    import torch

    hidden = s.q.shape[2]
    weight = torch.randn((hidden, 3 * hidden), dtype=s.q.dtype, device=s.q.device) * hidden**-0.5
    options = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
    session = onnxruntime.InferenceSession(
        onnxruntime_model(case, weight.cpu().numpy()), providers=[("CUDAExecutionProvider", options)]
    )
    out, binding = torch.empty_like(s.q), session.io_binding()
    element = np.float16 if case.precision == "fp16" else np.float32
    binding.bind_input("x", "cuda", 0, element, tuple(s.q.shape), s.q.data_ptr())
    binding.bind_output("context", "cuda", 0, element, tuple(out.shape), out.data_ptr())
    projected = (s.q.double() @ weight.double()).split(hidden, 2)
    contender = Contender(lambda: session.run_with_iobinding(binding), on_host=True)  # it reads from the device
    contender.run()
    torch.cuda.synchronize()
    return contender, out, projected
