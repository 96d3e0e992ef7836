"""`quantize`: the linear layers of a float32 bundle in int8, calibrated on the user's text, in QDQ form.

ONNX Runtime's quantizer puts a QuantizeLinear and a DequantizeLinear in front of each chosen MatMul, and stores its
weight as int8, one scale for each output channel. Attention, layer norms, softmax and the global tokens' own
projections stay float32. A runtime that knows the pattern (ONNX Runtime, OpenVINO, TensorRT) multiplies integers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization as ortq

from lfx.checks import file_path, one_of, whole_number
from lfx.errors import ExportError, one_line
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.companions import drop_code
from lfx.files import copy, temporary_folder
from lfx.machine import int8_overflows, package_versions
from lfx.manifest import MANIFEST, MODEL, Manifest, sha256
from lfx.parity import Case, Report, compare
from lfx.runtime import Engine
from lfx.runtime.artifact import check_bundle
from lfx.runtime.backends import OnnxRuntime
from lfx.runtime.documents import encoded
from lfx.runtime.documents.formats import is_documents
from lfx.runtime.inputs import prepare
from lfx.runtime.postprocess import settings
from lfx.runtime.runner import engine_runner
from lfx.signature import Signature, is_multi_label

ACTIVATIONS = ("uint8", "int8")
SAMPLES = 32
SHORTEST = 64  # tokens of a window that a short text is cut into
# Rows of these are few: the global tokens' own queries.
_FEW_ROWS = "*query_global"

Feeds = dict[str, NDArray[np.int64]]
Progress = Callable[[str], None]


def quantize(
    bundle: str | Path,
    output: str | Path | None = None,
    *,
    calibration: str | Path,
    samples: int = SAMPLES,
    activations: str = "uint8",
    full_range: bool = False,
    keep_float: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    progress: Progress = lambda step: None,
) -> Path:
    """Quantize the linear layers of a bundle to int8, and measure what it cost.

    Args:
        bundle: float32, with the ops of domain lfx or inlined.
        output: the new bundle's folder; default: the bundle's name with -int8, in the current folder.
        calibration: a text file, or .jsonl or .parquet with a field text or input_ids. Long texts are cut into windows
            as long as the model takes. Every second window calibrates, the others tell what the int8 model is worth.
        samples: windows that are used, spread evenly over the file; 2 or more.
        activations: "uint8", asymmetric, the fastest on CPUs; or "int8", symmetric, which TensorRT takes.
        full_range: 8 bits of weight instead of 7: more exact, and refused on x86 CPUs without VNNI, which overflow.
        keep_float: patterns of layer names, such as "encoder.layer.11.*", that stay float32.
        tokenizer: a folder with one; default: the bundle's.
    Returns:
        The new bundle's folder; its manifest's `quantization` holds options, scales, and the accuracy on held-out text.
    Raises:
        ArtifactError: no bundle, or a broken one.
        ExportError: not float32, an option out of range, or nothing to quantize.
        InputError: the calibration file cannot be read, or a document in it cannot be taken.
        ParityError: the integer kernels of this machine do not compute what the quantized graph says.
    """
    folder = file_path(bundle, "bundle", ExportError)
    calibration = file_path(calibration, "calibration", ExportError)
    samples = whole_number(samples, "samples", 2, error=ExportError)  # half to calibrate, half to judge
    one_of(activations, "activations", ACTIVATIONS, ExportError)
    _check_types(full_range, keep_float, tokenizer, progress)
    manifest = Manifest.read(folder)
    _check(manifest.signature, folder)
    if full_range and int8_overflows():
        raise ExportError(
            "full_range cannot be checked here: this CPU has no VNNI, so it overflows on 8 bits of weight; leave it "
            "out, or quantize where the model will run"
        )
    name = f"{folder.resolve().name}-int8"
    target = file_path(output if output is not None else name, "output", ExportError)
    check_target(target)
    if target.resolve() == folder.resolve():
        raise ExportError(f"{target} is the bundle that is quantized, which would be lost; give another output")
    progress("checking the bundle")
    artifact = check_bundle(folder, manifest)
    check_space(target, sum(entry["bytes"] for entry in manifest.files.values()))
    feeds, found_in = _read(calibration, manifest.signature, Path(tokenizer or folder), samples)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    layers = _linear_layers(model, keep_float)
    every = _linear_layers(model, ()).values()
    for pattern in keep_float:
        if not any(fnmatch(name, pattern) for name in every):
            raise ExportError(f"keep_float {pattern!r} is the name of no linear layer; they are {', '.join(every)}")
    if not layers:
        raise ExportError(
            f"{bundle} has no linear layer to quantize; keep_float keeps {', '.join(keep_float) or 'none'}"
        )
    with atomic_folder(target) as made, temporary_folder("quantize") as scratch:
        # The quantizer writes beside what it reads, and reads no weights that are links.
        for name, file in artifact.files.items():
            copy(file, scratch / name)
        progress(f"calibrating on {len(feeds[::2])} windows")
        with _quiet_quantizer():
            ortq.quantize_static(
                str(scratch / MODEL),
                str(made / MODEL),
                _Reader(feeds[::2]),
                quant_format=ortq.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=not full_range,
                activation_type=ortq.QuantType.QUInt8 if activations == "uint8" else ortq.QuantType.QInt8,
                weight_type=ortq.QuantType.QInt8,
                nodes_to_quantize=list(layers),
                use_external_data_format=True,
                calibrate_method=ortq.CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": activations == "int8",
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],  # sums stay float32
                },
            )
        signature = dataclasses.replace(manifest.signature, precision="int8")
        scales = _finish(made / MODEL, signature, layers)
        for path in folder.iterdir():
            if path.is_file() and path.name in manifest.files and not path.name.startswith(MODEL):
                shutil.copyfile(path, made / path.name)
        drop_code(made)
        report = _accuracy(folder, made / MODEL, feeds[1::2], signature, progress)
        report.require()
        quantization = {
            "bundle_sha256": sha256(folder / MANIFEST),
            "calibration": found_in,
            "activations": activations,
            "weight_bits": 8 if full_range else 7,
            "layers": scales,
            "accuracy": _summary(report),
        }
        dataclasses.replace(
            manifest,
            signature=signature,
            versions={**manifest.versions, **package_versions(("onnx", "onnxruntime", "numpy"))},
            quantization=quantization,
        ).write(made)
    return target


def _check_types(full_range: Any, keep_float: Any, tokenizer: Any, progress: Any) -> None:
    if not isinstance(full_range, bool):
        raise ExportError(f"full_range is {type(full_range).__name__}; give True or False")
    if not isinstance(keep_float, Sequence) or isinstance(keep_float, str | bytes):
        raise ExportError(f"keep_float is {type(keep_float).__name__}; give a list of patterns")
    if not all(isinstance(pattern, str) for pattern in keep_float):
        raise ExportError('keep_float has a pattern that is no text; give such as "encoder.layer.11.*"')
    if tokenizer is not None:
        file_path(tokenizer, "tokenizer", ExportError)
    if not callable(progress):
        raise ExportError(f"progress is {type(progress).__name__}; give a function of one text, or leave it out")


def _check(signature: Signature, folder: Path) -> None:
    if signature.precision != "fp32":
        raise ExportError(f"{folder} is {signature.precision}; int8 is made from an fp32 bundle: export it again")
    if signature.task == "multiple-choice":
        raise ExportError("multiple-choice cannot be calibrated: its documents have a third axis")


def _read(source: Path, signature: Signature, folder: Path, samples: int) -> tuple[list[Feeds], dict[str, Any]]:
    """The windows of a calibration file as graph inputs, and what they were."""
    limited = signature
    lengths = [len(window.ids) for window in encoded(source, limited, folder)]
    if len(lengths) < samples and not is_documents(source):  # of a short text, more windows and shorter ones
        shorter = max(sum(lengths) // samples, SHORTEST)
        limited = dataclasses.replace(signature, max_seqlen=min(shorter, signature.max_seqlen or shorter))
        lengths = [len(window.ids) for window in encoded(source, limited, folder)]
    if len(lengths) < 2:
        raise ExportError(
            f"{source} gives {len(lengths)} windows of text; 2 are needed at least, to calibrate and to judge"
        )
    # Read again, so that only the chosen windows are kept.
    wanted = set(np.linspace(0, len(lengths) - 1, min(samples, len(lengths))).astype(int).tolist())
    chosen = [window.ids for i, window in enumerate(encoded(source, limited, folder)) if i in wanted]
    feeds = [dict(prepare(ids, None, None, signature).feeds) for ids in chosen]
    about = {"file": source.name, "sha256": sha256(source), "windows": len(chosen), "tokens": sum(map(len, chosen))}
    return feeds, about


def _linear_layers(model: onnx.ModelProto, keep_float: Sequence[str]) -> dict[str, str]:
    """Node name -> module name, of every torch.nn.Linear that is called once and is not to stay float32.

    The exporter names the node MODULE/MatMul and the weight MODULE.weight.T; a weight that is tied to an embedding has
    the embedding's name, and stays. A module that is called several times has inputs of several ranges.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        name = node.name.rpartition("/")[0]
        kept = any(fnmatch(name, pattern) for pattern in (_FEW_ROWS, *keep_float))
        if node.op_type == "MatMul" and node.input[1] == f"{name}.weight.T" and node.input[1] in constants and not kept:
            found.append((node.name, name))
    calls = Counter(name for _, name in found)
    return {node: name for node, name in found if calls[name] == 1}


