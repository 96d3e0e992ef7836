"""Graph pass: write GELU in the form that runtimes fuse."""

from __future__ import annotations

import onnx_ir as ir


def reorder_gelu(model: ir.Model) -> bool:
    """Rewrite `x · (0.5 · (1 + erf(x / √2)))`, torch.onnx's form, as `(x · (1 + erf(x / √2))) · 0.5`.

    ONNX Runtime fuses only the second form. Multiplication by 0.5 is exact, so the results are bit-identical.

    Returns:
        Whether the model was changed.
    """
    changed = False
    for outer in model.graph:
        if outer.op_type != "Mul" or outer.domain != "":
            continue
        x, product = outer.inputs
        inner = product.producer() if product is not None else None
        if x is None or product is None or inner is None or not _is_half_of_erf_sum(inner, x):
            continue
        if len(list(product.uses())) != 1:
            continue
        half = inner.inputs[0]
        inner.replace_input_with(0, x)
        outer.replace_input_with(0, product)
        outer.replace_input_with(1, half)
        changed = True
    return changed


def _is_half_of_erf_sum(node: ir.Node, x: ir.Value) -> bool:
    """Whether `node` is 0.5 · (erf(x / c) + 1)."""
    if node.op_type != "Mul" or node.inputs[0] is None or node.inputs[1] is None:
        return False
    constant = ir.convenience.get_const_tensor(node.inputs[0])
    if constant is None or constant.size != 1 or float(constant.numpy().reshape(())) != 0.5:
        return False
    total = node.inputs[1].producer()
    if total is None or total.op_type != "Add" or total.inputs[0] is None:
        return False
    erf = total.inputs[0].producer()
    if erf is None or erf.op_type != "Erf" or erf.inputs[0] is None:
        return False
    ratio = erf.inputs[0].producer()
    return ratio is not None and ratio.op_type == "Div" and ratio.inputs[0] is x
