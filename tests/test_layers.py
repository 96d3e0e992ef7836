"""Direction of imports: core ← runtime ← ray ← torch ← export ← cli, no cycle; nothing imports tests or scripts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lfx"
# Each may import those before it, and itself.
LAYERS = ("core", "runtime", "ray", "torch", "export", "cli")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all modules of the package; the two links are followed."""
    files = {}
    folders = [SOURCE]
    while folders:
        folder = folders.pop()
        folders += [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))]
        for path in folder.glob("*.py"):
            parts = ("lfx", *path.relative_to(SOURCE).with_suffix("").parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


MODULES = modules()


def layer(module: str) -> str:
    """The layer that a module belongs to."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in LAYERS else "core"


def imports(module: str) -> Iterator[str]:
    """The modules that a module imports, inside functions too; those for type checkers are left out."""
    for node in _nodes(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _nodes(node)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_its_own_layer_and_those_below(module: str) -> None:
    allowed = LAYERS[: LAYERS.index(layer(module)) + 1]
    for name in imports(module):
        assert name.split(".")[0] not in ("tests", "scripts")
        if name.split(".")[0] == "lfx":
            assert layer(name) in allowed, f"{module} imports {name}"


def test_imports_have_no_cycle() -> None:
    graph = {module: {name for name in imports(module) if name in MODULES} for module in MODULES}
    # A package re-exports names of its submodules, and they do not import from it.
    while leaves := [module for module, names in graph.items() if not names & graph.keys() - {module}]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import one another: {', '.join(sorted(graph))}"


def test_the_layers_are_found() -> None:
    assert {layer(module) for module in MODULES} == set(LAYERS)
    assert layer("lfx.runtime.engine") == "runtime"
    assert "lfx.checks" in set(imports("lfx.runtime.engine"))
