"""Graph pass: store the weight of a linear layer transposed, as MatMul reads it, and remove its Transpose node."""

from __future__ import annotations

import onnx_ir as ir


def transpose_weights(model: ir.Model) -> bool:
    """Replace `Transpose(weight)` by an initializer `<weight>.T`, which holds the transposed weight.

    A weight that other ops read too (a decoder tied to the word embeddings) keeps its Transpose, so that it is stored
    once. A square one that products read as it is gets a copy `<weight>.transposed` all the same: OpenVINO (2026.4)
    takes the packed weight of one product for that of the other. The new tensor is lazy: each is computed when it is
    written, so that one at a time is in memory.

    Returns:
        Whether the model was changed.
    """
    initializers = model.graph.initializers
    changed = False
    weights = list(initializers.values())
    for weight in weights:
        tensor = weight.const_value
        if tensor is None or len(tensor.shape) != 2:
            continue
        swapped = [use for use in weight.uses() if use.node.graph is model.graph and _is_swapped(*use)]
        others = [use.node for use in weight.uses() if use not in swapped]
        rows, columns = tensor.shape.numpy()
        is_moved = not others and any(node.op_type == "Transpose" for node, _ in swapped)
        is_copied = bool(swapped) and rows == columns and any(node.op_type != "Gather" for node in others)
        if not is_moved and not is_copied:
            continue
        name = f"{weight.name}.T" if is_moved else f"{weight.name}.transposed"

        def evaluate(source: ir.TensorProtocol = tensor) -> ir.TensorProtocol:
            return ir.tensor(source.numpy().T.copy(), dtype=source.dtype)

        stored = ir.Value(
            name=name,
            shape=ir.Shape((columns, rows)),
            type=ir.TensorType(tensor.dtype),
            const_value=ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape((columns, rows)), name=name),
        )
        model.graph.register_initializer(stored)
        for node, index in swapped:
            if node.op_type == "Gemm":
                node.replace_input_with(index, stored)
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
            else:
                node.outputs[0].replace_all_uses_with(stored)
                model.graph.remove(node, safe=True)
        weights.append(stored)  # which the graph may transpose again
        assert weight.name is not None
        if is_moved:
            del initializers[weight.name]
        changed = True
    return changed


def _is_swapped(node: ir.Node, index: int) -> bool:
    """Return whether a node swaps the two axes of a matrix, its input `index`: a Transpose, or a Gemm with `transB`."""
    if node.op_type == "Gemm":
        attribute = node.attributes.get("transB")
        return index == 1 and attribute is not None and attribute.as_int() == 1
    permutation = node.attributes.get("perm")  # a Transpose without it swaps them
    return node.op_type == "Transpose" and (permutation is None or list(permutation.as_ints()) == [1, 0])
