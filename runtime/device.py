"""The first NVIDIA GPU of this machine, through cuda-python."""

from __future__ import annotations

from typing import Any

from lfx.errors import DependencyError, LfxError, require


def cudart() -> Any:
    """Import the CUDA runtime API of cuda-python.

    Raises:
        DependencyError: cuda-python is not installed.
    """
    return require("cuda.bindings.runtime", "gpu")


def compute_capability() -> str | None:
    """Compute capability of the first GPU, such as "sm90"; None without a GPU, a driver or cuda-python."""
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
    """Check the error code of a cuda-python call, and return the call's values.

    Args:
        result: (error code, values ...), as cuda-python returns it.
    Returns:
        The value; a tuple of several values; or None without values.
    Raises:
        LfxError: the call failed; the message has the name of the CUDA error.
    """
    error, *values = result
    if int(error) != 0:
        raise LfxError(f"CUDA failed: {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def require_gpu() -> str:
    """Return the compute capability of the first GPU, or raise.

    Raises:
        DependencyError: there is no GPU, no driver for it, or cuda-python is not installed.
    """
    cudart()
    capability = compute_capability()
    if capability is None:
        raise DependencyError(
            "this machine has no NVIDIA GPU, or no driver for it; run the plan on a machine with one, or the "
            "bundle on the CPU with backend='onnxruntime'"
        )
    return capability
