"""A process forks with a Batcher, whose workers do not exist in the child: a request there would wait forever."""

from __future__ import annotations

import os
from pathlib import Path

from lfx.runtime import Batcher, Engine
from tests.attacks import make_bundle, refused


def attack(folder: Path) -> str:
    """The child submits a request, and sends the refusal to its parent through a pipe."""
    with Engine(make_bundle(folder / "bundle")) as engine, Batcher(engine) as batcher:
        batcher.submit([5, 6]).result(timeout=60)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, refused(batcher.submit, [5, 6]).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader, encoding="utf-8") as pipe:
            refusal = pipe.read()
    assert refusal, "the child did not refuse"
    return refusal
