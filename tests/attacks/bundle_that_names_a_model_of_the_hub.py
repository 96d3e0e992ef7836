"""A bundle says that it was made from a model of the hub, to have that fetched by whoever checks the bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lfx.cli.bench import run_bench
from lfx.cli.parity import run_parity
from lfx.manifest import Manifest
from lfx.runtime import Engine
from tests.attacks import make_bundle, refused
from tests.runtime.hub_server import hub_of_this_process


def attack(folder: Path) -> str:
    """`lfx parity` and `lfx bench --against pytorch` do not fetch it."""
    bundle = make_bundle(folder / "bundle")
    manifest = Manifest.read(bundle)
    manifest = dataclasses.replace(manifest, source={**manifest.source, "kind": "hub", "model": "someone/model"})
    manifest.write(bundle)
    shown = {"source": None, "as_json": True}
    sizes = {"lengths": (8,), "batch_sizes": (1,), "rounds": 1, "output": None, "plot": None}
    with hub_of_this_process(folder / "cache") as hub:
        refused(run_bench, bundle, Engine, against=("pytorch",), **sizes, **shown)
        refusal = refused(run_parity, bundle, manifest, Engine, cases="quick", by_layer=False, report=None, **shown)
        assert not hub.requests, "it was fetched"
    return refusal
