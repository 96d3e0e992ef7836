"""What every backend is: a loaded model that answers a batch."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Backend(Protocol):
    """A loaded model.

    Attributes:
        name: library, version and device, for people.
        input_names, output_names: of the graph, in its order.
    """

    name: str
    input_names: list[str]
    output_names: list[str]

    def infer(self, feeds: Arrays) -> Arrays:
        """Run one batch; safe to call from several threads."""
        ...

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether it takes a batch of this shape."""
        ...


class AnyShape:
    """What every backend of ONNX files takes."""

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Any shape."""
        return True
