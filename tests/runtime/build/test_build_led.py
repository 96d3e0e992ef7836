"""`build_engine` of a model that writes texts, with TensorRT-RTX and without a GPU: two plans and one manifest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lfx.errors import ArtifactError, BuildError, LfxError, PluginError
from lfx.manifest import Manifest
from lfx.runtime import Engine, build_engine
from lfx.runtime import plugin as plugins
from lfx.runtime.build import Options, builder, convert_precision, prepare_graph
from lfx.runtime.build.check_graph import check_conversion
from lfx.runtime.plan import PlanManifest, decoder_path, json_path
from lfx.runtime.signing import verify
from tests.conftest import MakeBundle, MakeLed
from tests.marks import fast_if

ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
RTX = {"flavor": "tensorrt-rtx", "target": "sm89"}
LAYERS = 2  # of the tiny LED's encoder, and of its decoder
FILES = ["one.plan", "one.plan.decoder", "one.plan.json"]


@pytest.fixture(scope="module")
def led(led_bundle: MakeLed) -> Path:
    """The bundle of a tiny LED."""
    return led_bundle(7)[1]


def prepare(led: Path, folder: Path, precision: str, new_tokens: int = 20) -> tuple[Manifest, Any]:
    """Prepare both graphs as `build_engine` does; returns the bundle's manifest and the plan's signature."""
    from lfx.runtime.build.arguments import plan_signature
    from lfx.runtime.profile import profiles

    manifest = Manifest.read(led)
    ranges = profiles(["1"], ["1:64:64"], manifest.signature)
    signature = plan_signature(manifest.signature, precision, 4, ranges, new_tokens, float16_outputs=False)
    prepare_graph.prepare_graph(led / ENCODER, folder / ENCODER, manifest, signature, 4, True)
    prepare_graph.prepare_decoder(led / DECODER, folder / DECODER, manifest, signature)
    return manifest, signature


@fast_if(lambda precision: precision == "fp16")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_both_graphs_are_converted_and_give_the_bundle_s_logits(precision: str, led: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if precision == "bf16" else "onnxruntime")
    manifest, signature = prepare(led, tmp_path, precision)
    for name in (ENCODER, DECODER):
        onnx.checker.check_model(tmp_path / name, full_check=True)
    cached = {spec.dtype for spec in signature.decoder.inputs if spec.name.startswith("past_key_values")}
    assert cached == {"float16" if precision == "fp16" else "float32"}
    result = check_conversion(led, manifest, tmp_path / ENCODER, signature, lambda _: None, lambda _: None)
    assert result["checked"]
    assert {"last_hidden_state", "present.1.encoder.value", "first_logits", "logits"} <= set(result["outputs"])


def test_the_prepared_graphs_write_the_bundle_s_texts(led: Path, tmp_path: Path) -> None:
    prepare(led, tmp_path, "fp16")
    shutil.copy(led / "generation_config.json", tmp_path)
    ids = np.random.default_rng(0).integers(3, 90, (1, 40))
    with Engine(led) as engine, Engine(tmp_path / ENCODER, "onnxruntime") as half:
        options = {"max_new_tokens": 12, "num_beams": 2, "eos_token_id": 2}
        np.testing.assert_array_equal(half.generate(ids, **options), engine.generate(ids, **options))


def test_keys_and_values_in_float16_are_not_cast(led: Path, tmp_path: Path) -> None:
    prepare(led, tmp_path, "fp16")
    model = ir.load(tmp_path / DECODER)
    cached = {
        v.name for v in (*model.graph.inputs, *model.graph.outputs) if "key" in str(v.name) or "value" in str(v.name)
    }
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert not cached & {value.name for node in casts for value in (*node.inputs, *node.outputs) if value is not None}
    assert len(casts) == 1 + 4 * LAYERS  # of the logits, and before and after each softmax


def test_a_wrong_conversion_of_the_decoder_is_refused(
    led: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, signature = prepare(led, tmp_path, "fp32")
    model = ir.load(tmp_path / DECODER)
    bias = model.graph.initializers["led.decoder.layers.1.fc2.bias"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy()[::-1].copy(), name=bias.name)
    ir.save(model, tmp_path / DECODER, external_data=DECODER + ".data", size_threshold_bytes=1024)
    with pytest.raises(
        BuildError, match=r"the fp32 graph for TensorRT is not the bundle's model: first_logits differs"
    ):
        check_conversion(led, manifest, tmp_path / ENCODER, signature, lambda _: None, lambda _: None)


@pytest.mark.parametrize(("precision", "lowest"), [("fp16", -65504.0), ("bf16", -3.39e38)])
def test_mask_fill_values_are_scaled_to_the_precision(precision: str, lowest: float) -> None:
    fills = np.array([np.finfo(np.float32).min, np.finfo(np.float32).min / 2, -np.inf, 7.0], np.float32)
    fitted = convert_precision._fit_fill(fills, precision)
    np.testing.assert_allclose(fitted, [lowest, lowest / 2, -np.inf, 7.0], rtol=1e-2)
    assert np.isfinite(fitted[:2].astype(convert_precision.DTYPES[precision][1])).all()


@pytest.fixture
def _needs_tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'longformer-lfx[rtx]'")
    try:
        plugins.library()
    except PluginError as error:
        pytest.skip(f"no plugin library: {error}")


@fast_if(lambda precision: precision == "fp16")
@pytest.mark.trt
@pytest.mark.usefixtures("_needs_tensorrt")
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {"plugin": False, "seqlen": ["63:64:64"]}),
        ("fp16", {"options": Options(float16_outputs=True)}),
        ("bf16", {"batch": ["1", "1:2:4"], "seqlen": ["1:32:64", "65:128:200"], "max_new_tokens": 12}),
    ],
    ids=["fp32-no-plugin", "fp16", "bf16-two-profiles"],
)
def test_a_model_that_writes_texts_becomes_two_plans(
    precision: str, options: dict[str, Any], led: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    options = {**RTX, "num_beams": 3, "max_global": 4, **options}
    if not options.get("plugin", True):
        options["max_global"] = 64
    plan = build_engine(
        led, tmp_path / "one.plan", precision=precision, **options, progress=steps.append, log=lambda line: None
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    manifest, source = PlanManifest.read(plan), Manifest.read(led).signature.decoder
    manifest.verify(plan)
    assert verify(plan).files == ("one.plan", "one.plan.decoder")
    assert (manifest.attention_nodes, manifest.plugin_layers) == (
        2 * LAYERS,
        2 * LAYERS if "plugin" not in options else 0,
    )
    assert {"first_logits", "logits"} <= set(manifest.conversion["outputs"])
    decoder, signature = manifest.decoder_plan, manifest.signature.decoder
    assert decoder is not None and signature is not None and source is not None
    assert len(decoder.profiles) == len(manifest.profiles)
    for profile, encoder in zip(decoder.profiles, manifest.profiles, strict=True):
        assert profile.batch.max == 3 * encoder.batch.max
        assert profile.seqlen == encoder.seqlen
        assert (profile.past.min, profile.past.max) == (0, signature.max_tokens - 1)
    assert signature.max_tokens == options.get("max_new_tokens", source.max_tokens)
    assert decoder.generation["decoder_start_token_id"] == 2
    assert {"TensorRT: building", "decoder, TensorRT: building"} <= set(steps)
    assert json.loads(json.dumps(manifest.to_dict())) == json.loads(json_path(plan).read_text())
    assert PlanManifest.read(plan) == manifest


@pytest.mark.slow
@pytest.mark.trt
@pytest.mark.usefixtures("_needs_tensorrt")
def test_the_command_builds_and_inspect_shows_both_plans(led: Path, tmp_path: Path) -> None:
    def lfx(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lfx.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    options = ["--max-new-tokens", "20", "--num-beams", "2", "--flavor", "tensorrt-rtx", "--target", "sm89"]
    done = lfx("build-engine", led, "--fp16", *options, "--output", "one.plan")
    assert done.returncode == 0, done.stderr
    assert "one.plan.decoder: rows 1:2:16, tokens 1:1:4, cached 0:9:19, seqlen 1:" in done.stdout
    table = lfx("inspect", "one.plan").stdout
    for part in ("decoder's profile", "rows 1:2:16", "logits: ", "decoder's size", "longest text"):
        assert part in table
    refused = lfx("run", "one.plan", "--text", "fox")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: this machine has no NVIDIA GPU")


class StoppedError(Exception):
    """Stops a build."""


def fake_tensorrt(job: dict[str, Any], *_: Any) -> dict[str, Any]:
    """Writes the path of the graph in place of a plan."""
    Path(job["plan"]).write_text(job["onnx"])
    return {"tensorrt_version": "1", "network_layers": 1, "plugin_layers": 2 * LAYERS}


@pytest.fixture
def _fake_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in an instant, and without checks of the numbers."""
    monkeypatch.setattr(builder, "run_tensorrt", fake_tensorrt)
    monkeypatch.setattr(builder, "check_conversion", lambda *_: {"checked": False, "reason": "a test"})
    monkeypatch.setattr("lfx.runtime.build.arguments.choose_flavor", lambda requested: "tensorrt-rtx")
    monkeypatch.setattr("lfx.runtime.build.arguments.plugins.library", lambda: Path("library"))


