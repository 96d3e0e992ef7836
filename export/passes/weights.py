"""Store the weight of a linear layer the way MatMul reads it, so that no Transpose is left to run or to fold."""

from __future__ import annotations

import onnx_ir as ir


def transpose_weights(model: ir.Model) -> bool:
    """Replace `Transpose(weight)` by a weight that is stored transposed, under the name `<weight>.T`.

    A weight with another reader (a decoder tied to the word embeddings) keeps its one copy and its Transpose.
    The new tensor is lazy: it is computed when it is written, one at a time.
    """
    initializers = model.graph.initializers
    changed = False
    for weight in list(initializers.values()):
        uses = list(weight.uses())
        tensor = weight.const_value
        if tensor is None or len(tensor.shape) != 2 or not uses:
            continue
        if not all(use.node.op_type == "Transpose" and use.node.graph is model.graph for use in uses):
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
