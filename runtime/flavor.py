"""The two TensorRTs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from lfx.checks import one_of
from lfx.errors import BuildError, DependencyError, require


@dataclass(frozen=True)
class Flavor:
    """One of the two TensorRTs: its module, the extra that brings it, and the wheel folder of its libraries."""

    module: str
    extra: str


FLAVORS = {"tensorrt": Flavor("tensorrt", "gpu"), "tensorrt-rtx": Flavor("tensorrt_rtx", "rtx")}


def choose_flavor(asked: str | None) -> str:
    """The flavor that was asked for, or the first that is installed.

    Raises:
        BuildError: there is no such flavor. DependencyError: it is not installed.
    """
    if asked is not None:
        one_of(asked, "flavor", FLAVORS, BuildError)
        require(FLAVORS[asked].module, FLAVORS[asked].extra)
        return asked
    for name, flavor in FLAVORS.items():
        if find_spec(flavor.module) is not None:
            return name
    raise DependencyError(
        "no TensorRT is installed; install one with: pip install 'longformer-lfx[gpu]' (TensorRT), or "
        "pip install 'longformer-lfx[rtx]' (TensorRT-RTX)"
    )
