"""An ONNX file whose graphs are nested deeper than a stack."""

from __future__ import annotations

from pathlib import Path

from lfx.runtime import Engine
from tests.attacks import refused

_GRAPH_OF_MODEL, _GRAPH_OF_ATTRIBUTE, _ATTRIBUTE_OF_NODE, _NODE_OF_GRAPH = 0x3A, 0x32, 0x2A, 0x0A


def attack(folder: Path) -> str:
    """Two thousand graphs inside one another."""
    data = b""
    for _ in range(2000):
        for tag in (_GRAPH_OF_ATTRIBUTE, _ATTRIBUTE_OF_NODE, _NODE_OF_GRAPH):
            data = field(tag, data)
    (folder / "deep.onnx").write_bytes(field(_GRAPH_OF_MODEL, data))
    return refused(Engine, folder / "deep.onnx")


def field(tag: int, content: bytes) -> bytes:
    """A field of protobuf that holds bytes."""
    size, length = len(content), bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((tag, *length, size)) + content
