"""`config.pbtxt`, which tells Triton a model's tensors, batching and instances."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfx.errors import ArtifactError
from lfx.signature import TensorSpec

_DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}


@dataclass(frozen=True)
class Instances:
    """The processes or threads that run a model.

    Attributes:
        count: number of them, for each GPU if they run on GPUs.
        gpus: numbers of the GPUs; empty = all that the server sees. None = the CPU.
    """

    count: int = 1
    gpus: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The content of a `config.pbtxt`.

    Attributes:
        name: name of the model.
        backend: Triton's backend: "python", "onnxruntime" or "tensorrt".
        inputs, outputs: the tensors, batch axis included.
        any_inputs: whether a request may leave inputs out, and requests of different lengths may be in one batch.
        max_batch: largest number of sequences of a batch.
        max_delay_us: longest time that a request waits for others, in microseconds.
        max_pending: largest number of waiting requests; the next one is refused.
        instances: where the model runs.
        profiles: numbers of the optimization profiles of a plan that are used.
        model_file: name of the file in the version's folder.
        custom_ops: path of a library of custom ops for ONNX Runtime.
        parameters: name -> value, for the backend.
    """

    name: str
    backend: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    any_inputs: bool
    max_batch: int
    max_delay_us: int
    max_pending: int
    instances: Instances
    profiles: Sequence[int] = ()
    model_file: str | None = None
    custom_ops: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file's text.

        Raises:
            ArtifactError: Triton has no data type for the dtype of a tensor.
        """
        lines = [f"name: {quoted(self.name)}", f"backend: {quoted(self.backend)}"]
        if self.model_file is not None:
            lines.append(f"default_model_filename: {quoted(self.model_file)}")
        lines.append(f"max_batch_size: {self.max_batch}")
        for spec in self.inputs:
            lines += _tensor("input", spec, ["optional: true", "allow_ragged_batch: true"] if self.any_inputs else [])
        for spec in self.outputs:
            lines += _tensor("output", spec, [])
        lines += [
            "dynamic_batching {",
            f"  max_queue_delay_microseconds: {self.max_delay_us}",
            f"  default_queue_policy {{ max_queue_size: {self.max_pending} }}",
            "}",
            "instance_group [",
            *_instances(self.instances, self.profiles),
            "]",
        ]
        if self.custom_ops is not None:
            lines.append(f"model_operations {{ op_library_filename: {quoted(self.custom_ops)} }}")
        for name, value in self.parameters.items():
            lines.append(f"parameters {{ key: {quoted(name)} value {{ string_value: {quoted(value)} }} }}")
        return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A string of protobuf's text format."""
    return json.dumps(text, ensure_ascii=False)


def _tensor(group: str, spec: TensorSpec, flags: Iterable[str]) -> list[str]:
    if spec.dtype not in _DATA_TYPES:
        raise ArtifactError(
            f"{group} {spec.name} has the dtype {spec.dtype}, which Triton does not have; export a model with another"
        )
    dims = ", ".join(str(axis if isinstance(axis, int) else -1) for axis in spec.shape[1:])
    fields = [f"name: {quoted(spec.name)}", f"data_type: {_DATA_TYPES[spec.dtype]}", f"dims: [ {dims} ]", *flags]
    # A tensor without other axes than the batch has the shape (batch, 1) in Triton.
    if not dims:
        fields[2] = "dims: [ 1 ] reshape { shape: [ ] }"
    return [f"{group} {{", *(f"  {line}" for line in fields), "}"]


def _instances(instances: Instances, profiles: Sequence[int]) -> list[str]:
    fields: list[Any] = [f"count: {instances.count}"]
    if instances.gpus is None:
        fields.append("kind: KIND_CPU")
    else:
        fields.append("kind: KIND_GPU")
        if instances.gpus:
            fields.append(f"gpus: [ {', '.join(map(str, instances.gpus))} ]")
    if profiles:
        fields.append(f"profile: [ {', '.join(quoted(str(number)) for number in profiles)} ]")
    return ["  {", *(f"    {line}" for line in fields), "  }"]
