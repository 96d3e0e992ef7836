"""The libraries of ONNX Runtime's custom ops, which run attention with lfx's own kernels."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lfx

# Names the instruction set of the CPU kernels, instead of the widest one of the CPU: baseline, avx2 or avx512.
INSTRUCTIONS_VARIABLE = "LFX_CPU_INSTRUCTIONS"
KERNELS = ("auto", "fused", "function")
LIBRARIES = ("liblfx_onnxruntime.so", "liblfx_onnxruntime.dylib")
CUDA_LIBRARY = "liblfx_onnxruntime_cuda.so"
# The precisions of models that the kernels of a provider run. The attention of int8 models is float32.
PRECISIONS = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16", "bf16", "int8")}


class NoKernelError(Exception):
    """The reason why lfx's kernels cannot run a model, and what to do."""


def library(provider: str = "cpu") -> Path:
    """The path of the installed library.

    Args:
        provider: "cpu" or "cuda".
    Raises:
        NoKernelError: lfx was installed without it.
    """
    names = (CUDA_LIBRARY,) if provider == "cuda" else LIBRARIES
    for folder in lfx.__path__:
        for name in names:
            path = Path(folder) / "_lib" / name
            if path.is_file():
                return path
    if sys.platform == "win32":
        raise NoKernelError("lfx has no kernels for Windows; run it on Linux or macOS")
    compiler = "nvcc on the PATH" if provider == "cuda" else "a C++ compiler"
    raise NoKernelError(f"{names[0]} is not installed; install lfx again where there is {compiler}")


def reason_for_function(backend: str, provider: str, precision: str, has_attention_nodes: bool) -> str:
    """The reason why the files or the options rule out the kernels, and what to do; empty if they do not."""
    if not has_attention_nodes:
        return "the model's attention nodes are inlined; export it without inlined functions"
    if backend != "onnxruntime":
        return f"backend {backend!r} has none; choose backend 'onnxruntime'"
    if provider not in PRECISIONS:
        return f"provider {provider!r} has none; choose provider 'cpu' or 'cuda'"
    if precision not in PRECISIONS[provider]:
        return f"the model is {precision}, for which the CPU has none; export it with --precision fp32"
    return ""


def refusal(error: Exception) -> str:
    """The message of an lfx op that refuses a node, inside an error of ONNX Runtime; empty if there is none."""
    match = re.search(r"lfx::(Banded|Global)Attention: .*", str(error))
    return match[0] if match else ""
