"""`lfx parity`: by layer, as a page, of plans and of int8."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import external_data_helper, numpy_helper

from lfx.checks import parse_json
from lfx.cli import cli, inspect
from lfx.cli.parity import run_parity
from lfx.cli.source import checkpoint_of
from lfx.errors import InputError
from lfx.export.quantize import quantize
from lfx.manifest import MODEL, WEIGHTS, Manifest
from lfx.runtime import Engine
from lfx.runtime.plan import PlanManifest
from lfx.runtime.profile import Profile, Range
from lfx.signature import TASKS
from tests.conftest import MakeBundle, SmallDisk
from tests.marks import fast_if
from tests.models import VOCAB_SIZE


@pytest.fixture
def bundles(checkpoint_bundle: MakeBundle) -> MakeBundle:
    """bundles(task, **options) returns a bundle whose checkpoint is a folder, which parity loads."""
    return checkpoint_bundle


def lfx(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def spoiled(bundle: Path, folder: Path, weight: str, change: float) -> Path:
    """Copy a bundle and change `weight`, with a manifest that matches the changed file."""
    copy = shutil.copytree(bundle, folder)
    model = onnx.load(str(copy / MODEL))
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * (1 + change), weight))
    external_data_helper.convert_model_to_external_data(model, location=WEIGHTS)
    (copy / WEIGHTS).unlink()
    onnx.save(model, str(copy / MODEL))
    Manifest.read(copy).write(copy)
    return copy


@fast_if(lambda task: task == "question-answering")
@pytest.mark.parametrize("task", TASKS)
def test_an_unchanged_bundle_is_in_tolerance_at_every_layer(bundles: Callable[..., Path], task: str) -> None:
    result = lfx("parity", bundles(task), "--by-layer")
    assert result.exit_code == 0, result.output
    assert "all layers are in tolerance" in result.stdout
    assert re.findall(r"attention_\d", result.stdout) == ["attention_0", "attention_1"]


@fast_if(lambda first: first == "attention_1")
@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("encoder.layer.0.attention.self.key.weight.T", "attention_0"),
        ("encoder.layer.0.output.dense.weight.T", "attention_1"),
        ("encoder.layer.1.output.dense.weight.T", "last_hidden_state"),
        ("pooler.dense.weight", "pooler_output"),
    ],
)
def test_the_first_layer_that_differs_is_named(
    bundles: Callable[..., Path], tmp_path: Path, weight: str, first: str
) -> None:
    folder = spoiled(bundles(), tmp_path / "spoiled", weight, 1e-3)
    result = lfx("parity", folder, "--by-layer")
    assert result.exit_code == 1
    assert f"first out of tolerance: {first}\n" in result.stdout
    assert isinstance(result.exception, Exception)
    assert parse_json(lfx("parity", folder, "--by-layer", "--json").stdout)["passed"] is False


def test_json_has_the_layers_too(bundles: Callable[..., Path]) -> None:
    result = parse_json(lfx("parity", bundles(), "--by-layer", "--json").stdout)
    assert list(result["by_layer"]["outputs"]) == ["attention_0", "attention_1", "last_hidden_state", "pooler_output"]
    assert list(result["outputs"]) == ["last_hidden_state", "pooler_output"]
    assert result["passed"] is True
    tolerances = [out["tolerance"] for out in result["by_layer"]["outputs"].values()]
    assert tolerances[0] < tolerances[1]  # one layer rounds less than two


@pytest.mark.slow
def test_half_precision_by_layer(bundles: Callable[..., Path]) -> None:
    result = lfx("parity", bundles(precision="fp16"), "--by-layer")
    assert "all layers are in tolerance" in result.stdout, result.output


@pytest.mark.slow
def test_an_inlined_bundle_has_no_layers_to_compare(bundles: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundles(inline_functions=True)
    with pytest.raises(InputError, match="functions inlined"):
        lfx_raising("parity", folder, "--by-layer")
    result = lfx("parity", folder, "--report", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "Error by layer" not in (tmp_path / "page.html").read_text()


def lfx_raising(*arguments: Any) -> None:
    result = lfx(*arguments)
    assert result.exception is not None
    raise result.exception


class Page(HTMLParser):
    """Parses a page: its tags, and its links to other files."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_with_the_verdict_first(bundles: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    result = lfx("parity", bundles("text-classification"), "--report", path)
    assert result.exit_code == 0, result.output
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 3
    assert text.index("In tolerance") < text.index("<table")
    assert "logits; 5 cases, fp32" in text


