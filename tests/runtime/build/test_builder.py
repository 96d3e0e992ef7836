"""`build_engine` with TensorRT-RTX and without a GPU: all tasks and precisions, plugin and function bodies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lfx.errors import ArtifactError, BuildError, InputError, LfxError, PluginError
from lfx.export import export, use_loop_attention
from lfx.export.quantize import quantize
from lfx.manifest import MANIFEST, Manifest, sealed, sha256
from lfx.runtime import Engine, build_engine, device
from lfx.runtime import plugin as plugins
from lfx.runtime.build import Options, trt_process
from lfx.runtime.build import prepare_graph as freeze
from lfx.runtime.plan import PlanManifest, json_path
from tests.conftest import MakeBundle, SmallDisk
from tests.marks import fast_if
from tests.models import LONGFORMER_TASKS, ONE_LAYER, VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.trt

RTX = {"flavor": "tensorrt-rtx", "target": "sm89"}
LAYERS = 2  # of tests.models.tiny_config


@pytest.fixture(autouse=True, scope="module")
def _needs_tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'longformer-lfx[rtx]'")
    try:
        plugins.library()
    except PluginError as error:
        pytest.skip(f"no plugin library: {error}")


@pytest.fixture(scope="module")
def plan(bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the base model, shared by tests that do not change it."""
    return build_engine(bundle(), tmp_path_factory.mktemp("plan") / "tiny.plan", **RTX, log=lambda line: None)


@pytest.fixture
def copy(plan: Path, tmp_path: Path) -> Path:
    """A copy of the plan for a test that changes it."""
    for path in (plan, json_path(plan)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / plan.name


@fast_if(lambda task, precision: (task, precision) == ("question-answering", "fp16"))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("task", LONGFORMER_TASKS)
def test_all_attention_nodes_of_all_tasks_become_plugin_layers(
    task: str, precision: str, bundle: MakeBundle, tmp_path: Path
) -> None:
    built = build_engine(bundle(task), tmp_path / "one.plan", precision=precision, **RTX, log=lambda line: None)
    manifest = PlanManifest.read(built)
    manifest.verify(built)
    assert (manifest.attention_nodes, manifest.plugin_layers) == (2 * LAYERS, 2 * LAYERS)
    assert (manifest.signature.task, manifest.signature.precision) == (task, precision)
    assert manifest.conversion["checked"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.plan", "one.plan.json"]


@fast_if(lambda precision: precision == "fp16")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_without_the_plugin_no_node_is_a_plugin_layer(precision: str, bundle: MakeBundle, tmp_path: Path) -> None:
    built = build_engine(
        bundle(), tmp_path / "one.plan", precision=precision, plugin=False, **RTX, log=lambda line: None
    )
    manifest = PlanManifest.read(built)
    assert (manifest.attention_nodes, manifest.plugin_layers, manifest.plugin_version) == (2 * LAYERS, 0, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"max_global": 4}, "bf16"),
        ({"global_attention": "first"}, "fp16"),
        ({"global_attention": "none"}, "fp16"),
        ({"precision": "bf16"}, None),
    ],
    ids=str,
)
def test_bundles_of_all_opsets_precisions_and_global_modes_build(
    options: dict[str, Any], precision: str | None, bundle: MakeBundle, tmp_path: Path
) -> None:
    built = build_engine(bundle(**options), tmp_path / "one.plan", precision=precision, **RTX, log=lambda line: None)
    manifest = PlanManifest.read(built)
    assert manifest.plugin_layers == manifest.attention_nodes == (LAYERS if "none" in options.values() else 2 * LAYERS)


