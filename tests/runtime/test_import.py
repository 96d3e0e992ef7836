"""Imports of `lfx.runtime`, and errors of missing extras; each in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MakeBundle
from tests.marks import fast_if

EXPORT_SIDE = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")

LOADED = f"""
import sys
found = sorted(name for name in {EXPORT_SIDE} if name in sys.modules)
assert not found, found
"""
COMMAND = """
import sys
for module in {blocked!r}:
    sys.modules[module] = None  # importing it fails, as if it were not installed
sys.argv = ["lfx", *{arguments!r}]
from lfx.cli import main
main()
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def lfx_without(blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with some modules blocked."""
    return python(COMMAND.format(blocked=blocked, arguments=arguments))


@pytest.mark.parametrize(
    "module",
    [
        "lfx",
        "lfx.runtime",
        "lfx.runtime.tokenizer",
        "lfx.runtime.serve.server",
        "lfx.signature",
        "lfx.manifest",
        "lfx.machine",
        "lfx.errors",
        "lfx.cli",
        "lfx.parity",
    ],
)
def test_importing_the_production_side_loads_nothing_of_the_export_side(module: str) -> None:
    done = python(f"import {module}{LOADED}")
    assert done.returncode == 0, done.stderr


def test_the_import_check_detects_an_import() -> None:
    assert "['onnx']" in python(f"import onnx{LOADED}").stderr


def test_importing_the_runtime_loads_no_backend() -> None:
    others = ("onnxruntime", "openvino", "tokenizers", "click", "rich")
    done = python(f"import sys, lfx.runtime; print([name for name in {others} if name in sys.modules])")
    assert done.stdout == "[]\n"


def test_running_an_engine_loads_nothing_of_the_export_side(bundle: MakeBundle) -> None:
    code = """
import sys
from lfx import runtime
from lfx.runtime.tokenizer import Tokenizer
from pathlib import Path
with runtime.Engine(sys.argv[1]) as engine:
    ids = Tokenizer(Path(sys.argv[1]), engine.signature).encode("the fox").ids
    print(engine.run([ids, ids[:2]])["pooler_output"].shape)
"""
    done = python(code + LOADED, str(bundle()))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 32)\n"


def test_lfx_run_and_inspect_work_where_the_export_side_is_not_installed(bundle: MakeBundle) -> None:
    folder = str(bundle())
    for arguments in (["run", folder, "--text", "the fox", "--json"], ["inspect", folder]):
        done = lfx_without(EXPORT_SIDE, *arguments)
        assert (done.returncode, done.stderr) == (0, "")


def test_openvino_is_imported_without_its_telemetry(bundle: MakeBundle, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    code = """
import os, sys
os.environ["HOME"] = sys.argv[2]  # the telemetry would write to it
from lfx.runtime import Engine
Engine(sys.argv[1], "openvino").close()
print(sorted(name for name in sys.modules if name.startswith("openvino_telemetry")))
"""
    done = python(code, str(bundle()), str(tmp_path))
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "[]\n", []), done.stderr


def test_help_imports_nothing_heavy() -> None:
    # Importing any of these takes longer than the rest of --help.
    heavy = (*EXPORT_SIDE, "numpy", "onnxruntime", "openvino", "tokenizers", "rich", "cryptography", "tensorrt_rtx")
    code = f"""
import sys
from lfx.cli import cli
for command in ([], *([name] for name in cli.commands)):
    cli.main([*command, "--help"], standalone_mode=False)
print([name for name in {heavy} if name in sys.modules])
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") > 8
    assert done.stdout.endswith("\n[]\n")


@fast_if(lambda blocked, arguments: blocked != "torch" and arguments[0] != "export")
@pytest.mark.parametrize(
    ("blocked", "arguments", "extra"),
    [
        ("onnxruntime", ["run", "{bundle}", "--text", "fox"], "cpu"),
        ("openvino", ["run", "{bundle}", "--text", "fox", "--backend", "openvino"], "openvino"),
        ("onnx", ["run", "{bundle}", "--text", "fox", "--backend", "openvino"], "openvino"),
        ("onnx", ["run", "{bundle}", "--text", "fox", "--backend", "reference"], "export"),
        ("onnxruntime", ["run", "{bundle}", "--text", "fox", "--provider", "cuda"], "gpu"),
        ("openvino", ["run", "{bf16}", "--text", "fox"], "openvino"),
        ("torch", ["parity", "{bundle}", "--source", "nowhere"], "export"),
        ("torch", ["export", "--model", "nowhere"], "export"),
        ("transformers", ["export", "--model", "nowhere"], "export"),
        ("onnxscript", ["export", "--model", "nowhere"], "export"),
        ("onnxruntime", ["export", "--model", "nowhere"], "export"),
        ("cryptography", ["verify", "{bundle}", "--key", "minisign.pub"], "verify"),
    ],
)
def test_a_missing_extra_is_refused_in_one_line_with_the_cure(
    blocked: str, arguments: list[str], extra: str, bundle: MakeBundle
) -> None:
    paths = {"bundle": str(bundle())}
    if "{bf16}" in arguments:
        paths["bf16"] = str(bundle(precision="bf16"))
    done = lfx_without((blocked,), *(argument.format(**paths) for argument in arguments))
    *progress, error = done.stderr.splitlines()
    cure = f"pip install 'longformer-lfx[{extra}]'"
    assert error == f"error: {blocked} is not installed; install it with: {cure}"
    assert all(line.startswith("… ") for line in progress)
    assert (done.returncode, done.stdout) == (1, "")


def test_the_runtime_raises_the_error_of_the_command_line(bundle: MakeBundle) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
from lfx.errors import DependencyError
from lfx.runtime import Engine
try:
    Engine(sys.argv[1])
except DependencyError as error:
    print(error)
"""
    assert "pip install 'longformer-lfx[cpu]'" in python(code, str(bundle())).stdout


def test_a_backend_that_breaks_while_it_is_imported_is_an_error_of_one_line(bundle: MakeBundle, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object')")
    command = COMMAND.format(blocked=(), arguments=("run", str(bundle()), "--text", "fox"))
    done = python(f"import sys; sys.path.insert(0, sys.argv[1]){command}", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error:")
    assert "libcublas.so.12" in line
