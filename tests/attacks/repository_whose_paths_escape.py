"""A repository of the hub has a manifest that lists files outside it, so that opening it writes elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from lfx.manifest import MANIFEST, sealed
from lfx.runtime import Engine
from lfx.runtime.hub import push
from tests.attacks import make_bundle, refused
from tests.runtime.hub_server import hub_of_this_process

PATHS = ("../../../../escaped", "/escaped", "onnx/../../escaped", "C:\\escaped", "a\\..\\..\\escaped", ".", "")


def attack(folder: Path) -> str:
    """Each is refused before anything but the manifest is fetched."""
    with hub_of_this_process(folder / "cache") as hub:
        push(make_bundle(folder / "bundle"), "org/name")
        files = hub.repositories["org/name"].files
        whole = json.loads(files[MANIFEST])
        for number, path in enumerate(PATHS):
            spoiled = {**whole, "files": {**whole["files"], path: {"sha256": "0" * 64, "bytes": 1}}}
            files[MANIFEST] = json.dumps(sealed(spoiled)).encode()
            hub.repositories["org/name"].commit = f"{number:040}"
            hub.requests.clear()
            refusal = refused(Engine, "org/name")
            fetched = [request for request in hub.requests if request.startswith("GET")]
            assert all(request.endswith(MANIFEST) for request in fetched), fetched
    assert not list(folder.rglob("escaped"))
    return refusal
