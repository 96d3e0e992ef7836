"""The interface of a backend: a loaded model that runs batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
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

    def infer(self, feeds: Arrays, outputs: Sequence[str] | None = None, *, on_device: bool = False) -> Arrays:
        """Run one batch. Thread-safe.

        Args:
            feeds: input name -> array.
            outputs: names of the outputs to return; None = all.
            on_device: on a GPU, return objects with `shape` and `__dlpack__` in place of arrays.
        Returns:
            Output name -> array, owned by the caller.
        """
        ...

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether the backend takes a batch of this shape."""
        ...


class TensorBackend(Backend, Protocol):
    """A backend whose outputs can be inputs of another run without a copy, such as cached keys and values.

    A tensor is an object of the backend's library; those of one library fit all its models.

    Attributes:
        broadcasts: whether an input whose batch is 1 fits a run whose other inputs have a larger batch.
    """

    broadcasts: bool

    def tensor(self, array: NDArray[Any]) -> Any:
        """The tensor of an array, which must not be changed while the tensor is used."""
        ...

    def array(self, tensor: Any) -> NDArray[Any]:
        """The array of a tensor; it may be a view of the tensor's memory."""
        ...

    def take(self, tensor: Any, rows: NDArray[np.int64]) -> Any:
        """A new tensor of these rows of a tensor, in this order; a row may be taken several times."""
        ...

    def infer_tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Like `infer`, with tensors in place of arrays. Thread-safe."""
        ...


class AnyShape:
    """Mixin of the backends that run ONNX files, which take batches of any shape."""

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Always True."""
        return True


class HostTensors:
    """Mixin of the backends that run ONNX files, whose products broadcast and whose tensors numpy can read."""

    broadcasts = True
    tensor: Callable[[NDArray[Any]], Any]
    array: Callable[[Any], NDArray[Any]]

    def take(self, tensor: Any, rows: NDArray[np.int64]) -> Any:
        """A copy of these rows."""
        return self.tensor(self.array(tensor)[rows])


class ArrayTensors(HostTensors):
    """Mixin of a backend whose tensors are numpy's arrays."""

    def tensor(self, array: NDArray[Any]) -> Any:
        """The array itself."""
        return array

    def array(self, tensor: Any) -> NDArray[Any]:
        """The array itself."""
        return np.asarray(tensor)
