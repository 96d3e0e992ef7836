"""Graph pass: merge equal constants into one initializer, named after its value."""

from __future__ import annotations

import itertools

import onnx_ir as ir


def share_constants(model: ir.Model, weights: set[str]) -> bool:
    """Merge equal constants and name them `constant/int64_1`, `constant/float_0.5` or, by shape, `constant/int64_2x3`.

    Args:
        weights: names of the initializers that are not changed.
    Returns:
        Whether the model was changed.
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
            # float(): a bfloat16 of ml_dtypes before 0.6 has no __format__.
            "_".join(f"{float(item):g}" for item in array.reshape(-1))
            if array.size <= 4
            else "x".join(map(str, array.shape))
        )
        rank = f"[{array.size}]" if array.ndim and array.size <= 4 else ""
        value.name = _unique(f"constant/{tensor.dtype.name.lower()}{rank}_{label}", taken)
        taken.add(value.name)
    return changed


def _unique(name: str, taken: set[str]) -> str:
    """Return the name, with the lowest number appended that makes it unique if it is taken."""
    if name not in taken:
        return name
    return next(numbered for i in itertools.count(1) if (numbered := f"{name}_{i}") not in taken)
