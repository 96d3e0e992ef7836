"""What an ONNX file says of itself: its lfx metadata and the files of its weights, read without the onnx package."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lfx.errors import ArtifactError

# The fields of onnx.proto that lead to the metadata of a model and to the places of its tensors: message -> field
# number -> message. All others are skipped.
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
# The same for what counts the nodes: where nodes are, and what they call.
_GRAPHS: dict[str, dict[int, str]] = {
    "graph": {1: "node"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}
# (name, domain, overload): field numbers in a node, and in a function.
_CALLED, _DEFINED = (4, 7, 8), (1, 10, 13)
_MOST_NODES = 200_000  # the base shape has 2,600
_DEEPEST = 100  # protobuf's own limit
Key = tuple[bytes, bytes, bytes]
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Header:
    """What `read_header` finds.

    Attributes:
        metadata: the text under the key `lfx`, None where there is none.
        weights: names of the files of external data, as the file gives them.
    """

    metadata: str | None
    weights: frozenset[str]


def read_header(path: Path) -> Header:
    """Read the metadata and the names of the weight files; the weights themselves are not read.

    Raises:
        ArtifactError: the file cannot be read, is no ONNX file, or has functions that call one another so often that
            the graph would not end.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = list(_entries(data, 0, len(data), "model", 0))
            nodes = _inlined_nodes(data)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; give a file that can") from error
    except (ValueError, IndexError) as error:  # the first for an empty file too
        raise ArtifactError(f"{path} is no ONNX file ({error}); export the model again") from error
    if nodes > _MOST_NODES:
        raise ArtifactError(
            f"{path} has more than {_MOST_NODES:,} nodes once its functions are inlined, which no backend loads in "
            "reasonable time; export the model again"
        )
    metadata = [value for message, key, value in found if (message, key) == ("metadata", "lfx")]
    if len(metadata) > 1:
        raise ArtifactError(f"{path} has two entries of lfx metadata; export the model again")
    weights = frozenset(value for message, key, value in found if (message, key) == ("external data", "location"))
    return Header(metadata[0] if metadata else None, weights)


def _entries(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[tuple[str, str, str]]:
    """The key-value pairs inside a message: (kind of pair, key, value)."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    nested = _FIELDS[message]
    for field, first, last in _byte_fields(data, start, end):
        inner = nested.get(field)
        if inner in ("metadata", "external data"):
            texts = {number: data[a:b].decode("utf-8") for number, a, b in _byte_fields(data, first, last)}
            yield inner, texts.get(1, ""), texts.get(2, "")
        elif inner is not None:
            yield from _entries(data, first, last, inner, depth + 1)


def _inlined_nodes(data: mmap.mmap) -> int:
    """Number of nodes of the model with its functions inlined; it stops counting above `_MOST_NODES`."""
    own: Counter[Key] = Counter()
    functions: dict[Key, Counter[Key]] = {}
    for field, first, last in _byte_fields(data, 0, len(data)):
        if field == 7:
            own.update(_calls(data, first, last, "graph", 0))
        elif field == 25:
            key = _key(data, first, last, _DEFINED)
            if key in functions:
                raise ValueError("a function is defined twice")
            functions[key] = Counter(_calls(data, first, last, "function", 0))
    sizes: dict[Key, int] = {}

    def size(calls: Counter[Key], depth: int) -> int:
        if depth > _DEEPEST:
            raise ValueError("functions call one another too deeply")
        total = 0
        for key, times in calls.items():
            if key in functions and key not in sizes:
                sizes[key] = size(functions[key], depth + 1)
            total += times * sizes.get(key, 1)
        return min(total, _MOST_NODES + 1)

    return size(own, 0)


def _calls(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[Key]:
    """What each node inside a message computes, nodes of inner graphs too."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    nested = _GRAPHS[message]
    for field, first, last in _byte_fields(data, start, end):
        if inner := nested.get(field):
            if inner == "node":
                yield _key(data, first, last, _CALLED)
            yield from _calls(data, first, last, inner, depth + 1)


def _key(data: mmap.mmap, start: int, end: int, fields: tuple[int, int, int]) -> Key:
    """Name, domain and overload of a function, or of what a node calls."""
    texts = {number: data[a:b] for number, a, b in _byte_fields(data, start, end) if number in fields}
    name, domain, overload = (texts.get(number, b"") for number in fields)
    return name, domain, overload


def _byte_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that hold bytes: number, first byte, byte past the last."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if tag >> 3 == 0:
            raise ValueError("a field of number 0")
        if wire_type == _BYTES:
            size, position = _varint(data, position)
            if position + size > end:
                raise ValueError("it is cut")
            yield tag >> 3, position, position + size
            position += size
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type}")
    if position != end:
        raise ValueError("it is cut")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A number of variable length, and the position past it."""
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
