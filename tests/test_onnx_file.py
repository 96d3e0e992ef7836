"""`read_header` compared with the onnx package."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.inliner import inline_local_functions

from lfx.errors import ArtifactError
from lfx.manifest import MODEL, WEIGHTS
from lfx.onnx_file import Header, read_header
from tests.conftest import MakeBundle


def external(name: str, location: str) -> TensorProto:
    tensor = helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def model_with_weights_everywhere() -> onnx.ModelProto:
    """A model with one external tensor in each ONNX field that can have one."""
    branch = helper.make_graph([], "branch", [], [], initializer=[external("b", "branch.bin")])
    inner = helper.make_node("Constant", [], ["c"], value=external("c", "constant.bin"))
    many = helper.make_node("Other", [], ["d"], domain="x", tensors=[external("d", "list.bin")])
    deep = helper.make_node("If", ["c"], ["e"], then_branch=branch, else_branch=branch)
    graphs = helper.make_node("Other", [], ["f"], domain="x", graphs=[branch])
    graph = helper.make_graph([inner, many, deep, graphs], "g", [], [], initializer=[external("a", "graph.bin")])
    sparse = onnx.SparseTensorProto(dims=[1])
    sparse.values.CopyFrom(external("s", "values.bin"))
    sparse.indices.CopyFrom(external("i", "indices.bin"))
    graph.sparse_initializer.append(sparse)
    body = helper.make_node("Constant", [], ["o"], value=external("o", "function.bin"))
    default = helper.make_attribute("value", external("v", "default.bin"))
    function = helper.make_function("x", "F", [], ["o"], [body], [helper.make_opsetid("", 17)])
    function.attribute_proto.append(default)
    model = helper.make_model(graph, functions=[function])
    training = model.training_info.add()
    training.initialization.initializer.append(external("t", "training.bin"))
    helper.set_model_props(model, {"other": "no", "lfx": "größe"})
    return model


def test_weights_are_found_in_all_fields_that_can_have_them(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model_with_weights_everywhere().SerializeToString())
    locations = ("graph", "branch", "constant", "list", "values", "indices", "function", "default", "training")
    assert read_header(path) == Header("größe", frozenset(f"{location}.bin" for location in locations))


@pytest.mark.parametrize("options", [{}, {"inline_functions": True}, {"precision": "fp16"}], ids=str)
def test_an_exported_model_is_read_as_onnx_reads_it(options: dict[str, str], bundle: MakeBundle) -> None:
    path = bundle(**options) / MODEL
    model = onnx.load(path, load_external_data=False)
    metadata = next(entry.value for entry in model.metadata_props if entry.key == "lfx")
    has_attention_nodes = not options.get("inline_functions", False)
    assert read_header(path) == Header(metadata, frozenset({WEIGHTS}), has_attention_nodes)


def test_a_model_with_inline_weights_has_no_weight_files(tmp_path: Path) -> None:
    tensor = helper.make_tensor("a", TensorProto.FLOAT, [4000], np.arange(4000.0))
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], initializer=[tensor])), tmp_path / "m.onnx")
    assert read_header(tmp_path / "m.onnx") == Header(None, frozenset())


def test_two_entries_of_lfx_metadata_are_refused(tmp_path: Path) -> None:
    model = model_with_weights_everywhere()
    model.metadata_props.add(key="lfx", value="other")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="two entries of lfx metadata"):
        read_header(tmp_path / "m.onnx")


def calling(calls: dict[str, list[str]], graph: list[str]) -> bytes:
    """A model whose graph and functions have one node for each name that they call, the last one in a subgraph."""

    def nodes(names: list[str]) -> list[onnx.NodeProto]:
        protos = [helper.make_node(name, [], [f"o{i}"], domain="x" * (name in calls)) for i, name in enumerate(names)]
        inner = helper.make_graph(protos[-1:], "branch", [], [])
        return [*protos[:-1], helper.make_node("If", ["c"], ["y"], then_branch=inner)]

    versions = [helper.make_opsetid("", 17), helper.make_opsetid("x", 1)]
    functions = [helper.make_function("x", name, [], ["y"], nodes(names), versions) for name, names in calls.items()]
    graph_proto = helper.make_graph(nodes(graph), "g", [], [])
    return helper.make_model(graph_proto, functions=functions, opset_imports=versions).SerializeToString()


def count(graph: onnx.GraphProto) -> int:
    """Number of nodes, nodes of subgraphs included."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(map(count, inner))


