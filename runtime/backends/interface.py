"""The interface of a backend: a loaded model that runs batches."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Backend(Protocol):
    """A loaded model.

    Its class is called with the path of an ONNX file first, and raises DependencyError if the library is not installed
    and ArtifactError if the file cannot be loaded. `infer` raises LfxError.

    Attributes:
        name: library, version and device, for display.
        input_names, output_names: names of the graph's inputs and outputs, in its order.
    """

    name: str
    input_names: list[str]
    output_names: list[str]

    def infer(self, feeds: Arrays) -> Arrays:
        """Run one batch, input name -> array; returns output name -> array. Thread-safe."""
        ...

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether the backend takes a batch of this shape."""
        ...


class AnyShape:
    """Mixin of the backends that run ONNX files, which take batches of any shape."""

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Always True."""
        return True
