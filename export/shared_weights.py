"""`save_models`: write ONNX files whose weights are in one file, which holds a weight of several files once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

_LEAST_BYTES = 1024  # smaller tensors stay in the ONNX file


def save_models(models: Mapping[str, ir.Model], folder: Path, weights: str) -> None:
    """Write ONNX files and their weights.

    Args:
        models: name of the ONNX file -> its model, which is changed: its weights become external.
        weights: name of the file of the weights.
    """
    initializers = [
        value
        for model in models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _LEAST_BYTES
    ]
    keys = [_storage(value.const_value) for value in initializers]
    tensors = {key: value.const_value for key, value in zip(keys, initializers, strict=True)}
    if tensors:
        written = ir.external_data.convert_tensors_to_external(list(tensors.values()), folder, weights)
        stored = dict(zip(tensors, written, strict=True))
    for key, value in zip(keys, initializers, strict=True):
        external = stored[key]
        value.const_value = ir.ExternalTensor(
            external.location,
            external.offset,
            external.length,
            external.dtype,
            shape=external.shape,
            name=value.name,
            base_dir=folder,
        )
    for name, model in models.items():
        ir.save(model, folder / name)


def _storage(tensor: Any) -> tuple[Any, ...]:
    """Return a key that two tensors have in common only if they are the same part of one torch tensor."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride()
    return (id(tensor),)
