"""`promoting_by_metadata`: let torch.onnx insert type promotions without running the traced program again.

torch.onnx inserts a cast where an op has arguments of several dtypes. It runs the program with symbolic shapes to learn
the dtypes, which takes a third of the time of an export. The traced program has the same values as metadata.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx


@contextlib.contextmanager
def promoting_by_metadata() -> Iterator[None]:
    """Let the type promotion of torch.onnx read the values of calls from their metadata."""
    try:
        from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule
    except ImportError:  # private to torch
        yield
        return
    original = _TypePromotionInterpreter.run_node

    def run_node(interpreter: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return original(interpreter, node)
        rule = get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            with interpreter._set_current_node(node):
                interpreter._maybe_promote_node(node, rule)  # a changed node runs, and gets new metadata
        return node.meta["val"]

    _TypePromotionInterpreter.run_node = run_node  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        _TypePromotionInterpreter.run_node = original  # type: ignore[method-assign]
