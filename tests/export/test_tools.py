"""Standard tools rewrite an exported model, with functions or inlined, and its outputs stay the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from packaging.version import Version

from lfx.export import relayout
from lfx.manifest import MODEL, Manifest
from lfx.parity import UNIT_ROUNDOFF
from tests.conftest import MakeBundle
from tests.marks import fast_if


def answer(path: Path) -> np.ndarray:
    """Return the first output for two rows, one of them padded, with global tokens."""
    ids = np.random.default_rng(0).integers(3, 50, (2, 37))
    mask, marks = np.ones_like(ids), np.zeros_like(ids)
    mask[1, 20:] = 0
    marks[:, [0, 5]] = 1
    feeds = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": marks}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    output = onnxruntime.InferenceSession(path, options).run(None, feeds)[0]
    assert isinstance(output, np.ndarray)
    return output


def slim(source: Path, target: Path) -> None:
    """onnxslim."""
    onnxslim.slim(str(source), str(target))


def sanitize(source: Path, target: Path) -> None:
    """Polygraphy's constant folding."""
    program = "import sys; from polygraphy.tools import main; sys.argv[0] = 'polygraphy'; sys.exit(main())"
    command = [sys.executable, "-c", program, "surgeon", "sanitize", str(source), "--fold-constants", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def halve(source: Path, target: Path) -> None:
    """ONNX Runtime's float16 converter, inputs and outputs left as they are."""
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


# GraphSurgeon, which the first two use, recurses without end over a function that is called inside an If; with a
# constant number of global slots the graph has no If.
CASES = [
    (slim, "fp32", {"max_global": 4}),
    (slim, "fp32", {"inline_functions": True}),
    (sanitize, "fp32", {"max_global": 4}),
    (sanitize, "fp32", {"inline_functions": True}),
    (halve, "fp16", {}),
    (halve, "fp16", {"inline_functions": True}),
]


@fast_if(lambda tool, options: tool is slim and "max_global" in options)
@pytest.mark.parametrize(
    ("tool", "precision", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_tool_keeps_the_model(
    tool: Callable[[Path, Path], None], precision: str, options: dict[str, Any], own_bundle: MakeBundle, tmp_path: Path
) -> None:
    if tool is halve and options and Version(onnxruntime.__version__) < Version("1.31"):
        pytest.skip("the float16 converter of this ONNX Runtime writes casts of the wrong type for this model")
    source = own_bundle(**options) / MODEL
    tool(source, tmp_path / "changed.onnx")
    expected = answer(source)
    # Each of the two models may be as far from the float64 reference as the export was allowed to be, in its own type.
    allowed = Manifest.read(source.parent).validation["outputs"]["last_hidden_state"]["tolerance"]
    growth = UNIT_ROUNDOFF[precision] / UNIT_ROUNDOFF["fp32"]
    np.testing.assert_allclose(answer(tmp_path / "changed.onnx"), expected, rtol=0, atol=allowed + allowed * growth)


@pytest.mark.parametrize("layout", ["lfx", "hf"])
def test_onnxruntimes_quantizer_takes_a_classifier(layout: str, bundle: MakeBundle, tmp_path: Path) -> None:
    source = bundle("text-classification") / MODEL
    if layout == "hf":
        source = relayout(source.parent, tmp_path / "hf") / "onnx" / MODEL
    quantize_dynamic(source, tmp_path / "int8.onnx", weight_type=QuantType.QUInt8, reduce_range=True)
    names = [spec.name for spec in onnx.load(source, load_external_data=False).graph.value_info]
    weights = [tensor.name for tensor in onnx.load(source, load_external_data=False).graph.initializer]
    assert not set(names) & set(weights)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
