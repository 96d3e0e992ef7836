"""Forty functions, each of which calls the next one twice: a file of kilobytes is a graph of 10^12 nodes."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from lfx.manifest import MODEL
from lfx.runtime import Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """A model that lfx exported, with a node added that calls the first function."""
    source = make_bundle(folder / "bundle") / MODEL
    model = onnx.load(source)
    for number in range(40):
        inner = f"F{number + 1}" if number < 39 else "Identity"
        domain = "x" if number < 39 else ""
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        versions = [helper.make_opsetid("", 17), helper.make_opsetid("x", 1)]
        model.functions.append(helper.make_function("x", f"F{number}", ["a"], ["c"], nodes, versions))
    model.opset_import.append(helper.make_opsetid("x", 1))
    model.graph.node.append(helper.make_node("F0", ["input_ids"], ["unused"], domain="x"))
    onnx.save(model, folder / "model.onnx")
    return refused(Engine, folder / "model.onnx")
