"""The two flavors of TensorRT: TensorRT and TensorRT-RTX."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from lfx.checks import one_of
from lfx.errors import BuildError, DependencyError, require


@dataclass(frozen=True)
class Flavor:
    """One flavor of TensorRT: its Python module, and the extra of lfx that installs it."""

    module: str
    extra: str


FLAVORS = {"tensorrt": Flavor("tensorrt", "gpu"), "tensorrt-rtx": Flavor("tensorrt_rtx", "rtx")}


def choose_flavor(requested: str | None) -> str:
    """Return the name of the requested flavor, or of the first installed one.

    Args:
        requested: a key of `FLAVORS`; None = the first that is installed.
    Raises:
        BuildError: there is no such flavor.
        DependencyError: the flavor is not installed, or none is.
    """
    if requested is not None:
        one_of(requested, "flavor", FLAVORS, BuildError)
        require(FLAVORS[requested].module, FLAVORS[requested].extra)
        return requested
    for name, flavor in FLAVORS.items():
        if find_spec(flavor.module) is not None:
            return name
    raise DependencyError(
        "no TensorRT is installed; install one with: pip install 'longformer-lfx[gpu]' (TensorRT), or "
        "pip install 'longformer-lfx[rtx]' (TensorRT-RTX)"
    )
