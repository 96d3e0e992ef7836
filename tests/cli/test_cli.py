"""The commands: results on stdout, progress on stderr, exit status 0, 1 or 2."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lfx.cli import cli, inspect
from lfx.errors import ArtifactError
from lfx.manifest import MANIFEST, MODEL, WEIGHTS, Manifest
from lfx.runtime import custom_ops
from tests.cli.commands import Done, Forked, lfx, run
from tests.cli.conftest import LABELS
from tests.conftest import MakeBundle
from tests.marks import fast_if
from tests.models import save_tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.runtime.test_signing import Signer

COMMANDS = tuple(cli.commands)


def test_the_command_is_installed() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="lfx")
    assert entry.value == "lfx.cli:main"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command(option: str) -> None:
    done = lfx(option)
    assert (done.code, done.stderr) == (0, "")
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, forked: Forked, tmp_path: Path) -> None:
    done = forked.run([command, "--help"], tmp_path)
    assert (done.code, done.stderr) == (0, "")
    usage, _, first_line = done.stdout.splitlines()[:3]
    assert f" {command} [OPTIONS]" in usage
    assert first_line.strip()
    assert "--json" in done.stdout


def test_version_is_that_of_the_package() -> None:
    assert lfx("--version").stdout == f"lfx, version {importlib.metadata.version('longformer-lfx')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["--fly"],
        ["export"],
        ["export", "--model", "x", "--precision", "fp8"],
        ["export", "--model", "x", "--task", "translation"],
        ["export", "--model", "x", "--opset", "seventeen"],
        ["export", "--model", "x", "--opset", "16"],
        ["export", "--model", "x", "--opset", "24"],
        ["export", "--model", "x", "--global-attention", "last"],
        ["run"],
        ["run", "x"],
        ["run", "x", "--text", "a", "--input", "b"],
        ["run", "x", "--text", "a", "--threads", "0"],
        ["run", "x", "--text", "a", "--output", "rows.jsonl"],
        ["run", "x", "--input", "documents.json", "--output", "rows.PARQUET"],
        ["run", "x", "--input", "documents.json", "--output", "rows.json"],
        ["explain", "x", "--input", "documents.jsonl"],
        ["inspect"],
        ["inspect", "x", "y"],
        ["parity", "x", "--cases", "many"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_with_usage_on_stderr(arguments: list[str], forked: Forked, tmp_path: Path) -> None:
    done = forked.run(arguments, tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")
    assert "\nError: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_message_of_wrong_usage_is_short(forked: Forked, tmp_path: Path) -> None:
    done = forked.run(["export", "--model", "x", "--opset", "9" * 100_000], tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert "Invalid value for '--opset': '9" in done.stderr
    assert len(done.stderr) < 2000


def test_export_writes_a_bundle_named_after_the_model(exported: Done, reviews: Path, workspace: Path) -> None:
    assert exported.json() == json.loads((reviews / MANIFEST).read_text())
    Manifest.read(reviews).verify(reviews)
    assert sorted(path.name for path in workspace.iterdir()) == ["checkpoints", "tiny-reviews"]
    assert {path.name for path in reviews.iterdir()} >= {MODEL, WEIGHTS, "config.json", "tokenizer.json"}
    manifest = exported.json()
    assert (manifest["task"], manifest["opset"], manifest["precision"]) == ("text-classification", 17, "fp32")
    assert manifest["validation"]["passed"] is True


def test_export_shows_its_steps_on_stderr(exported: Done) -> None:
    lines = exported.stderr.splitlines()
    assert all(line.startswith("… ") for line in lines), exported.stderr
    assert [line for line in lines if "comparing: batch" not in line] == [
        "… importing torch",
        "… loading the checkpoint",
        "… tracing",
        "… building the graph",
        "… writing",
        "… comparing: opening the bundle",
        "… comparing: loading the references",
    ]


@pytest.mark.slow
def test_a_process_of_its_own_exports_the_same_bundle(exported: Done, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(workspace / "checkpoints")
    done = lfx("export", "--model", "checkpoints/tiny-reviews", "--json", cwd=tmp_path)
    assert done.json() == json.loads((tmp_path / "tiny-reviews" / MANIFEST).read_text())
    Manifest.read(tmp_path / "tiny-reviews").verify(tmp_path / "tiny-reviews")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "tiny-reviews"]
    assert done.json()["files"] == exported.json()["files"]
    assert done.stderr == exported.stderr


def test_run_gives_the_logits_and_labels_of_the_model(reviews: Path) -> None:
    done = lfx("run", reviews, "--text", "the lazy dog", "--json")
    result = done.json()
    assert done.stderr == ""
    ids = tiny_tokenizer()("the lazy dog").input_ids
    with torch.no_grad():
        logits = tiny_model("text-classification", **LABELS)(torch.tensor([ids])).logits
    assert result["tokens"] == len(ids) == 5
    assert result["backend"].startswith("onnxruntime ")
    assert result["outputs"]["logits"]["shape"] == [1, 2]
    assert result["outputs"]["logits"]["dtype"] == "float32"
    np.testing.assert_allclose(result["outputs"]["logits"]["values"], logits.numpy(), rtol=0, atol=1e-5)
    scores = torch.softmax(logits[0], dim=-1)
    best = int(scores.argmax())
    assert [answer["label"] for answer in result["answers"]] == [["bad", "good"][best], ["bad", "good"][1 - best]]
    assert result["answers"][0]["score"] == pytest.approx(float(scores[best]), abs=1e-5)


@pytest.mark.slow
def test_run_takes_a_file_a_backend_and_the_model_file(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "review.txt").write_text("the lazy dog")
    plain = lfx("run", reviews, "--text", "the lazy dog", "--json").json()
    from_file = lfx("run", reviews / MODEL, "--input", tmp_path / "review.txt", "--json").json()
    assert from_file == plain
    other = lfx("run", reviews, "--text", "the lazy dog", "--json", "--backend", "openvino", "--threads", "1").json()
    assert other["backend"].startswith("openvino ")
    np.testing.assert_allclose(
        other["outputs"]["logits"]["values"], plain["outputs"]["logits"]["values"], rtol=0, atol=1e-5
    )


def test_run_prints_answers_for_people_on_stdout(reviews: Path) -> None:
    done = lfx("run", reviews, "--text", "the lazy dog")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith("5 tokens, onnxruntime ")
    assert "logits: shape (1, 2), first values " in done.stdout
    assert "good" in done.stdout
    assert "bad" in done.stdout


def test_run_writes_all_arrays_and_prints_none_per_token(bundle: MakeBundle, tmp_path: Path) -> None:
    done = lfx("run", bundle(), "--text", "the fox", "--json", "--output", "out.npz", cwd=tmp_path)
    result = done.json()
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    with np.load(tmp_path / "out.npz") as arrays:
        assert set(arrays) == set(result["outputs"]) == {"last_hidden_state", "pooler_output"}
        for name, array in arrays.items():
            shown = result["outputs"][name]
            assert (list(array.shape), str(array.dtype)) == (shown["shape"], shown["dtype"])
        assert arrays["last_hidden_state"].shape == (1, 4, 32)
        np.testing.assert_allclose(arrays["pooler_output"], result["outputs"]["pooler_output"]["values"], rtol=1e-6)
    assert "values" not in result["outputs"]["last_hidden_state"]
    assert result["answers"] == []


def test_run_keeps_the_name_of_the_output_and_replaces_an_older_one(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "arrays.bin").write_text("older")
    done = lfx("run", reviews, "--text", "the fox", "--output", tmp_path / "arrays.bin")
    assert done.code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.bin"]
    assert np.load(tmp_path / "arrays.bin")["logits"].shape == (1, 2)


def test_run_answers_a_question(bundle: MakeBundle) -> None:
    reader = bundle("question-answering")
    document = "quick brown lazy dog"
    result = lfx("run", reader, "--text", "the fox", "--pair", document, "--json").json()
    assert result["tokens"] == 10
    (answer,) = result["answers"]
    assert set(answer) == {"answer", "score"}
    assert answer["answer"] in document
    assert 0 < answer["score"] <= 1
    assert "--pair" in lfx("run", reader, "--text", "the fox").error()


def test_run_gives_a_score_for_each_choice(bundle: MakeBundle) -> None:
    chooser = bundle("multiple-choice")
    pairs = ("--pair", "lazy dog", "--pair", "quick", "--pair", "brown fox over")
    result = lfx("run", chooser, "--text", "the fox", *pairs, "--json").json()
    ids = [tiny_tokenizer()("the fox", text).input_ids for text in pairs[1::2]]
    width = max(map(len, ids))
    rows = torch.tensor([[row + [1] * (width - len(row)) for row in ids]])
    marks = torch.stack([(torch.arange(width) > 4).long()] * 3)[None]  # after the second separator
    with torch.no_grad():
        model = tiny_model("multiple-choice")
        masks = {"attention_mask": (rows != 1).long(), "global_attention_mask": marks}
        logits = model(input_ids=rows, **masks).logits
    np.testing.assert_allclose(result["outputs"]["logits"]["values"], logits.numpy(), rtol=0, atol=1e-5)
    assert [answer["choice"] for answer in result["answers"]] == logits[0].argsort(descending=True).tolist()
    assert sum(answer["score"] for answer in result["answers"]) == pytest.approx(1.0)
    assert "--pair" in lfx("run", chooser, "--text", "the fox").error()


def test_run_refuses_a_second_pair_that_it_would_not_read(reviews: Path) -> None:
    assert "--pair" in lfx("run", reviews, "--text", "the", "--pair", "fox", "--pair", "dog").error()


def test_inspect_prints_the_manifest(reviews: Path) -> None:
    for path in (reviews, reviews / MODEL):
        done = lfx("inspect", path, "--json")
        assert done.json() == json.loads((reviews / MANIFEST).read_text())
        assert done.stderr == ""


def test_inspect_shows_the_limits_to_people(reviews: Path) -> None:
    done = lfx("inspect", reviews)
    assert (done.code, done.stderr) == (0, "")
    for text in (
        "LongformerForSequenceClassification, 2 layers",
        "8, 16 tokens in all",
        "128",
        "99",
        "without it: first",
        "input_ids (batch, sequence) int64",
        "logits (batch, 2) float32",
        "transformers ",
    ):
        assert text in done.stdout, text


def test_inspect_shows_what_runs_attention_on_each_provider_with_a_library(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_lib").mkdir()
    monkeypatch.setattr(custom_ops, "lfx", SimpleNamespace(__path__=[str(tmp_path)]))
    manifest = Manifest.read(reviews)
    assert "liblfx_onnxruntime.so is not installed" in dict(inspect.rows(manifest))["attention on the CPU"]
    for name in custom_ops.LIBRARIES[0], custom_ops.CUDA_LIBRARY:
        assert "attention on CUDA" not in dict(inspect.rows(manifest))
        (tmp_path / "_lib" / name).touch()
    found = dict(inspect.rows(manifest))
    assert found["attention on the CPU"] == found["attention on CUDA"] == "fused kernels"
    inlined = dict(inspect.rows(dataclasses.replace(manifest, inlined=True)))
    assert inlined["attention on CUDA"].startswith("function (the model's attention nodes are inlined")


def test_a_closed_pipe_on_stdout_is_no_crash(reviews: Path) -> None:
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "lfx.cli", "inspect", str(reviews), "--json"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


def _scale_the_weights(folder: Path) -> None:
    """Change a weight of a bundle, so that its manifest still matches."""
    weights = np.fromfile(folder / WEIGHTS, dtype=np.float32)
    (weights * np.float32(1.01)).tofile(folder / WEIGHTS)
    Manifest.read(folder).write(folder)


@pytest.fixture(scope="module")
def parities(reviews: Path, workspace: Path, forked: Forked) -> dict[str, Done]:
    """`lfx parity` of an unchanged bundle, of one with a changed weight, and against another model."""
    spoiled = Path(shutil.copytree(reviews, workspace / "spoiled"))
    _scale_the_weights(spoiled)
    save_tiny_checkpoint(workspace / "checkpoints" / "other", "text-classification", seed=1)
    commands: dict[str, list[str | Path]] = {
        "good": [reviews, "--json"],
        "spoiled": [spoiled, "--json", "--backend", "openvino"],
        "other": [reviews, "--source", "checkpoints/other", "--json"],
        "table": [reviews, "--source", workspace / "checkpoints" / "tiny-reviews"],
    }
    return {name: forked.run(["parity", *arguments], workspace) for name, arguments in commands.items()}


def test_parity_reports_what_the_export_measured(parities: dict[str, Done], exported: Done) -> None:
    report, validation = parities["good"].json(), exported.json()["validation"]
    assert report["passed"] is True
    assert report["backend"] == validation["backend"]
    assert [list(case.items())[:4] for case in report["cases"]] == [
        list(case.items())[:4] for case in validation["cases"]
    ]
    measured = report["outputs"]["logits"]
    assert measured["max_abs_error"] <= measured["tolerance"] < 1e-4
    assert measured["max_abs_value"] == pytest.approx(validation["outputs"]["logits"]["max_abs_value"])


def test_parity_prints_a_table_for_people(parities: dict[str, Done]) -> None:
    done = parities["table"]
    assert done.code == 0, done.stderr
    assert "5 cases, onnxruntime " in done.stdout
    assert "in tolerance" in done.stdout
    assert "out of tolerance" not in done.stdout
    assert "ragged" in done.stdout


def test_parity_out_of_tolerance_exits_1_with_the_report_on_stdout(parities: dict[str, Done]) -> None:
    done = parities["spoiled"]
    error = done.error()
    assert "logits: error" in error
    assert "above the tolerance" in error
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert report["backend"].startswith("openvino ")
    assert report["outputs"]["logits"]["max_abs_error"] > report["outputs"]["logits"]["tolerance"]


def test_parity_of_a_bundle_made_from_a_module_asks_for_its_checkpoint(
    bundle: MakeBundle, forked: Forked, tmp_path: Path
) -> None:
    message = forked.run(["parity", bundle()], tmp_path).error()
    assert "made from a module in memory" in message
    assert "--source" in message


def test_parity_refuses_a_checkpoint_with_other_weights(parities: dict[str, Done]) -> None:
    assert "other weights than the bundle was made from" in parities["other"].error()
    assert parities["other"].stdout == ""


@pytest.fixture(scope="module")
def refused(workspace: Path, forked: Forked) -> dict[str, Done]:
    """Exports that are refused, each in its own folder."""
    good = workspace / "checkpoints" / "tiny-reviews"
    other = workspace / "refused"
    (other / "bert").mkdir(parents=True)
    (other / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (other / "notes").mkdir()
    (other / "notes" / "diary.txt").write_text("dear diary")
    commands: dict[str, list[str | Path]] = {
        "bert": ["--model", other / "bert"],
        "missing": ["--model", other / "nowhere"],
        "output": ["--model", good, "--output", other / "notes"],
    }

    done = {}
    for name, arguments in commands.items():
        folder = workspace / f"cwd {name}"
        folder.mkdir()
        done[name] = forked.run(["export", *arguments], folder)
    return done


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "is a bert, not a longformer"),
        ("missing", "nowhere does not exist; give a folder"),
        ("output", "notes exists and is no bundle; choose another --output"),
    ],
)
def test_export_refuses_in_one_line_and_writes_nothing(
    name: str, message: str, refused: dict[str, Done], workspace: Path
) -> None:
    assert message in refused[name].error()
    assert refused[name].stdout == ""
    assert list((workspace / f"cwd {name}").iterdir()) == []
    assert sorted(path.name for path in (workspace / "refused").iterdir()) == ["bert", "notes"]
    assert (workspace / "refused" / "notes" / "diary.txt").read_text() == "dear diary"


def _cut_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def _flip_weights(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[1000] ^= 1
    (folder / WEIGHTS).write_bytes(data)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "copy does not exist"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "manifest cut": (_cut_manifest, f"{MANIFEST} cannot be read"),
    "weights changed": (_flip_weights, f"{WEIGHTS} was changed after the export"),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
}


@fast_if(lambda command, name: command[0] == "run" or name == "weights changed")
@pytest.mark.parametrize("command", [["run", "--text", "fox"], ["inspect"], ["parity"]], ids=lambda c: c[0])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_an_error_of_one_line(
    name: str, command: list[str], copy: Path, forked: Forked, tmp_path: Path
) -> None:
    change, message = BROKEN[name]
    change(copy)
    done = forked.run([command[0], copy, *command[1:], "--json"], tmp_path)
    assert message in done.error()
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "the " * 127], "129 tokens, above the model's maximum 128; shorten or split it"),
        (["--text", "the", "--pair", "fox " * 124], "129 tokens"),
        (["--input", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--input", "."], "cannot be read"),
        (["--input", "latin.txt"], "latin.txt cannot be read as UTF-8 text"),
        (["--text", "fox", "--backend", "tensorflow"], "backend 'tensorflow' is not known"),
        (["--text", "fox", "--provider", "tpu"], "provider 'tpu' is not known"),
        (["--text", "fox", "--output", "nowhere/out.npz"], "nowhere/out.npz cannot be written"),
        (["--text", "fox", "--output", "."], "folder"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_run_refuses_in_one_line(
    arguments: list[str], message: str, reviews: Path, forked: Forked, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    done = forked.run(["run", reviews, *arguments, "--json"], tmp_path)
    assert message in done.error()
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]


def test_the_longest_text_still_runs(reviews: Path) -> None:
    assert lfx("run", reviews, "--text", "the " * 126, "--json").json()["tokens"] == 128


@pytest.mark.parametrize("path", ["x" * 300, "review.txt"])
def test_a_path_that_is_no_bundle_is_an_error_of_one_line(path: str, forked: Forked, tmp_path: Path) -> None:
    (tmp_path / "review.txt").write_text("fox")
    for command in (["run", path, "--text", "fox"], ["inspect", path], ["parity", path]):
        assert "bundle" in forked.run(command, tmp_path).error()


def test_a_bundle_without_tokenizer_says_what_to_do(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    manifest = Manifest.read(copy)
    manifest.write(copy)
    assert "has no tokenizer.json" in lfx("run", copy, "--text", "fox").error()


ODD_FILES: dict[str, Callable[[Path], Any]] = {
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "empty": lambda path: path.touch(),
    "empty.onnx": lambda path: path.touch(),
    "binary.plan": lambda path: (path.write_bytes(b"\xff"), path.with_name("binary.plan.json").write_bytes(b"\xff")),
    "folder.plan": lambda path: path.mkdir(),
    "folder.onnx": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path),
    "pipe": os.mkfifo,
    "pipe.onnx": os.mkfifo,
    "pipe.plan": os.mkfifo,
    "pipe inside": lambda path: (path.mkdir(), os.mkfifo(path / MANIFEST)),
    "folder inside": lambda path: (path / MANIFEST).mkdir(parents=True),
}


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_that_is_no_artifact_is_an_error_of_one_line(command: str, tmp_path: Path) -> None:
    for name, make in ODD_FILES.items():
        make(tmp_path / name)
        with pytest.raises(ArtifactError, match=name):
            cli.main([command, str(tmp_path / name)], standalone_mode=False)
    for name in ("/dev/null", "/dev/zero", "/proc/self/mem"):
        with pytest.raises(ArtifactError, match=name):
            cli.main([command, name], standalone_mode=False)


def test_inspect_of_a_manifest_that_lacks_a_number_is_an_error_of_one_line(copy: Path) -> None:
    manifest = Manifest.read(copy)
    for result in ({}, {"max_abs_error": None, "tolerance": 1}, {"max_abs_error": "1", "tolerance": 1}, 5):
        dataclasses.replace(manifest, validation={"outputs": {"logits": result}}).write(copy)
        with pytest.raises(ArtifactError, match=r"lfx\.json: validation: outputs: logits.* is broken: "):
            cli.main(["inspect", str(copy)], standalone_mode=False)


def test_verify_says_who_signed(reviews: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["verify", str(reviews)], standalone_mode=False)
    assert "files match lfx.json; no signature was checked" in capsys.readouterr().out
    signer = Signer(Ed25519PrivateKey.generate())
    text = signer.sign((copy / MANIFEST).read_bytes(), comment="[b]release\t1\u202e")
    (copy / f"{MANIFEST}.minisig").write_text(text, encoding="utf-8")
    cli.main(["verify", str(copy), "--key", signer.public()], standalone_mode=False)
    assert capsys.readouterr().out.endswith("key 0706050403020100, trusted comment: [b]release\\t1\\u202e\n")
    cli.main(["verify", str(copy), "--key", signer.public(), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["trusted_comment"] == "[b]release\t1\u202e"


def test_verify_exits_1_in_one_line(copy: Path) -> None:
    key = Signer(Ed25519PrivateKey.generate()).public()
    assert "lfx.json.minisig is no file, so there is no signature" in lfx("verify", copy, "--key", key).error()
    _flip_weights(copy)
    assert f"{WEIGHTS} was changed after the export" in lfx("verify", copy).error()


REFUSED = """
import sys, types

def export(model, output, *, progress, **options):
    raise {error}

sys.modules["lfx.export"] = types.ModuleType("lfx.export")
sys.modules["lfx.export"].export = export
sys.argv = ["lfx", "export", "--model", "x"]
from lfx.cli import main
main()
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("OSError(28, 'No space left on device', 'a\\x1b')", r"error: a\x1b: No space left on device; make room"),
        ("PermissionError(13, 'Permission denied', 'a')", "error: a: Permission denied"),
        ("MemoryError()", "error: out of memory; use shorter or fewer sequences"),
        ("__import__('lfx.errors').errors.LfxError('a' * 5000 + '; do this')", "aaa; do this"),
    ],
)
def test_errors_of_the_system_are_one_line_with_a_cure(error: str, message: str, tmp_path: Path) -> None:
    done = run([sys.executable, "-c", REFUSED.format(error=error)], tmp_path)
    assert message in done.error()
    assert len(done.stderr) < 2000