class _Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Keep the quantizer's advice about pre-processing, which our graphs have behind them, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:
        raise ExportError(f"ONNX Runtime's quantizer failed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        logging.disable(before)


def _finish(path: Path, signature: Signature, layers: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Write the signature into the file; returns scale and zero point of each layer's input."""
    model = onnx.load(str(path), load_external_data=False)
    _round_for_products_only(model, layers)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"lfx": json.dumps(signature.to_dict())})
    onnx.save(model, str(path))
    values = {t.name: t for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    scales = {}
    for node in model.graph.node:
        if node.name in layers:
            source, weight = producers.get(node.input[0]), producers.get(node.input[1])
            if source is None or weight is None or {source.op_type, weight.op_type} != {"DequantizeLinear"}:
                raise ExportError(f"ONNX Runtime's quantizer left {layers[node.name]} as it was; please report this")
            scale, zero = (onnx.numpy_helper.to_array(values[name]) for name in source.input[1:3])
            scales[layers[node.name]] = {"scale": float(scale), "zero_point": int(zero)}
    return scales


def _round_for_products_only(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    """Give residuals, global rows and outputs the tensor in front of its rounding.

    The quantizer puts QuantizeLinear and DequantizeLinear on a tensor for everything that reads it.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    rounded: dict[str, str] = {}
    for node in model.graph.node:
        source = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            rounded[node.output[0]] = source.input[0]
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or node.name in layers:
            continue
        _rename_inputs_of(node, rounded)
    for name in outputs & rounded.keys():  # the quantizer gave the output's name to the rounded tensor
        exact, inner = rounded[name], f"{name}/rounded"
        renamed = {name: inner, exact: name}
        for node in model.graph.node:
            for i, found in enumerate(node.output):
                node.output[i] = renamed.get(found, found)
        _rename_inputs(model.graph, renamed)


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        _rename_inputs_of(node, names)


def _rename_inputs_of(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Of the branches of an If too, which read the tensors around them."""
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _rename_inputs(attribute.g, names)


def _summary(report: Report) -> dict[str, Any]:
    outputs = {}
    for name, result in report.outputs.items():
        agreement = {"label_agreement": result.label_agreement()} if result.labels else {}
        outputs[name] = {
            "max_abs_error": result.error,
            "unfused_max_abs_error": result.torch_error,
            "tolerance": report.tolerance(name),
            "max_abs_value": result.magnitude,
            "cosine": result.cosine(),
            **agreement,
        }
    return {"reference": "the float32 bundle, on text held out of the calibration", "outputs": outputs}


def _accuracy(bundle: Path, model: Path, held_out: list[Feeds], signature: Signature, progress: Progress) -> Report:
    """The int8 model beside the float32 bundle; the witness is the same graph with its integers computed in float32."""
    cases = iter(held_out)
    unfused = OnnxRuntime(model, "cpu", None, fused=False)
    with Engine(bundle, "onnxruntime") as right, Engine(model, "onnxruntime") as quantized:
        return compare(
            [Case(1, feeds["input_ids"].shape[1], "the task's") for feeds in held_out],
            lambda case: next(cases),
            reference=engine_runner(right),
            witness=unfused.infer,
            candidate=engine_runner(quantized),
            precision="int8",
            layers=len(signature.attention_windows),
            names=("the float32 bundle", "the same graph with its integers in float32"),
            multi_label=is_multi_label(signature, settings(bundle / "config.json").get("problem_type")),
            on_case=lambda case: progress(f"measuring accuracy: {case}"),
        )