def test_nodes_are_counted_with_functions_inlined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = calling({"A": ["B", "B", "Add"], "B": ["Neg"], "Unused": ["A"] * 50}, ["A", "B", "A"])
    (tmp_path / "m.onnx").write_bytes(content)
    inlined = count(inline_local_functions(onnx.load_from_string(content)).graph)
    assert inlined == 15
    monkeypatch.setattr("lfx.onnx_file._MAX_NODES", inlined - 1)
    with pytest.raises(ArtifactError, match="more than 14 nodes once its functions are inlined"):
        read_header(tmp_path / "m.onnx")
    monkeypatch.setattr("lfx.onnx_file._MAX_NODES", inlined)
    read_header(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("calls", "why"),
    [
        ({f"F{i}": [f"F{i + 1}"] * 4 for i in range(60)}, "more than 200,000 nodes"),
        ({"F0": ["F1", "F1"], "F1": ["F0", "F0"]}, "too deeply"),
        ({f"F{i}": [f"F{i + 1}"] for i in range(5000)}, "too deeply"),
    ],
    ids=["multiplied", "of itself", "chained"],
)
def test_recursive_functions_are_refused(calls: dict[str, list[str]], why: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(calling(calls, ["F0", "F0"]))
    with pytest.raises(ArtifactError, match=why):
        read_header(tmp_path / "m.onnx")


def test_two_functions_of_one_name_are_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(calling({"A": ["Add"]}, ["A"]))
    model.functions.append(model.functions[0])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="defined twice"):
        read_header(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"fox\n", bytes(1000), b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x3a\x05\x0a"]
)
def test_a_file_that_is_no_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.onnx is no ONNX file") as caught:
        read_header(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_cut_or_changed_file_is_read_or_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    original = (bundle() / MODEL).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(original[: int(random.integers(len(original)))] if random.random() < 0.3 else original)
        for _ in range(int(random.integers(1, 5))):
            changed[int(random.integers(len(changed)))] = int(random.integers(256))
        (tmp_path / "m.onnx").write_bytes(changed)
        try:
            read_header(tmp_path / "m.onnx")
        except ArtifactError:
            refused += 1
    assert refused > 10


def test_a_field_number_that_protobuf_would_cut_is_refused(tmp_path: Path) -> None:
    # external_data of a tensor under the tag 13 << 3 | 2, with a bit above the 32 that protobuf's parser keeps.
    content = model_with_weights_everywhere().SerializeToString()
    entry = external("a", "graph.bin").external_data[1].SerializeToString()
    hidden = bytes([0x6A | 0x80, 0x80, 0x80, 0x80, 0x10, len(entry)]) + entry
    field = bytes([0x6A, len(entry)]) + entry
    assert field in content
    (tmp_path / "m.onnx").write_bytes(hidden)
    with pytest.raises(ArtifactError, match="a field of number 536870925"):
        read_header(tmp_path / "m.onnx")


@pytest.mark.parametrize("where", ["call", "default"])
def test_a_function_that_takes_a_graph_is_refused(where: str, tmp_path: Path) -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "branch", [], [])
    function = helper.make_function("x", "F", ["c"], ["y"], [helper.make_node("If", ["c"], ["y"])], [])
    call = helper.make_node("F", ["c"], ["y"], domain="x", **({"body": branch} if where == "call" else {}))
    if where == "default":
        function.attribute_proto.append(helper.make_attribute("body", branch))
    model = helper.make_model(helper.make_graph([call], "g", [], []), functions=[function])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="a function takes a graph"):
        read_header(tmp_path / "m.onnx")


def test_a_file_system_without_shared_mappings_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / MODEL
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], initializer=[external("w", "w.bin")])), str(path))
    original = mmap.mmap

    def private_only(*arguments: Any, **options: Any) -> mmap.mmap:
        if not options.get("flags", mmap.MAP_SHARED) & mmap.MAP_PRIVATE:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return original(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", private_only)  # as 9p and FUSE without a page cache do
    assert read_header(path).weights == {"w.bin"}
