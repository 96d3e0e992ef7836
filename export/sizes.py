"""Check that the traced graph, which has one path, is valid for all batch sizes and sequence lengths.

torch.export records its assumptions about the sizes: ranges, and conditions such as `sequence != 100` from a branch on
the shape. The exported ONNX file does not check them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._sympy.printers import PythonPrinter

from lfx.errors import ExportError
from lfx.signature import Signature

# Sizes for which a condition is evaluated: all sequence lengths up to _LONGEST, and these of the other axes.
_LONGEST = 16384
_BATCH_SIZES = range(2, 1025)
_FAKE_IMPLEMENTATIONS = "_subclasses/fake_impls.py"
_FEW_SIZES = range(2, 10)  # for an axis other than the sequence, in a condition on several axes


def check_sizes(program: torch.onnx.ONNXProgram, signature: Signature, multiple_of: int) -> None:
    """Check that the traced graph is valid for all batch sizes and sequence lengths of the signature.

    Size 1 is checked by the comparison of the exported file with PyTorch.

    Args:
        multiple_of: the number that sequence lengths are multiples of.
    Raises:
        ExportError: the model takes another branch at some size, or computes with one size as a constant.
    """
    assert program.exported_program is not None
    first = next(node for node in program.exported_program.graph.nodes if node.name.startswith("tensors"))
    sizes = dict(zip(signature.inputs[0].shape, first.meta["val"].shape, strict=True))
    for axis, size in sizes.items():
        if not isinstance(size, torch.SymInt):
            raise ExportError(
                f"{signature.architecture} treats the {axis} of the traced example, {size}, as a constant; compute "
                "with the shapes of its tensors, without int() or a table of sizes"
            )
        _check_range(axis, program.exported_program.range_constraints.get(size.node.expr), signature, multiple_of)
    environment = first.meta["val"].fake_mode.shape_env
    asserts = itertools.chain.from_iterable(environment.deferred_runtime_asserts.values())
    # Conditions in torch's fake implementations of operators, as for nn.Conv1d, choose a memory layout and no values.
    guards = [guard.expr for guard in environment.guards if _FAKE_IMPLEMENTATIONS not in str(guard.sloc)]
    for condition in (*guards, *(entry.expr for entry in asserts)):
        _check_condition(condition, environment.backed_var_to_val, sizes, signature, multiple_of)


def _check_range(axis: Any, bounds: Any, signature: Signature, multiple_of: int) -> None:
    if bounds is None:
        return
    limit = signature.max_seqlen if axis == "sequence" else None
    low = int(bounds.lower) if bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds.upper.is_Integer else None
    if low > max(multiple_of, 2) or (high is not None and (limit is None or high < limit)):
        cure = f"export with max_seqlen={high}" if axis == "sequence" and high is not None and low < 2 else ""
        raise ExportError(
            f"{signature.architecture} takes another branch outside {axis} {low} to {high or 'any'}, but a graph "
            f"has the same branch for all sizes; {cure or 'remove the branch on the shape from its forward'}"
        )


def _check_condition(condition: Any, examples: Any, sizes: Any, signature: Signature, multiple_of: int) -> None:
    """Evaluate a condition of torch.export for the sizes of the signature.

    Args:
        examples: symbol -> its size in the traced example, whose axes have different sizes.
        sizes: axis -> its symbolic size.
    Raises:
        ExportError: the condition is false for a size.
    """
    axes = {examples[size.node.expr]: axis for axis, size in sizes.items()}
    symbols = sorted(condition.free_symbols, key=str)
    if not symbols or not all(symbol in examples and examples[symbol] in axes for symbol in symbols):
        return  # it depends on the data, such as the number of global tokens
    names = [axes[examples[symbol]] for symbol in symbols]
    holds = eval(f"lambda {', '.join(map(str, symbols))}: {PythonPrinter().doprint(condition)}", {"math": math})
    for shape in _shapes(dict.fromkeys(names), signature, multiple_of):
        if not holds(*(shape[name] for name in names)):
            text = ", ".join(f"{axis} {size}" for axis, size in shape.items())
            raise ExportError(
                f"{signature.architecture} takes another branch at {text}, but a graph has the same branch for all "
                "sizes; remove the branch on the shape from its forward"
            )


def _shapes(axes: dict[Any, None], signature: Signature, multiple_of: int) -> Iterator[dict[Any, int]]:
    """Yield the sizes of some axes for which a condition is evaluated."""
    longest = min(signature.max_seqlen or _LONGEST, _LONGEST)
    ranges = []
    for axis in axes:
        if axis == "sequence":
            ranges.append(range(max(multiple_of, 2), longest + 1, multiple_of))
        else:
            ranges.append(_BATCH_SIZES if len(axes) == 1 else _FEW_SIZES)
    for sizes in itertools.product(*ranges):
        yield dict(zip(axes, sizes, strict=True))
