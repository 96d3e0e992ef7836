"""The library of ONNX Runtime's custom ops, which run attention with lfx's own kernels."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lfx

KERNELS = ("auto", "fused", "function")
LIBRARIES = ("liblfx_onnxruntime.so", "liblfx_onnxruntime.dylib")
# The precisions of models whose attention is float32: those of int8 have linear layers in int8.
CPU_PRECISIONS = ("fp32", "int8")


class NoKernelError(Exception):
    """The reason why lfx's kernels cannot run a model, and what to do."""


def library() -> Path:
    """The path of the installed library.

    Raises:
        NoKernelError: lfx was installed without it.
    """
    for folder in lfx.__path__:
        for name in LIBRARIES:
            path = Path(folder) / "_lib" / name
            if path.is_file():
                return path
    if sys.platform == "win32":
        raise NoKernelError("lfx has no kernels for Windows; run it on Linux or macOS")
    raise NoKernelError(f"{LIBRARIES[0]} is not installed; install lfx again where there is a C++ compiler")


def reason_for_function(backend: str, provider: str, precision: str, has_attention_nodes: bool) -> str:
    """Why a model has no kernels, and what to do, as far as its files and the options say; empty if it may have."""
    if not has_attention_nodes:
        return "the model's attention nodes are inlined; export it without inlined functions"
    if backend != "onnxruntime":
        return f"backend {backend!r} has none; choose backend 'onnxruntime'"
    if provider != "cpu":
        return f"provider {provider!r} has none; choose provider 'cpu'"
    if precision not in CPU_PRECISIONS:
        return f"the model is {precision}, for which the CPU has none; export it with --precision fp32"
    return ""


def refusal(error: Exception) -> str:
    """The message of an lfx op that refuses a node, inside an error of ONNX Runtime; empty if there is none."""
    found = re.search(r"lfx::(Banded|Global)Attention: .*", str(error))
    return found[0] if found else ""
