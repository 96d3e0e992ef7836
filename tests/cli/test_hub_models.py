"""Each command that takes a model takes a repository of the hub, with a server on this machine that speaks its API."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfx.export import export
from lfx.ray.job import _model_of_actors
from lfx.runtime.hub import push
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import save_tiny_checkpoint, tiny_tokenizer
from tests.runtime.hub_server import Hub, hub_of_this_process
from tests.runtime.serve.running import Command

NAME = "org/classifier"
TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a classifier, whose checkpoint is on this machine."""
    folder = tmp_path_factory.mktemp("hub")
    checkpoint = save_tiny_checkpoint(folder / "checkpoint", "text-classification")
    tiny_tokenizer().save_pretrained(checkpoint)
    with hub_of_this_process(folder / "cache") as server:
        push(export(str(checkpoint), folder / "bundle"), NAME)
        yield server


def lfx(folder: Path, *arguments: str) -> str:
    """Run a command in a folder; returns what it prints."""
    command = [sys.executable, "-m", "lfx.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@fast_if(lambda arguments: arguments[0] in ("run", "verify"))
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["run", NAME, "--text", TEXT], "LABEL"),
        (["inspect", NAME], "text-classification"),
        (["verify", NAME], f"{NAME}: "),
        (["bench", NAME, "--length", "16", "--rounds", "1"], "tokens/s"),
        (["parity", NAME, "--by-layer"], "tolerance"),
    ],
    ids=["run", "inspect", "verify", "bench", "parity"],
)
def test_a_command_takes_a_name(arguments: list[str], shown: str, hub: Hub, tmp_path: Path) -> None:
    assert shown in lfx(tmp_path, *arguments)


def test_a_command_takes_a_revision(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repositories[NAME].commit
    assert "text-classification" in lfx(tmp_path, "inspect", f"{NAME}@{commit}")


@pytest.mark.slow
def test_explain_takes_a_name(hub: Hub, bundle: MakeBundle, tmp_path: Path) -> None:
    push(bundle("text-classification", output_attentions=True), "org/attentions")
    lfx(tmp_path, "explain", "org/attentions", "--text", TEXT)
    assert "<title>Attention of attentions" in (tmp_path / "explain.html").read_text()


def test_serve_takes_names(hub: Hub) -> None:
    with Command(NAME, f"same={NAME}@{hub.repositories[NAME].commit}") as server, server.client() as client:
        server.wait_for("is ready")
        replies = [client.post(f"/models/{name}/run", json={"inputs": TEXT}).json() for name in ("classifier", "same")]
    assert replies[0]["results"] == replies[1]["results"]
    assert replies[0]["results"][0]["answers"]


def test_triton_names_the_model_for_the_repository(hub: Hub, tmp_path: Path) -> None:
    written = json.loads(lfx(tmp_path, "triton", f"{NAME}@main", "--output", "models", "--json"))
    assert written["model"] == "classifier"
    assert (tmp_path / "models" / "classifier" / "1" / "bundle" / "lfx.json").is_file()
    assert re.search(r'name: "text"', (tmp_path / "models" / "classifier" / "config.pbtxt").read_text())


@pytest.mark.slow
def test_map_takes_a_name(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    command = ["map", "in.jsonl", "out", "--model", NAME, "--format", "jsonl", "--actors", "1", "--json"]
    assert json.loads(lfx(tmp_path, *command))["documents"] == 1
    (row,) = (tmp_path / "out" / "part-00000000.jsonl").read_text().splitlines()
    assert json.loads(row)["answers"]


def test_machines_of_a_cluster_get_one_commit(hub: Hub) -> None:
    commit = hub.repositories[NAME].commit
    assert str(_model_of_actors(Path(f"{NAME}@main"), "127.0.0.1:1")) == f"{NAME}@{commit}"
    assert _model_of_actors(Path(NAME), None).name == commit