def test_a_failed_comparison_writes_the_page_and_exits_1(bundles: Callable[..., Path], tmp_path: Path) -> None:
    folder = spoiled(bundles(), tmp_path / "spoiled", "encoder.layer.0.output.dense.weight.T", 1e-3)
    result = lfx("parity", folder, "--report", tmp_path / "page.html")
    assert result.exit_code == 1
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Out of tolerance" in text
    assert "First out of tolerance: attention_1." in text
    assert 'class="bad"' in text


def test_names_in_the_page_are_text_and_not_markup(bundles: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bundles(), tmp_path / "<b>&bundle")
    result = lfx("parity", folder, "--report", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "&lt;b&gt;&amp;bundle" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).open == []


@pytest.mark.parametrize("name", ["", "none/page.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    bundles: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        lfx_raising("parity", bundles(), "--report", tmp_path / name)


def test_a_page_on_a_full_disk_says_what_to_do(bundles: Callable[..., Path], small_disk: SmallDisk) -> None:
    folder = small_disk()
    (folder / "ballast").write_bytes(bytes(110_000))
    result = lfx("parity", bundles(), "--report", folder / "page.html")
    with pytest.raises(InputError, match=r"page\.html cannot be written: no disk space left; make room, or choose"):
        raise result.exception or AssertionError
    assert "5 cases, " in result.stdout
    assert [path.name for path in folder.iterdir()] == ["ballast"]


def test_a_page_is_written_if_stdout_cannot_be(
    bundles: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    for name in ("table", "echo_json"):
        monkeypatch.setattr(f"lfx.cli.parity.{name}", closed)
    for option in ((), ("--json",)):
        page = tmp_path / f"page{len(option)}.html"
        lfx("parity", bundles(), "--report", page, *option)
        assert "In tolerance" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_int8_reports_its_loss_of_accuracy(bundles: Callable[..., Path], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    text = tmp_path / "documents.jsonl"
    rows = [{"input_ids": random.integers(3, VOCAB_SIZE, int(n)).tolist()} for n in random.integers(10, 120, 12)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = quantize(bundles("text-classification"), tmp_path / "int8", calibration=text)
    result = lfx("parity", folder, "--by-layer", "--report", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert re.search(r"logits: cosine 0\.\d+ with the float64 reference, \d of 7 labels agree", result.stdout)
    assert "int8: in tolerance" in result.stdout
    assert "measure the loss from int8" in (tmp_path / "page.html").read_text(encoding="utf-8")
    advice = "logits: too few numbers to find every wrong layer; give --by-layer too"
    assert advice not in result.stdout
    assert advice in lfx("parity", folder).stdout
    # Nothing but the few logits comes after the last attention.
    part = "longformer.encoder.layer.1.output"
    changed = spoiled(folder, tmp_path / "spoiled", f"{part}.dense.weight.T_scale", 0.5)
    assert lfx("parity", changed).exit_code == 0
    by_layer = lfx("parity", changed, "--by-layer")
    assert by_layer.exit_code == 1
    assert f"first out of tolerance: {part}.LayerNorm" in by_layer.stdout


def _plan(manifest: Manifest, **changes: Any) -> PlanManifest:
    fields: dict[str, Any] = {
        "signature": manifest.signature,
        "flavor": "tensorrt",
        "tensorrt_version": "10",
        "target": "sm90",
        "profiles": (Profile(Range(1, 1, 1), Range(1, 128, 128)),),
        "plugin_version": "1",
        "attention_nodes": 2,
        "plugin_layers": 2,
        "bundle": {},
        "source": manifest.source,
        "quantization": {},
        "options": {},
        "versions": {},
        "conversion": {},
        "plan": {},
    }
    return PlanManifest(**{**fields, **changes})


def test_inspect_says_that_a_plan_carries_host_code(bundles: Callable[..., Path]) -> None:
    plan = _plan(Manifest.read(bundles("text-classification")), plan={"bytes": 1})
    assert "host code" not in dict(inspect.rows(plan))
    carrying = dataclasses.replace(plan, options={"flags": ["VERSION_COMPATIBLE"]})
    assert "runs as a program" in dict(inspect.rows(carrying))["host code"]


def run_plan(bundle: Path, manifest: PlanManifest, supports_shape: Callable[[int, int], bool], **options: Any) -> None:
    """Run parity on a plan, with an engine that is the bundle's, limited to the plan's profile."""

    def open_engine(_: Path) -> Engine:
        engine = Engine(bundle)
        engine.supports_shape = supports_shape  # type: ignore[method-assign]
        return engine

    settings: dict[str, Any] = {"source": None, "cases": "quick", "by_layer": False, "report": None, "as_json": True}
    run_parity(Path("model.plan"), manifest, open_engine, **{**settings, **options})


def test_a_plan_is_compared_in_the_shapes_that_it_was_built_for(
    bundles: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundles()
    run_plan(folder, _plan(Manifest.read(folder)), lambda batch, seqlen: batch == 1)
    cases = parse_json(capsys.readouterr().out)["cases"]
    assert cases
    assert {case["batch"] for case in cases} == {1}


def test_comparisons_that_a_plan_cannot_make_are_refused(bundles: Callable[..., Path]) -> None:
    folder = bundles()
    manifest = _plan(Manifest.read(folder))
    with pytest.raises(InputError, match="none of the lengths"):
        run_plan(folder, manifest, lambda batch, seqlen: False)
    with pytest.raises(InputError, match="compare the bundle by layer"):
        run_plan(folder, manifest, lambda batch, seqlen: True, by_layer=True)


COMMAND = "lfx parity {} --source {}"


def test_the_recorded_folder_is_the_source_unless_another_is_named(tmp_path: Path) -> None:
    known = {"kind": "folder", "model": str(tmp_path)}
    assert checkpoint_of(Path("b"), known, None, COMMAND) == str(tmp_path)
    for manifest in (known, {"kind": "hub", "model": "someone/model"}, {}, None):
        assert checkpoint_of(Path("b"), manifest, "org/mine", COMMAND) == "org/mine"


@pytest.mark.parametrize(
    ("recorded", "reason", "checkpoint"),
    [
        ({"kind": "hub", "model": "someone/model"}, "someone/model of the hub", "someone/model"),
        ({"kind": "hub", "model": "a b"}, "of the hub", "'a b'"),
        ({"kind": "hub", "model": "a\nb"}, "does not say which", "CHECKPOINT"),
        ({"kind": "hub", "model": 5}, "does not say which", "CHECKPOINT"),
        ({"kind": "folder", "model": "someone/model"}, "which is not here", "CHECKPOINT"),
        ({"kind": "folder", "model": "/no/such/folder"}, "which is not here", "CHECKPOINT"),
        ({"kind": "module", "model": "m.C"}, "made from a module in memory", "CHECKPOINT"),
        ({}, "does not say which", "CHECKPOINT"),
        (None, "does not say which", "CHECKPOINT"),
    ],
)
def test_a_manifest_that_names_no_folder_here_is_not_followed(
    recorded: Any, reason: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)  # a relative path is not taken for the checkpoint's folder
    with pytest.raises(InputError, match=reason) as caught:
        checkpoint_of(Path("my bundle"), recorded, None, COMMAND)
    assert str(caught.value).endswith(f"; give: lfx parity 'my bundle' --source {checkpoint}")


def test_options_of_other_types_are_refused(bundles: Callable[..., Path]) -> None:
    manifest = Manifest.read(bundles())
    settings: dict[str, Any] = {"source": None, "cases": "quick", "by_layer": False, "report": None, "as_json": True}
    for change in ({"cases": "some"}, {"cases": None}, {"source": 5}, {"source": ""}, {"report": 5}):
        with pytest.raises(InputError, match=next(iter(change))):
            run_parity(bundles(), manifest, Engine, **{**settings, **change})
