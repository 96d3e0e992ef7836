"""Reads the lfx metadata and the names of the weight files from an ONNX file, without the onnx package."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lfx.errors import ArtifactError

# The fields of onnx.proto on the paths from ModelProto to metadata_props and to the external_data of tensors:
# message -> field number -> message. All other fields are skipped.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 14: "metadata", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "tensor": {13: "external data"},
}
# The fields on the paths from a graph or a function to its nodes, nodes of subgraphs included.
_GRAPHS: dict[str, dict[int, str]] = {
    "graph": {1: "node"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}
# Field numbers of (op_type, domain, overload) in NodeProto, and of (name, domain, overload) in FunctionProto.
_NODE_KEY, _FUNCTION_KEY = (4, 7, 8), (1, 10, 13)
_NODE_ATTRIBUTE, _FUNCTION_ATTRIBUTE = 5, 11
_ATTENTION = {(b"BandedAttention", b"lfx"), (b"GlobalAttention", b"lfx")}
_MAX_NODES = 200_000  # longformer-base has 2,600
_MAX_DEPTH = 100  # protobuf's own limit of nested messages
Key = tuple[bytes, bytes, bytes]  # the id of a function: name, domain, overload
_MAX_FIELD = 2**29 - 1  # largest field number of protobuf
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# File systems without a page cache (9p, FUSE with direct_io) refuse the shared mapping that mmap makes by default.
_MAPPED: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ} if os.name == "posix" else {"access": mmap.ACCESS_READ}
)


@dataclass(frozen=True)
class Header:
    """The lfx metadata and the weight files of an ONNX file.

    Attributes:
        metadata: value of the key `lfx` in metadata_props; None if there is no such key.
        weights: the locations of external data, as the file has them.
        has_attention_nodes: whether the graph calls lfx::BandedAttention or lfx::GlobalAttention.
    """

    metadata: str | None
    weights: frozenset[str]
    has_attention_nodes: bool = False


def read_header(path: Path) -> Header:
    """Read the metadata and the names of the weight files; the weights themselves are not read.

    Raises:
        ArtifactError: the file cannot be read, is no ONNX file, or has more than 200,000 nodes once its functions are
            inlined.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, **_MAPPED) as data:
            metadata: list[str] = []
            weights: set[str] = set()
            for message, key, value in _entries(data, 0, len(data), "model", 0):
                if (message, key) == ("metadata", "lfx"):
                    metadata.append(value)
                elif (message, key) == ("external data", "location"):
                    weights.add(value)
            nodes, has_attention_nodes = _inlined_nodes(data)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except (ValueError, IndexError) as error:  # ValueError: an empty file too
        raise ArtifactError(f"{path} is no ONNX file ({error}); export the model again") from error
    if nodes > _MAX_NODES:
        raise ArtifactError(
            f"{path} has more than {_MAX_NODES:,} nodes once its functions are inlined, which no backend loads in "
            "reasonable time; export the model again"
        )
    if len(metadata) > 1:
        raise ArtifactError(f"{path} has two entries of lfx metadata; export the model again")
    return Header(metadata[0] if metadata else None, frozenset(weights), has_attention_nodes)


def _entries(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[tuple[str, str, str]]:
    """Yield each key-value pair inside a message as (message of the pair, key, value)."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    nested = _FIELDS[message]
    for field, first, last in _byte_fields(data, start, end):
        inner = nested.get(field)
        if inner in ("metadata", "external data"):
            texts = {number: data[a:b].decode("utf-8") for number, a, b in _byte_fields(data, first, last)}
            yield inner, texts.get(1, ""), texts.get(2, "")
        elif inner is not None:
            yield from _entries(data, first, last, inner, depth + 1)


def _inlined_nodes(data: mmap.mmap) -> tuple[int, bool]:
    """Number of nodes of the model with its functions inlined, and whether its graph calls an attention op of lfx.

    It counts no further than `_MAX_NODES` + 1.

    A graph or a function that calls more different ops ends the count, which bounds the memory.
    """
    main_calls: Counter[Key] = Counter()
    functions: dict[Key, Counter[Key]] = {}
    with_graphs: set[Key] = set()  # functions and ops that are called with a graph as attribute
    for field, first, last in _byte_fields(data, 0, len(data)):
        if field not in (7, 25):
            continue
        calls: Counter[Key] = Counter()
        for key, has_graph in _calls(data, first, last, "graph" if field == 7 else "function", 0):
            calls[key] += 1
            if len(calls) > _MAX_NODES:
                return len(calls), False
            if has_graph:
                with_graphs.add(key)
        if field == 7:
            main_calls.update(calls)
            continue
        key = _key(data, first, last, _FUNCTION_KEY)
        if key in functions:
            raise ValueError("a function is defined twice")
        functions[key] = calls
        if _has_graph(data, first, last, _FUNCTION_ATTRIBUTE):
            with_graphs.add(key)
    if with_graphs & functions.keys():  # the body may copy the graph any number of times
        raise ValueError("a function takes a graph")
    sizes: dict[Key, int] = {}  # nodes of each function, inlined

    def count(calls: Counter[Key], depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise ValueError("functions call one another too deeply")
        nodes = 0
        for key, times in calls.items():
            if key in functions and key not in sizes:
                sizes[key] = count(functions[key], depth + 1)
            nodes += times * sizes.get(key, 1)
        return min(nodes, _MAX_NODES + 1)

    return count(main_calls, 0), any(key[:2] in _ATTENTION for key in main_calls)


def _calls(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[tuple[Key, bool]]:
    """Yield what each node inside a message calls, and whether with a graph; nodes of subgraphs included."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    nested = _GRAPHS[message]
    for field, first, last in _byte_fields(data, start, end):
        if inner := nested.get(field):
            if inner == "node":
                yield _key(data, first, last, _NODE_KEY), _has_graph(data, first, last, _NODE_ATTRIBUTE)
            yield from _calls(data, first, last, inner, depth + 1)


def _has_graph(data: mmap.mmap, start: int, end: int, attribute_field: int) -> bool:
    """Return whether an attribute of a node or of a function holds a graph."""
    attributes = ((first, last) for field, first, last in _byte_fields(data, start, end) if field == attribute_field)
    return any(field in (6, 11) for first, last in attributes for field, _, _ in _byte_fields(data, first, last))


def _key(data: mmap.mmap, start: int, end: int, fields: tuple[int, int, int]) -> Key:
    """The key of a function, or of the op or function that a node calls."""
    texts = {number: data[a:b] for number, a, b in _byte_fields(data, start, end) if number in fields}
    name, domain, overload = (texts.get(number, b"") for number in fields)
    return name, b"" if domain == b"ai.onnx" else domain, overload


def _byte_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield each length-delimited field of a message as (field number, first byte, byte past the end)."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if not 0 < tag >> 3 <= _MAX_FIELD:  # protobuf's own parser drops the upper bits of a larger one
            raise ValueError(f"a field of number {tag >> 3}")
        if wire_type == _BYTES:
            size, position = _varint(data, position)
            if position + size > end:
                raise ValueError("it is truncated")
            yield tag >> 3, position, position + size
            position += size
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type}")
    if position != end:
        raise ValueError("it is truncated")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """Decode a varint; returns its value and the position past its end."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