@pytest.fixture(scope="module")
def dilated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose heads have different dilations."""
    config = {"num_attention_heads": 4, "attention_dilation": [[1, 2, 2, 4], [3, 1, 3, 1]], "autoregressive": True}
    return export(use_loop_attention(tiny_model(**config)), tmp_path_factory.mktemp("dilated") / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [True, False])
def test_heads_of_different_dilations_build(plugin: bool, dilated: Path, tmp_path: Path) -> None:
    options = {"precision": "fp16", "plugin": plugin, "max_global": 4, **RTX}
    built = build_engine(dilated, tmp_path / "one.plan", **options, log=lambda line: None)
    manifest = PlanManifest.read(built)
    # Three and two groups of heads, and the global tokens of each layer.
    assert (manifest.attention_nodes, manifest.plugin_layers) == (5 + LAYERS, 5 + LAYERS if plugin else 0)
    assert (manifest.signature.attention_windows, manifest.signature.causal) == ((16, 24), True)


@pytest.mark.slow
def test_a_bundle_of_inlined_functions_builds_without_the_plugin_only(bundle: MakeBundle, tmp_path: Path) -> None:
    inlined = bundle(inline_functions=True)
    with pytest.raises(BuildError, match="functions are inlined, so it has no attention nodes; build with --no-plugin"):
        build_engine(inlined, tmp_path / "one.plan", **RTX)
    built = build_engine(inlined, tmp_path / "one.plan", plugin=False, **RTX, log=lambda line: None)
    assert PlanManifest.read(built).plugin_layers == 0


@pytest.mark.full_size
@pytest.mark.slow
def test_longformer_base_builds_with_all_its_attention_in_the_plugin(tmp_path: Path) -> None:
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    model = tiny_model(
        **base, vocab_size=50265, attention_window=[512] * 12, max_position_embeddings=4098, initializer_range=0.02
    )
    folder = export(model, tmp_path / "base")
    for precision, plugin, layers in (("fp32", True, 24), ("fp16", True, 24), ("bf16", True, 24), ("fp16", False, 0)):
        plan = tmp_path / "base.plan"
        build_engine(folder, plan, precision=precision, plugin=plugin, **RTX, log=lambda line: None)
        manifest = PlanManifest.read(plan)
        assert (manifest.attention_nodes, manifest.plugin_layers) == (24, layers)


def test_the_json_describes_the_plan(plan: Path, bundle: MakeBundle) -> None:
    manifest = PlanManifest.read(plan)
    assert (manifest.flavor, manifest.target) == ("tensorrt-rtx", "sm89")
    assert [str(p) for p in manifest.profiles] == ["batch 1:1:8, seqlen 1:128:128"]
    assert manifest.signature.max_global == 64
    assert manifest.bundle == {"name": bundle().name, "sha256": sha256(bundle() / MANIFEST)}
    assert manifest.plan == {"sha256": sha256(plan), "bytes": plan.stat().st_size}
    assert json.loads(json.dumps(manifest.to_dict())) == json.loads(json_path(plan).read_text())


def test_several_profiles_and_options_reach_tensorrt(bundle: MakeBundle, tmp_path: Path) -> None:
    steps: list[str] = []
    built = build_engine(
        bundle(),
        tmp_path / "one.plan",
        batch=["1", "1:4:8"],
        seqlen=["1:32:64", "65:128:128"],
        max_global="1:2:3",
        options=Options(workspace_bytes=2**28, optimization_level=3),
        **RTX,
        progress=steps.append,
        log=lambda line: None,
    )
    manifest = PlanManifest.read(built)
    assert [str(p.seqlen) for p in manifest.profiles] == ["1:32:64", "65:128:128"]
    assert manifest.signature.max_global == 3
    assert manifest.options == {"workspace_bytes": 2**28, "optimization_level": 3, "flags": []}
    assert "TensorRT: building" in steps


@pytest.mark.slow
def test_a_plan_does_not_round_the_factors_of_float32_products() -> None:
    import tensorrt_rtx as trt

    names = ("target", "workspace_bytes", "optimization_level", "timing_cache")
    job = {**dict.fromkeys(names), "flags": [], "profiles": []}
    builder = trt.Builder(trt.Logger())
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    assert not trt_process._config(trt, builder, job, lambda **_: None).get_flag(trt.BuilderFlag.TF32)


def test_an_older_plan_is_replaced(bundle: MakeBundle, copy: Path) -> None:
    before = sha256(copy)
    build_engine(bundle(), copy, max_global=2, **RTX, log=lambda line: None)
    assert sha256(copy) != before
    PlanManifest.read(copy).verify(copy)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"target": None}, "no NVIDIA GPU to build for; build ahead of time with: --flavor tensorrt-rtx"),
    "flavor": ({"flavor": "trt"}, "flavor 'trt' is not known; choose one of: tensorrt, tensorrt-rtx"),
    "target": ({"target": "ada"}, "--target 'ada' is no compute capability"),
    "unknown target": ({"target": "sm99"}, "target sm99 is not one that tensorrt_rtx .* builds for"),
    "seqlen": ({"seqlen": ["1:64:129"]}, "above the model's maximum 128"),
    "batch": ({"batch": ["x"]}, "--batch 'x' is not a size"),
    "slots": ({"max_global": 4000}, "--max-global 4000 is above 128, the most that this model"),
    "old target": ({"target": "sm75"}, "--target sm75 is older than the plugin's kernels, which begin at sm80"),
    "cache": ({"options": Options(timing_cache=Path("cache"))}, "--timing-cache is an option of TensorRT"),
    "compatible": ({"options": Options(version_compatible=True)}, "--version-compatible is an option of TensorRT"),
    "digits": ({"batch": ["9" * 5000]}, "is not a size"),
    "short": ({"plugin": False, "seqlen": ["1:64:128"]}, "64 global slots need sequences of at least 63 tokens"),
    "long name": ({"output": "x" * 246 + ".plan"}, "File name too long"),
    "long path": ({"output": "x/" * 2500 + "one.plan"}, "File name too long"),
    "nul": ({"output": "a\0b.plan"}, "null"),
    "output type": ({"output": 5}, "--output is 5; give a path"),
    "flavor type": ({"flavor": []}, r"flavor \[\] is not known; choose one of: tensorrt, tensorrt-rtx"),
    "superscript": ({"target": "sm²"}, "--target 'sm²' is no compute capability"),
    "target type": ({"target": 89}, "--target 89 is no compute capability"),
    "long target": ({"target": "sm" + "9" * 5000}, "is no compute capability"),
    "batch type": ({"batch": 5}, "--batch is 5; give a list of MIN:OPT:MAX or numbers"),
    "seqlen type": ({"seqlen": "8"}, "--seqlen is '8'; give a list of MIN:OPT:MAX or numbers"),
    "no batch": ({"batch": []}, r"--batch is \[\]; give a list"),
    "half a slot": ({"max_global": 1.5}, r"--max-global 1\.5 is not a size"),
    "true slots": ({"max_global": True}, "--max-global True is not a size"),
    "precision": ({"precision": "int8"}, "precision 'int8' is not known; choose one of: fp32, fp16, bf16"),
    "precision type": ({"precision": []}, r"precision \[\] is not known"),
    "plugin type": ({"plugin": "no"}, "plugin is 'no'; give True or False"),
    "options type": ({"options": {}}, r"options is \{\}; give lfx\.runtime\.build\.Options"),
    "workspace": ({"options": Options(workspace_bytes="8")}, "workspace_bytes is '8'; give a whole number"),  # type: ignore[arg-type]
    "level": ({"options": Options(optimization_level=6)}, "optimization_level 6 is out of range"),
    "refit": ({"options": Options(refit=1)}, "refit is 1; give True or False"),  # type: ignore[arg-type]
    "float16 outputs": (
        {"options": Options(float16_outputs=True)},
        "for a plan in fp16, and this one is fp32; add --fp16",
    ),
    "float16 type": ({"options": Options(float16_outputs=1)}, "float16_outputs is 1; give True or False"),  # type: ignore[arg-type]
    "json folder": ({"output": "folder/one.plan"}, r"one\.plan\.json cannot be written: it is a folder"),
    "output": ({"output": "one.engine"}, r"one\.engine is not the name of a plan; give one that ends with \.plan"),
    "folder": ({"output": "nowhere/one.plan"}, "cannot be written"),
}


@fast_if(lambda task: task == "feature-extraction")
@pytest.mark.parametrize("task", ["feature-extraction", "sentence-embedding"])
def test_a_plan_in_fp16_may_have_float16_outputs(task: str, bundle: MakeBundle, tmp_path: Path) -> None:
    options = {"precision": "fp16", "options": Options(float16_outputs=True), **RTX}
    built = build_engine(bundle(task), tmp_path / "one.plan", **options, log=lambda line: None)
    manifest = PlanManifest.read(built)
    assert manifest.conversion["checked"]
    assert {spec.dtype for spec in manifest.signature.outputs} == {"float16"}
    assert manifest.plugin_layers == manifest.attention_nodes


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused_and_leave_no_files(
    name: str, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, reason = REFUSED[name]
    (tmp_path / "folder" / "one.plan.json").mkdir(parents=True)
    with pytest.raises(LfxError, match=reason):
        build_engine(bundle(), **{"output": "one.plan", **RTX, **change}, log=lambda line: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "one.plan.json"]


@pytest.mark.parametrize("path", [5, None, "x" * 300, "a/" * 2500, "a\0b"], ids=lambda path: str(path)[:5])
def test_a_path_that_cannot_be_a_bundle_is_refused(path: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"bundle .*(give a path|give another path)"):
        build_engine(path, tmp_path / "one.plan", **RTX)


@pytest.mark.slow
def test_a_bundle_of_links_builds(bundle: MakeBundle, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in bundle().iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    built = build_engine(tmp_path / "links", tmp_path / "one.plan", **RTX, log=lambda line: None)
    PlanManifest.read(built).verify(built)


def test_a_full_disk_is_an_error_with_a_cure(bundle: MakeBundle, small_disk: SmallDisk) -> None:
    folder = small_disk()
    full = r"one\.plan cannot be written: no disk space left; make room, or choose another --output"
    with pytest.raises(BuildError, match=full):
        build_engine(bundle(), folder / "one.plan", **RTX, log=lambda line: None)
    assert list(folder.iterdir()) == []


def test_a_full_temporary_folder_is_an_error_with_a_cure(
    bundle: MakeBundle, small_disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_disk()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(BuildError, match=r"no disk space left; make room, or .* set TMPDIR to a folder with room"):
        build_engine(bundle(), tmp_path / "one.plan", **RTX, log=lambda line: None)
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "one.plan").exists()


# A TensorRT that prints the id of its process and then never returns.
HANGING = """
import os, time