@pytest.mark.usefixtures("_fake_build")
def test_a_build_that_fails_at_the_decoder_leaves_nothing(
    led: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: dict[str, Any], *arguments: Any) -> dict[str, Any]:
        if job["plan"].endswith(".decoder"):
            raise StoppedError
        return fake_tensorrt(job, *arguments)

    monkeypatch.setattr(builder, "run_tensorrt", stop)
    with pytest.raises(StoppedError):
        build_engine(led, tmp_path / "one.plan", **RTX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_fake_build")
def test_a_plan_of_one_graph_removes_the_older_decoder_s_plan(
    led: Path, own_bundle: MakeBundle, tmp_path: Path
) -> None:
    plan = build_engine(led, tmp_path / "one.plan", **RTX)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    build_engine(led, plan, **RTX, num_beams=2)
    PlanManifest.read(plan).verify(plan)
    build_engine(own_bundle(), plan, **RTX)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.plan", "one.plan.json"]
    decoder_path(plan).write_text("a file of the user's")
    build_engine(own_bundle(), plan, **RTX)
    assert decoder_path(plan).exists()


@pytest.mark.usefixtures("_fake_build")
@pytest.mark.parametrize(("defaults", "beams"), [({}, 1), ({"num_beams": 4}, 4), ({"num_beams": "x"}, 1)], ids=str)
def test_the_checkpoint_s_beams_are_the_default(
    defaults: dict[str, Any], beams: int, led: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfx.runtime.build.arguments.read_defaults", lambda folder: defaults)
    manifest = PlanManifest.read(build_engine(led, tmp_path / "one.plan", **RTX, batch=["2"]))
    assert manifest.decoder_plan is not None
    assert manifest.decoder_plan.profiles[0].batch.max == 2 * beams
    assert manifest.decoder_plan.generation == defaults


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many tokens": ({"max_new_tokens": 65}, "--max-new-tokens 65 is out of range"),
    "no tokens": ({"max_new_tokens": 0}, "--max-new-tokens 0 is out of range"),
    "type": ({"max_new_tokens": "9"}, "--max-new-tokens is '9'"),
    "no beams": ({"num_beams": 0}, "--num-beams 0 is out of range"),
    "decoder folder": ({"output": "folder/one.plan"}, r"one\.plan\.decoder cannot be written: it is a folder"),
}


@pytest.mark.usefixtures("_fake_build")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused(name: str, led: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "one.plan.decoder").mkdir(parents=True)
    change, reason = REFUSED[name]
    with pytest.raises(LfxError, match=reason):
        build_engine(led, **{"output": "one.plan", **RTX, **change})
    assert not (tmp_path / "one.plan").exists()


@pytest.mark.usefixtures("_fake_build")
def test_options_of_texts_are_refused_for_other_models(own_bundle: MakeBundle, tmp_path: Path) -> None:
    for option in ("max_new_tokens", "num_beams"):
        with pytest.raises(BuildError, match=rf"--{option.replace('_', '-')} 2 is for a model that writes texts"):
            build_engine(own_bundle(), tmp_path / "one.plan", **RTX, **{option: 2})


@pytest.mark.usefixtures("_fake_build")
def test_a_bundle_whose_decoder_was_changed_is_refused(led: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in led.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / DECODER).write_bytes((folder / DECODER).read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"decoder_model\.onnx has .* bytes where lfx\.json says"):
        build_engine(folder, tmp_path / "one.plan", **RTX)
    (folder / DECODER).unlink()
    with pytest.raises(ArtifactError, match=r"decoder_model\.onnx is missing"):
        build_engine(folder, tmp_path / "one.plan", **RTX)


def test_a_manifest_without_a_decoder_is_what_it_was(led: Path) -> None:
    signature = replace(Manifest.read(led).signature, task="feature-extraction", decoder=None)
    plan = PlanManifest(signature, "tensorrt", "1", "sm90", (), None, 0, 0, {}, {}, {}, {}, {}, {}, {})
    assert "decoder_plan" not in plan.to_dict()
