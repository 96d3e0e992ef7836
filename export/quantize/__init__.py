"""`quantize`: the linear layers of a float32 bundle in int8, calibrated on the user's text, in QDQ form.

ONNX Runtime's quantizer puts a QuantizeLinear and a DequantizeLinear in front of each chosen MatMul, and stores its
weight as int8, one scale for each output channel. Attention, layer norms, softmax and the global tokens' own
projections stay float32. A runtime that knows the pattern (ONNX Runtime, OpenVINO, TensorRT) multiplies integers.
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
from lfx.export.quantize.calibration import CalibrationReader, read_calibration
from lfx.export.quantize.graph import finalize, linear_layers
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
    feeds, found_in = read_calibration(calibration, manifest.signature, Path(tokenizer or folder), samples)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    layers = linear_layers(model, keep_float)
    every = linear_layers(model, ()).values()
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
                CalibrationReader(feeds[::2]),
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
        scales = finalize(made / MODEL, signature, layers)
        for path in folder.iterdir():
            if path.is_file() and path.name in manifest.files and not path.name.startswith(MODEL):
                shutil.copyfile(path, made / path.name)
        drop_code(made)
        report = measure_accuracy(folder, made / MODEL, feeds[1::2], signature, progress)
        report.require()
        quantization = {
            "bundle_sha256": sha256(folder / MANIFEST),
            "calibration": found_in,
            "activations": activations,
            "weight_bits": 8 if full_range else 7,
            "layers": scales,
            "accuracy": summary(report),
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