class ILogger:
    WARNING = 1
    def __init__(self): pass

def Builder(logger):
    print(f"builds in {os.getpid()}", flush=True)
    time.sleep(10_000)
"""
BUILD = """
import sys
from lfx.runtime.build import builder
from lfx.runtime.flavor import FLAVORS, Flavor

FLAVORS["tensorrt-rtx"] = Flavor("hanging", "rtx")
options = {"flavor": "tensorrt-rtx", "target": "sm89", "plugin": False}
builder.build_engine(*sys.argv[1:], **options, log=lambda line: print(line, flush=True))
"""


def test_a_killed_build_ends_its_child_process_and_the_next_build_removes_its_files(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    temporary, plans = tmp_path / "temporary", tmp_path / "plans"
    temporary.mkdir()
    plans.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(bundle()), str(plans / "one.plan")],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        line = next(line for line in parent.stdout if line.startswith("builds in"))
        parent.kill()
        parent.wait()
        child = int(line.split()[-1])
    assert list(plans.iterdir())  # files that the kill left
    assert list(temporary.glob(".lfx-*"))
    for _ in range(600):
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    build_engine(bundle(), plans / "one.plan", **RTX, log=lambda line: None)
    assert sorted(path.name for path in plans.iterdir()) == ["one.plan", "one.plan.json"]
    assert list(temporary.glob(".lfx-*")) == []


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_concurrent_builds_leave_one_plan_with_its_own_json(bundle: MakeBundle, tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def build(slots: int) -> None:
        try:
            build_engine(bundle(), tmp_path / "one.plan", max_global=slots, **RTX, log=lambda line: None)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=build, args=(slots,)) for slots in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    manifest = PlanManifest.read(tmp_path / "one.plan")
    manifest.verify(tmp_path / "one.plan")
    assert manifest.signature.max_global in (2, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.plan", "one.plan.json"]


def test_another_number_of_slots_than_the_bundle_s_is_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="--max-global 8 does not fit: the bundle was exported with 4; leave it out"):
        build_engine(bundle(max_global=4), tmp_path / "one.plan", max_global=8, **RTX)


class _Separators(torch.nn.Module):
    """A model whose separators are global tokens, and whose positions are computed as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(**ONE_LAYER)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        separators = (input_ids == 2).long()
        hidden = self.inner(input_ids, attention_mask=attention_mask, global_attention_mask=separators)[0]
        return hidden * torch.arange(input_ids.shape[1])[:, None].float().cos()


