"""The graph that TensorRT gets, compared with the bundle that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lfx.errors import BuildError
from lfx.manifest import Manifest
from lfx.parity import UNIT_ROUNDOFF, compare, quick_cases
from lfx.runtime.engine import Engine
from lfx.runtime.runner import engine_runner, model_inputs
from lfx.signature import Signature


def check_conversion(
    bundle: Path,
    manifest: Manifest,
    model: Path,
    signature: Signature,
    progress: Callable[[str], None],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Run the graph that TensorRT gets beside its bundle, and require that rounding alone tells them apart.

    How much a model makes of its rounding errors is known from the export: PyTorch's own error there, e, over the unit
    roundoff u of the bundle's precision. In a precision of unit roundoff u' the same model errs by e · u'/u, so the
    tolerance of `parity` is 2 · e · u'/u + band. An int8 model whose graph sums in another order rounds some inputs to
    another step, so there e is what its rounding costs. float32, float16 and int8 run in ONNX Runtime, bfloat16 in
    OpenVINO, where it is installed.

    Raises:
        BuildError: an output is further off.
    """
    backend = "openvino" if signature.precision == "bf16" else "onnxruntime"
    if find_spec(backend) is None:
        log(f"warning: {backend} is not installed, so the {signature.precision} graph was not checked")
        return {"checked": False, "reason": f"{backend} is not installed"}
    with Engine(bundle) as right, Engine(model, backend) as converted:
        report = compare(
            quick_cases(max(signature.attention_windows), signature.max_seqlen),
            lambda case: model_inputs(case, signature),
            reference=engine_runner(right),
            witness=None,
            candidate=engine_runner(converted),
            precision=signature.precision,
            layers=len(signature.attention_windows),
            on_case=lambda case: progress(f"checking the graph: {case}"),
        )
        name_of_backend = converted.backend
    measured = {}
    for name, result in report.outputs.items():
        if manifest.quantization:
            exported = manifest.quantization["accuracy"]["outputs"][name]["unfused_max_abs_error"]
        else:
            exported = manifest.validation["outputs"][name]["torch_max_abs_error"]
        growth = UNIT_ROUNDOFF[signature.precision] / UNIT_ROUNDOFF[manifest.signature.precision]
        limit = 2 * exported * growth + report.band(name)
        measured[name] = {"max_abs_difference": result.error, "limit": limit}
        if not result.error <= limit:
            raise BuildError(
                f"the {signature.precision} graph for TensorRT is not the bundle's model: {name} differs by "
                f"{result.error:.3g}, which is more than rounding leaves ({limit:.3g}), at {result.worst}"
            )
    return {"checked": True, "backend": name_of_backend, "outputs": measured}
