"""The NVIDIA GPU of this machine, through cuda-python."""

from __future__ import annotations

from typing import Any

from lfx.errors import DependencyError, LfxError, require


def cudart() -> Any:
    """The CUDA runtime.

    Raises:
        DependencyError: cuda-python is not installed.
    """
    return require("cuda.bindings.runtime", "gpu")


def compute_capability() -> str | None:
    """Of the first GPU, such as "sm90"; None where there is no GPU, no driver, or no cuda-python to ask."""
    try:
        cuda = cudart()
        error, count = cuda.cudaGetDeviceCount()
        if int(error) != 0 or count < 1:
            return None
        attributes = cuda.cudaDeviceAttr
        major = check(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, 0))
        minor = check(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMinor, 0))
    except (LfxError, RuntimeError, ImportError):
        return None
    return f"sm{major}{minor}"


def check(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-python call, which returns its error code in front.

    Raises:
        LfxError: the call failed; says with which CUDA error.
    """
    error, *values = result
    if int(error) != 0:
        raise LfxError(f"CUDA failed: {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def require_gpu() -> str:
    """The compute capability of the first GPU.

    Raises:
        DependencyError: there is no GPU, or no driver for it.
    """
    cudart()
    found = compute_capability()
    if found is None:
        raise DependencyError(
            "this machine has no NVIDIA GPU, or no driver for it; run the plan where there is one, or the bundle on "
            "the CPU with backend='onnxruntime'"
        )
    return found