@pytest.fixture(scope="module")
def separators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that model."""
    return export(_Separators().eval(), tmp_path_factory.mktemp("separators") / "own")


@fast_if(lambda precision: precision == "fp16")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_model_that_chooses_global_tokens_needs_a_slot_for_each_token(
    precision: str, separators: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": precision, "seqlen": ["1:32:40"], **RTX, "log": lambda line: None}
    with pytest.raises(BuildError, match="39 slots may be too few for 40 tokens"):
        build_engine(separators, tmp_path / "one.plan", max_global=39, **options)
    manifest = PlanManifest.read(build_engine(separators, tmp_path / "one.plan", max_global=40, **options))
    assert manifest.signature.max_global == 40


def test_a_half_precision_bundle_is_not_converted_again(bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the bundle is bf16; fp16 is converted from an fp32 bundle"):
        build_engine(bundle(precision="bf16"), tmp_path / "one.plan", precision="fp16", **RTX)


def test_a_changed_bundle_is_refused(bundle: MakeBundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in bundle().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed after the export"):
        build_engine(folder, tmp_path / "one.plan", **RTX)


def test_a_bundle_that_is_replaced_during_the_build_is_refused(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bundle(), tmp_path / "bundle")

    def replace_bundle(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        shutil.rmtree(folder)
        shutil.copytree(bundle("text-classification"), folder)
        Path(job["plan"]).write_bytes(b"plan")
        return {"tensorrt_version": "1.5", "network_layers": 9, "plugin_layers": 2 * LAYERS}

    monkeypatch.setattr("lfx.runtime.build.builder.run_tensorrt", replace_bundle)
    with pytest.raises(ArtifactError, match="bundle was replaced or changed while it was read; run it again"):
        build_engine(folder, tmp_path / "one.plan", **RTX)
    assert not (tmp_path / "one.plan").exists()


@pytest.mark.slow
def test_heads_that_the_plugin_does_not_support_are_refused_by_name(tmp_path: Path) -> None:
    folder = export(tiny_model(**ONE_LAYER, hidden_size=24), tmp_path / "odd")
    with pytest.raises(BuildError, match=r"layer\.0.* has head size 12; the plugin takes multiples of 8 .*--no-plugin"):
        build_engine(folder, tmp_path / "one.plan", **RTX)
    built = build_engine(folder, tmp_path / "one.plan", plugin=False, **RTX, log=lambda line: None)
    assert PlanManifest.read(built).plugin_layers == 0


def test_a_plan_without_a_gpu_is_refused_in_one_line(plan: Path) -> None:
    if device.compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(LfxError, match="no NVIDIA GPU, or no driver for it; run the plan on a machine with one"):
        Engine(plan)


def test_a_plan_runs_on_tensorrt_and_nothing_else(plan: Path, bundle: MakeBundle) -> None:
    with pytest.raises(LfxError, match=r"backend 'onnxruntime' cannot run .* a plan runs on TensorRT"):
        Engine(plan, "onnxruntime")
    with pytest.raises(LfxError, match="is no plan, and TensorRT runs plans; build one with: lfx build-engine"):
        Engine(bundle(), "tensorrt")


def _edit(plan: Path, **changes: Any) -> None:
    data = json.loads(json_path(plan).read_text())
    json_path(plan).write_text(json.dumps(sealed({**data, **changes})))


FOREIGN: dict[str, tuple[Any, str]] = {
    "no json": (lambda p: json_path(p).unlink(), r"needs tiny\.plan\.json beside it"),
    "no plan": (lambda p: p.unlink(), "does not exist; build it with: lfx build-engine BUNDLE"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "has 1000 bytes where tiny.plan.json says"),
    "another plan": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "sha256 differs"),
    "a bundle's json": (lambda p: json_path(p).write_text('{"format_version": 1}'), "has format version None"),
    "other version": (lambda p: _edit(p, tensorrt_version="1.0"), "was built by tensorrt-rtx 1.0, and .* is installed"),
    "other flavor": (lambda p: _edit(p, flavor="trt"), "flavor 'trt', which this lfx does not know"),
    "no profiles": (lambda p: _edit(p, profiles=[{"batch": "x"}]), "is not a size|is broken"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_plan_is_refused_in_one_line(name: str, copy: Path) -> None:
    change, reason = FOREIGN[name]
    change(copy)
    with pytest.raises(LfxError, match=reason):
        Engine(copy)


def test_random_changes_of_json_and_plan_are_refused(copy: Path) -> None:
    random = np.random.default_rng(0)
    refused = 0
    originals = {path: path.read_bytes() for path in (copy, json_path(copy))}
    for path, original in originals.items():
        reach = 256 if path == copy else len(original)  # only the header of the plan; its digest covers the rest
        for _ in range(200):
            data = bytearray(original)
            for _ in range(random.integers(1, 4)):
                position = int(random.integers(reach))
                if random.integers(3) == 0:
                    del data[position : position + int(random.integers(1, 9))]
                else:
                    data[position] ^= int(random.integers(1, 256))
            path.write_bytes(data)
            try:
                PlanManifest.read(copy).verify(copy)
            except ArtifactError:
                refused += 1
            else:  # a change of white space only
                assert json.loads(json_path(copy).read_text()) == json.loads(originals[json_path(copy)])
                assert copy.read_bytes() == originals[copy]
        path.write_bytes(original)
    PlanManifest.read(copy).verify(copy)
    assert refused > 350


@pytest.mark.slow
def test_modules_come_from_the_installation_and_not_from_the_current_folder(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inspect.py").write_text("raise SystemExit('not mine')")
    assert build_engine(bundle(), "one.plan", **RTX, log=lambda line: None).is_file()


def test_a_prepared_graph_with_other_outputs_is_refused(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = freeze.freeze_slots

    def breaks(model: Any, slots: int) -> None:
        original(model, slots)
        value = model.graph.initializers["encoder.layer.1.output.LayerNorm.bias"]
        value.const_value = ir.tensor(value.const_value.numpy() + 0.5)

    monkeypatch.setattr(freeze, "freeze_slots", breaks)
    for precision in ("fp32", "fp16", "bf16"):
        with pytest.raises(BuildError, match=f"the {precision} graph for TensorRT is not the bundle's model"):
            build_engine(bundle(), tmp_path / "one.plan", precision=precision, **RTX, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_plugin_library_is_named(bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfx.__path__", [str(tmp_path)])
    with pytest.raises(PluginError, match=r"liblfx_plugins\.so is not installed.*TensorRT_INCLUDE_DIR.*--no-plugin"):
        build_engine(bundle(), tmp_path / "one.plan", **RTX)


def test_a_model_with_more_global_tokens_than_slots_is_refused(plan: Path) -> None:
    from lfx.runtime.inputs import prepare

    signature = PlanManifest.read(plan).signature
    with pytest.raises(InputError, match="64"):
        prepare(np.full((1, 100), 5), None, np.ones((1, 100), np.int64), signature)


def lfx(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "lfx.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_finds_the_bundle_in_the_current_folder(bundle: MakeBundle, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(bundle())
    done = lfx("build-engine", "--fp16", "--flavor", "tensorrt-rtx", "--target", "sm89", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["precision"], shown["plugin_layers"], shown["attention_nodes"]) == ("fp16", 4, 4)
    built = next(tmp_path.glob("*.plan"))
    assert json.loads(lfx("inspect", built, "--json", cwd=tmp_path).stdout) == shown
    table = lfx("inspect", built, cwd=tmp_path).stdout
    for part in ("4 of 4 nodes are plugin layers", "sm89", "batch 1:1:8, seqlen 1:128:128", "at most 64 a row"):
        assert part in table
    refused = lfx("run", built, "--text", "fox", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: this machine has no NVIDIA GPU")


def test_the_command_asks_which_of_several_bundles(tmp_path: Path) -> None:
    done = lfx("build-engine", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        "error: this folder holds no bundle; name the one to build: lfx build-engine BUNDLE\n",
    )


@pytest.fixture(scope="module")
def int8(bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """int8(activations) -> a quantized bundle."""
    folder = tmp_path_factory.mktemp("int8")
    random = np.random.default_rng(0)
    rows = [{"input_ids": random.integers(3, VOCAB_SIZE, int(n)).tolist()} for n in random.integers(10, 120, 12)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    cache: dict[str, Path] = {}

    def make(activations: str) -> Path:
        if activations not in cache:
            text = folder / "documents.jsonl"
            cache[activations] = quantize(bundle(), folder / activations, calibration=text, activations=activations)
        return cache[activations]

    return make


def test_an_int8_bundle_builds(int8: Any, tmp_path: Path) -> None:
    plan = build_engine(int8("int8"), tmp_path / "one.plan", **RTX, log=lambda line: None)
    manifest = PlanManifest.read(plan)
    assert (manifest.signature.precision, manifest.plugin_layers) == ("int8", 2 * LAYERS)
    assert len(manifest.quantization["layers"]) == 6 * LAYERS
    assert manifest.conversion["checked"]
    assert manifest.source == Manifest.read(int8("int8")).source


def test_int8_that_tensorrt_does_not_take_is_refused(int8: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="lfx quantize --activations int8"):
        build_engine(int8("uint8"), tmp_path / "one.plan", **RTX)
    with pytest.raises(BuildError, match="the bundle is int8"):
        build_engine(int8("int8"), tmp_path / "one.plan", precision="fp16", **RTX)
