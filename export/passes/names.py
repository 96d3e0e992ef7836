"""Graph passes: name nodes after torch modules, as in `encoder.layer.0.attention.self.query/MatMul`, and name axes."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_after_modules(model: ir.Model, prefix: str) -> bool:
    """Name nodes and their outputs after the module that they were traced from.

    Args:
        model: a graph from torch.onnx, whose nodes have the module scopes as metadata. A node without them (from an
            inlined helper) takes the scope of the previous node.
        prefix: the attribute path that is removed from the start of each scope, such as `model.`.
    Returns:
        True: the model is always changed.
    """
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    taken = {value.name for value in (*model.graph.inputs, *model.graph.outputs)} | model.graph.initializers.keys()
    seen: Counter[str] = Counter()
    scope = ""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        scopes = node.metadata_props.get(_SCOPES)
        if scopes is not None:
            module = ast.literal_eval(scopes)[-2:-1]
            scope = (module[0] if module else "").removeprefix(prefix.rstrip(".")).removeprefix(".")
            scope = "" if scope.startswith("_empty_nn_module_stack") else scope
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        node.name = base if seen[base] == 0 else f"{base}_{seen[base]}"
        seen[base] += 1
        for i, value in enumerate(node.outputs):
            if id(value) not in kept:
                name = f"{node.name}_output" if i == 0 else f"{node.name}_output_{i}"
                while name in taken:
                    name += "_"
                value.name = name
        for key in [k for k in node.metadata_props if k.startswith("pkg.torch") or k == "namespace"]:
            del node.metadata_props[key]
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    return True


def rename_dimensions(model: ir.Model, known: set[str], unknown: str) -> bool:
    """Rename the symbolic dimensions that torch.onnx generated (`u0`, `s7`) to `unknown`; expressions become unnamed.

    A second one becomes `unknown`_1, since a runtime may share memory between dimensions of one name.

    Args:
        known: names that are kept.
    Returns:
        Whether the model was changed.
    """
    changed = False
    names: dict[str, str] = {}
    for value in _values(model.graph):
        if value.shape is None:
            continue
        axes: list[int | str | None] = [size if isinstance(size, int) else size.value for size in value.shape]
        renamed = [axis if isinstance(axis, int) or axis in known else _rename(axis, unknown, names) for axis in axes]
        if renamed != axes:
            value.shape = ir.Shape(renamed)
            changed = True
    return changed


def _rename(axis: str | None, unknown: str, names: dict[str, str]) -> str | None:
    if axis is None or axis[:1] not in "us" or not axis[1:].isdigit():
        return None
    return names.setdefault(axis, f"{unknown}_{len(names)}" if names else unknown)


def _values(graph: ir.Graph) -> list[ir.Value]:
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    return [*graph.inputs, *(value for node in nodes for value in node.outputs)]
