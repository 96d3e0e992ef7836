"""The parsers of untrusted files, as targets of the coverage-guided fuzzer atheris (extra [fuzz]).

    python scripts/fuzz_targets.py manifest CORPUS -max_total_time=60

Any error but ArtifactError or InputError ends the run, and libFuzzer writes the bytes that caused it next to the
corpus. `scripts/fuzz.py` runs all targets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lfx"]):
    from lfx.checks import parse_json
    from lfx.errors import ArtifactError, InputError
    from lfx.manifest import FORMAT_VERSION, Manifest, sealed
    from lfx.onnx_file import read_header
    from lfx.runtime.plan import PLAN_FORMAT_VERSION, PlanManifest
    from lfx.signature import Signature

PATH = Path("lfx.json")


def manifest(content: bytes) -> None:
    """Parse a bundle's lfx.json, unchanged and with a valid seal."""
    _sealed(content, "format_version", FORMAT_VERSION, Manifest.parse)


def plan(content: bytes) -> None:
    """Parse a plan's manifest, unchanged and with a valid seal."""
    _sealed(content, "plan_format_version", PLAN_FORMAT_VERSION, PlanManifest.parse)


def signature(content: bytes) -> None:
    """Parse the metadata of model.onnx."""
    try:
        Signature.from_dict(parse_json(content))
    except (ArtifactError, ValueError):
        return


def onnx(content: bytes) -> None:
    """Parse an ONNX file."""
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:
        file.write(content)
        file.flush()
        try:
            read_header(Path(file.name))
        except ArtifactError:
            return


def _sealed(content: bytes, key: str, version: int, parse: Callable[[bytes, Path], object]) -> None:
    for data in (content, _seal(content, key, version)):
        try:
            parse(data, PATH)
        except (ArtifactError, InputError):
            continue


def _seal(content: bytes, key: str, version: int) -> bytes:
    try:
        data = parse_json(content)
    except ValueError:
        return b""
    return json.dumps(sealed({**data, key: version})).encode() if isinstance(data, dict) else b""


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


TARGETS = {target.__name__: target for target in (manifest, plan, signature, onnx)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.epilog = "All other arguments are libFuzzer's."
    given, others = parser.parse_known_args()
    atheris.Setup([sys.argv[0], *others], TARGETS[given.target])
    atheris.Fuzz()
