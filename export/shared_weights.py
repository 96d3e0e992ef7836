"""`save_models`: write ONNX files whose weights are in one file, which holds a weight of several files once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

LEAST_BYTES = 1024  # smaller tensors stay in the ONNX file


def save_models(models: Mapping[str, ir.Model], folder: Path, weights: str) -> None:
    """Write ONNX files and their weights.

    Args:
        models: name of the ONNX file -> its model, which is changed: its weights become external.
        weights: name of the file of the weights.
    """
    stored: dict[tuple[Any, ...], ir.TensorProtocol] = {}
    external: list[tuple[ir.Value, tuple[Any, ...]]] = []
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= LEAST_BYTES:
                stored[_storage(tensor)] = tensor
                external.append((value, _storage(tensor)))
    if stored:
        written = ir.external_data.convert_tensors_to_external(list(stored.values()), folder, weights)
        parts = dict(zip(stored, written, strict=True))
        for value, key in external:
            value.const_value = _named(parts[key], str(value.name))
    for name, model in models.items():
        remove_declarations(model)
        ir.save(model, folder / name)


def remove_declarations(model: ir.Model) -> None:
    """Leave types and shapes of initializers to their tensors, so that no value_info repeats them.

    ONNX Runtime's `quantize_dynamic` transposes the weights of Gemm nodes, and then refuses the shape in a value_info.
    """
    for graph in model.graphs():
        for value in {*graph.initializers.values()} - {*graph.inputs, *graph.outputs}:
            value.type = value.shape = None


def _named(tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
    """Return the same part of a file under the name of an initializer."""
    location, base_dir = tensor.location, tensor.base_dir
    return ir.ExternalTensor(
        location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=base_dir
    )


def _storage(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    """Return a key that two tensors have in common only if they are the same part of one torch tensor."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride()
    return (id(tensor),)
