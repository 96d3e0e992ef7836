"""One initializer for each small constant, named after its value."""

from __future__ import annotations

import itertools

import onnx_ir as ir


def share_constants(model: ir.Model, weights: set[str]) -> bool:
    """Merge equal constants and call them `constant/int64_1`, `constant/float_0.5`, `constant/int64_2x3`.

    Args:
        weights: names of initializers that are the model's own, and stay as they are.
    """
    initializers = model.graph.initializers
    first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    taken = set(weights)
    changed = False
    for name, value in list(initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None:
            continue
        changed = True
        array = tensor.numpy()
        key = (tensor.dtype.name, array.shape, array.tobytes())
        if key in first:
            value.replace_all_uses_with(first[key])
            del initializers[name]
            continue
        first[key] = value
        label = (
            # float, since a bfloat16 of ml_dtypes before 0.6 takes no format.
            "_".join(f"{float(item):g}" for item in array.reshape(-1))
            if array.size <= 4
            else "x".join(map(str, array.shape))
        )
        rank = f"[{array.size}]" if array.ndim and array.size <= 4 else ""
        wanted = f"constant/{tensor.dtype.name.lower()}{rank}_{label}"
        value.name = _free(wanted, taken)
        taken.add(value.name)
    return changed


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number after it the first that is not taken."""
    if name not in taken:
        return name
    return next(numbered for i in itertools.count(1) if (numbered := f"{name}_{i}") not in taken)
