"""Graph pass: store the weight of a linear layer transposed, as MatMul reads it, and remove its Transpose node."""

from __future__ import annotations

import onnx_ir as ir


def transpose_weights(model: ir.Model) -> bool:
    """Replace `Transpose(weight)` by an initializer `<weight>.T`, which holds the transposed weight.

    A weight that other ops read too (a decoder tied to the word embeddings) keeps its Transpose, so that it is stored
    once. The new tensor is lazy: each is computed when it is written, so that one at a time is in memory.

    Returns:
        Whether the model was changed.
    """
    initializers = model.graph.initializers
    changed = False
    for weight in list(initializers.values()):
        uses = list(weight.uses())
        tensor = weight.const_value
        if tensor is None or len(tensor.shape) != 2 or not uses:
            continue
        if not all(_swaps_axes(use.node) and use.node.graph is model.graph for use in uses):
            continue
        rows, columns = tensor.shape.numpy()

        def evaluate(source: ir.TensorProtocol = tensor) -> ir.TensorProtocol:
            return ir.tensor(source.numpy().T.copy(), dtype=source.dtype)

        stored = ir.Value(
            name=f"{weight.name}.T",
            shape=ir.Shape((columns, rows)),
            type=ir.TensorType(tensor.dtype),
            const_value=ir.LazyTensor(
                evaluate, dtype=tensor.dtype, shape=ir.Shape((columns, rows)), name=f"{weight.name}.T"
            ),
        )
        model.graph.register_initializer(stored)
        for use in uses:
            use.node.outputs[0].replace_all_uses_with(stored)
            model.graph.remove(use.node, safe=True)
        assert weight.name is not None
        del initializers[weight.name]
        changed = True
    return changed


def _swaps_axes(node: ir.Node) -> bool:
    """Return whether a node is a Transpose that swaps the two axes of a matrix, as one without `perm` does."""
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and (permutation is None or list(permutation.as_ints()) == [1, 0])
