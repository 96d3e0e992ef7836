"""`quantize`: quantize the linear layers of a float32 bundle to int8 in QDQ form, calibrated on the user's text.

ONNX Runtime's quantizer inserts QuantizeLinear and DequantizeLinear before each chosen MatMul, and stores its weight as
int8 with one scale per output channel. Attention, layer norms, softmax and the projections of the global tokens stay
float32. A runtime that knows the pattern (ONNX Runtime, OpenVINO, TensorRT) runs integer kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization as ortq

from lfx.checks import file_path, one_of, whole_number
from lfx.errors import ExportError, one_line
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.companions import drop_code
from lfx.export.quantize.accuracy import measure_accuracy, summary
from lfx.export.quantize.calibration import CalibrationReader, Feeds, read_calibration
from lfx.export.quantize.graph import finalize_quantized, linear_layers
from lfx.files import copy, temporary_folder
from lfx.machine import int8_overflows, package_versions
from lfx.manifest import MANIFEST, MODEL, Manifest, sha256
from lfx.runtime.artifact import check_bundle
from lfx.signature import Signature

ACTIVATIONS = ("uint8", "int8")
SAMPLES = 32

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
    """Quantize the linear layers of a bundle to int8, and measure the accuracy of the result.

    Args:
        bundle: a float32 bundle, with the ops of domain lfx or inlined.
        output: the new bundle's folder; default: the bundle's name with -int8, in the current folder.
        calibration: a text file, or .jsonl or .parquet with a field text or input_ids. Long texts are cut into windows
            of the model's longest sequence. Every second window calibrates, the others measure the accuracy.
        samples: largest number of windows, 2 or more, spread evenly over the file.
        activations: "uint8", asymmetric, which is fastest on CPUs; or "int8", symmetric, which TensorRT needs.
        full_range: use 8 bits for weights instead of 7. It is more accurate, but overflows on x86 CPUs without VNNI,
            where lfx refuses the model.
        keep_float: patterns of layer names, such as "encoder.layer.11.*", that stay float32.
        tokenizer: a folder with a tokenizer; default: the bundle's.
        progress: called with the name of each step.
    Returns:
        The new bundle's folder. Its manifest's `quantization` holds the options, the scale and zero point of each
        layer, and the accuracy on held-out text.
    Raises:
        ArtifactError: `bundle` is no bundle, or is broken.
        ExportError: the bundle is not float32, an option is out of range, or no layer can be quantized.
        InputError: the calibration file cannot be read, or the model cannot take a document in it.
        ParityError: this machine's integer kernels do not give the results of the quantized graph.
    """
    folder = file_path(bundle, "bundle", ExportError)
    calibration = file_path(calibration, "calibration", ExportError)
    samples = whole_number(samples, "samples", 2, error=ExportError)  # at least one calibrates, one measures
    one_of(activations, "activations", ACTIVATIONS, ExportError)
    _check_types(full_range, keep_float, tokenizer, progress)
    manifest = Manifest.read(folder)
    _check_bundle(manifest.signature, folder)
    if full_range and int8_overflows():
        raise ExportError(
            "full_range cannot be checked here: this CPU has no VNNI, so it overflows on 8 bits of weight; leave it "
            "out, or quantize on the machine that will run the model"
        )
    target = _target(folder, output)
    progress("checking the bundle")
    artifact = check_bundle(folder, manifest)
    check_space(target, sum(entry["bytes"] for entry in manifest.files.values()))
    windows, calibration_entry = read_calibration(
        calibration, manifest.signature, Path(tokenizer or folder), samples, unlisted=tokenizer is not None
    )
    layers = _layers(folder, keep_float)
    weight_bits = 8 if full_range else 7
    signature = dataclasses.replace(manifest.signature, precision="int8", weight_bits=weight_bits)
    with atomic_folder(target) as new_folder, temporary_folder("quantize") as scratch:
        # The quantizer writes into the folder of its input, and does not follow links to weights.
        for name, file in artifact.files.items():
            copy(file, scratch / name)
        progress(f"calibrating on {len(windows[::2])} windows")
        _quantize_graph(
            scratch / MODEL, new_folder / MODEL, windows[::2], layers, activations=activations, full_range=full_range
        )
        scales = finalize_quantized(new_folder / MODEL, signature, layers)
        for name in manifest.files:
            if not name.startswith(MODEL):
                (new_folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, new_folder / name)
        drop_code(new_folder)
        report = measure_accuracy(folder, new_folder / MODEL, windows[1::2], signature, progress)
        report.require()
        dataclasses.replace(
            manifest,
            signature=signature,
            versions={**manifest.versions, **package_versions(("onnx", "onnxruntime", "numpy"))},
            quantization={
                "bundle_sha256": sha256(folder / MANIFEST),
                "calibration": calibration_entry,
                "activations": activations,
                "weight_bits": weight_bits,
                "layers": scales,
                "accuracy": summary(report),
            },
        ).write(new_folder)
    return target


def _check_types(full_range: Any, keep_float: Any, tokenizer: Any, progress: Any) -> None:
    if not isinstance(full_range, bool):
        raise ExportError(f"full_range is {type(full_range).__name__}; give True or False")
    if not isinstance(keep_float, Sequence) or isinstance(keep_float, str | bytes):
        raise ExportError(f"keep_float is {type(keep_float).__name__}; give a list of patterns")
    if not all(isinstance(pattern, str) for pattern in keep_float):
        raise ExportError('keep_float has a pattern that is no text; give strings such as "encoder.layer.11.*"')
    if tokenizer is not None:
        file_path(tokenizer, "tokenizer", ExportError)
    if not callable(progress):
        raise ExportError(
            f"progress is {type(progress).__name__}; give a function that takes a string, or leave it out"
        )


def _check_bundle(signature: Signature, folder: Path) -> None:
    if signature.precision != "fp32":
        raise ExportError(f"{folder} is {signature.precision}; int8 is made from an fp32 bundle: export it again")
    if signature.output_attentions:
        raise ExportError(
            f"{folder} has attention outputs, which calibration would keep in memory for all texts; export it without "
            "--output-attentions"
        )
    if signature.has_choices:
        raise ExportError(
            "multiple-choice cannot be calibrated: its inputs have a third axis, choices, which documents do not have; "
            "use the float32 bundle"
        )


def _target(folder: Path, output: str | Path | None) -> Path:
    name = f"{folder.resolve().name}-int8"
    target = file_path(output if output is not None else name, "output", ExportError)
    check_target(target)
    if target.resolve() == folder.resolve():
        raise ExportError(f"{target} is the bundle that is quantized, which would be lost; give another output")
    return target


def _layers(folder: Path, keep_float: Sequence[str]) -> dict[str, str]:
    """List the layers to quantize: node name -> module name.

    Raises:
        ExportError: a pattern matches no layer, or no layer is left.
    """
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    all_layers = linear_layers(model, ()).values()
    for pattern in keep_float:
        if not any(fnmatch(name, pattern) for name in all_layers):
            raise ExportError(f"keep_float {pattern!r} matches no linear layer; the layers are {', '.join(all_layers)}")
    layers = linear_layers(model, keep_float)
    if not layers:
        raise ExportError(
            f"{folder} has no linear layer to quantize; keep_float keeps {', '.join(keep_float) or 'none'}"
        )
    return layers


def _quantize_graph(
    source: Path, target: Path, windows: list[Feeds], layers: dict[str, str], *, activations: str, full_range: bool
) -> None:
    """Run ONNX Runtime's quantizer over the MatMul nodes in `layers`."""
    with _quiet_quantizer():
        ortq.quantize_static(
            str(source),
            str(target),
            CalibrationReader(windows),
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
                "OpTypesToExcludeOutputQuantization": ["MatMul"],  # MatMul outputs stay float32
            },
        )


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Silence the quantizer's advice to pre-process the graph, which the exporter has done; turn its errors into ours.

    Raises:
        ExportError: the quantizer failed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:
        raise ExportError(f"ONNX Runtime's quantizer failed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        logging.disable(before)
