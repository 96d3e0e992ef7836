"""An lfx model in Triton's Python backend. `lfx triton` copies this file; what it runs is in config.pbtxt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # a module of the server

from lfx.errors import InputError, LfxError, one_line
from lfx.runtime.triton.requests import COUNTERS, Request, TritonModel, released


class TritonPythonModel:
    """What the backend calls: one object for each instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model and run it once. An error is the reason that the server gives for the model."""
        self._model = TritonModel.open(args)
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._counters = {}
        self._families = []  # the server drops the metrics of a family that is collected
        for name, description in COUNTERS.items():
            family = pb_utils.MetricFamily(
                name=f"lfx_{name}_total", description=description, kind=pb_utils.MetricFamily.COUNTER
            )
            self._families.append(family)
            self._counters[name] = family.Metric(labels=labels)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in batches of sequences of similar lengths; a bad request gets its own error."""
        results = self._model.answer([_read(request) for request in requests])
        for name, count in self._model.counted().items():
            self._counters[name].increment(count)
        return [_response(result) for result in results]

    def finalize(self) -> None:
        """Free the model."""
        self._model.close()


def _read(request: Any) -> Request | InputError:
    try:
        # Not as_numpy(): built for numpy 1, as in Triton 2.51, it gives arrays with strides of 0 where numpy is 2.
        inputs = {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}
        parameters = json.loads(request.parameters() or "{}")
        return Request(inputs, frozenset(request.requested_output_names()), parameters)
    except UnicodeDecodeError:
        return InputError("a parameter of the request is not UTF-8; convert it first")
    except Exception as error:  # raised here, it would be the answer of all requests
        return InputError(f"the request cannot be read: {one_line(error)}")


def _response(result: Any) -> Any:
    if isinstance(result, LfxError):
        code = pb_utils.TritonError.INVALID_ARG if isinstance(result, InputError) else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), code))
    tensors = []
    for name, array in result.items():
        capsule = np.ascontiguousarray(array).__dlpack__()
        tensors.append(pb_utils.Tensor.from_dlpack(name, capsule))
        released(capsule)
    return pb_utils.InferenceResponse(tensors)
