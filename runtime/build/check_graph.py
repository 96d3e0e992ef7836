"""Compares the graph prepared for TensorRT with the bundle that it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lfx.errors import ArtifactError, BuildError, LfxError
from lfx.manifest import Manifest
from lfx.parity import UNIT_ROUNDOFF, Arrays, Case, Runner, compare, quick_cases
from lfx.runtime.engine import Engine
from lfx.runtime.runner import FIRST_LOGITS, LATER_LOGITS, model_inputs, outputs_runner, with_text
from lfx.signature import PAST, Signature


def check_conversion(
    bundle: Path,
    manifest: Manifest,
    model: Path,
    signature: Signature,
    progress: Callable[[str], None],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Require that the outputs of the prepared graphs differ from the bundle's by no more than rounding errors.

    The limit is derived from an error e that was measured at export in the bundle's precision, whose unit roundoff is
    u. In a precision whose unit roundoff is u' the rounding errors of the same model grow to e · u'/u, so the limit is
    2 · e · u'/u + band, as in `lfx.parity`. For an int8 bundle e is the error of its quantized graph without fused
    layers: sums in another order round some activations to a neighbouring step. For other bundles e is PyTorch's error.
    Graphs in float32, float16 and int8 run in ONNX Runtime, those in bfloat16 in OpenVINO. The decoder of a model that
    writes texts decodes given tokens, one by one.

    Args:
        model: the prepared graph; if it is an encoder's, the decoder's is beside it. signature: the plan's signature.
        progress: called with a description of each case.
        log: called with a warning if the backend is not installed; nothing can be checked then.
    Returns:
        {"checked": True, "backend", "outputs": name -> {"max_abs_difference", "limit"}}, or {"checked": False,
        "reason"}.
    Raises:
        ArtifactError: the bundle has no measured error of an output.
        BuildError: an output differs by more than the limit, or the backend cannot run the graph.
    """
    backend = "openvino" if signature.precision == "bf16" else "onnxruntime"
    if find_spec(backend) is None:
        log(f"warning: {backend} is not installed, so the {signature.precision} graph was not checked")
        return {"checked": False, "reason": f"{backend} is not installed"}
    names, layers = [spec.name for spec in signature.outputs], len(signature.attention_windows)
    depth = dict.fromkeys(names, layers)
    if (decoder := signature.decoder) is not None:
        names += [FIRST_LOGITS, LATER_LOGITS] if decoder.max_tokens > 1 else [FIRST_LOGITS]
        layers += 2 * sum(spec.name.startswith(PAST) and spec.name.endswith("decoder.key") for spec in decoder.inputs)
    exported = {name: _exported_error(manifest, name) for name in names}
    with Engine(bundle) as original, _open_converted(model, backend, signature.precision) as converted:
        report = compare(
            _cases(manifest, signature),
            lambda case: with_text(case, model_inputs(case, signature), signature),
            reference=outputs_runner(original),
            witness=None,
            candidate=_raising_build_error(outputs_runner(converted), signature.precision),
            precision=signature.precision,
            layers=layers,
            depth=depth,
            on_case=lambda case: progress(f"checking the graph: {case}"),
        )
        backend_name = converted.backend
    measured = {}
    for name, result in report.outputs.items():
        growth = UNIT_ROUNDOFF[signature.precision] / UNIT_ROUNDOFF[manifest.signature.precision]
        limit = 2 * exported[name] * growth + report.band(name)
        measured[name] = {"max_abs_difference": result.error, "limit": limit}
        if not result.error <= limit:
            raise BuildError(
                f"the {signature.precision} graph for TensorRT is not the bundle's model: {name} differs by "
                f"{result.error:.3g}, which is more than rounding explains ({limit:.3g}), at {result.worst}"
            )
    return {"checked": True, "backend": backend_name, "outputs": measured}


def _open_converted(model: Path, backend: str, precision: str) -> Engine:
    with _as_build_error(precision):
        return Engine(model, backend)


def _raising_build_error(run: Runner, precision: str) -> Runner:
    def run_converted(inputs: Arrays) -> Arrays:
        with _as_build_error(precision):
            return run(inputs)

    return run_converted


@contextlib.contextmanager
def _as_build_error(precision: str) -> Iterator[None]:
    """Turn an error of the backend into a BuildError; it may have no kernel of this precision for an operator."""
    try:
        yield
    except LfxError as error:
        raise BuildError(
            f"the {precision} graph for TensorRT cannot be compared with the bundle: {error}; if an operator of the "
            f"model has no {precision} kernel there, build in another precision"
        ) from error


def _exported_error(manifest: Manifest, output: str) -> float:
    """The error that the export measured for an output; see `check_conversion`."""
    try:
        if manifest.quantization:
            return float(manifest.quantization["accuracy"]["outputs"][output]["unfused_max_abs_error"])
        return float(manifest.validation["outputs"][output]["torch_max_abs_error"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(
            f"the bundle has no measured error of its output {output}; export the model again"
        ) from error


def _cases(manifest: Manifest, signature: Signature) -> list[Case]:
    """The cases of export, and the longest sequence of the plan if the precision changes: positions may round there."""
    cases = quick_cases(max(signature.attention_windows), signature.max_seqlen)
    if signature.precision != manifest.signature.precision and signature.max_seqlen is not None:
        cases.append(Case(1, signature.max_seqlen, "first"))
    return list(dict.fromkeys(cases))
