"""`quantize`: quantize the linear layers of a float32 bundle to int8 in QDQ form, calibrated on the user's text.

ONNX Runtime's quantizer inserts QuantizeLinear and DequantizeLinear before each chosen MatMul, and stores its weight as
int8 with one scale per output channel. Attention, layer norms, softmax and the projections of the global tokens stay
float32. A runtime that knows the pattern (ONNX Runtime, OpenVINO, TensorRT) runs integer kernels.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from lfx.checks import file_path, one_of, real_number, whole_number
from lfx.errors import ExportError
from lfx.export.bundle import atomic_folder, check_space, check_target
from lfx.export.companions import drop_code
from lfx.export.quantize.accuracy import check_min_agreement, measure_accuracy, require_agreement, summary
from lfx.export.quantize.calibration import Feeds, read_calibration
from lfx.export.quantize.generation import compare_texts, decoder_feeds, greedy_options, measure_graphs, write_texts
from lfx.export.quantize.graph import linear_layers
from lfx.export.quantize.quantizer import Steps, quantize_graphs
from lfx.files import copy, is_same, temporary_folder
from lfx.machine import int8_overflows, package_versions
from lfx.manifest import MANIFEST, Manifest, sha256
from lfx.parity import Arrays
from lfx.runtime.artifact import check_bundle, unchanged
from lfx.runtime.generation.model import Int64
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
    generate: Mapping[str, Any] | None = None,
    min_agreement: float | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress = lambda step: None,
) -> Path:
    """Quantize the linear layers of a bundle to int8, and measure the accuracy of the result.

    A model that writes texts is quantized in both graphs. Its decoder is calibrated on the texts that the float32 model
    writes by greedy search, and the result is judged by the tokens that are equal in the texts of both models.

    Args:
        bundle: a float32 bundle, with the ops of domain lfx or inlined.
        output: the new bundle's folder; default: the bundle's name with -int8, in the current folder.
        calibration: a text file, or .jsonl or .parquet with a field text or input_ids. Long texts are cut into windows
            of the model's longest sequence. Every second window calibrates, the others measure the accuracy.
        samples: largest number of windows, 2 or more, spread evenly over the file.
        activations: "uint8", asymmetric, which is fastest on CPUs; or "int8", symmetric, which TensorRT needs.
        full_range: use 8 bits for weights instead of 7. It is more accurate, but overflows on x86 CPUs without VNNI,
            where lfx refuses the model.
        keep_float: patterns of layer names, such as "encoder.layer.11.*", that stay float32. The layers of a decoder
            are named "led.decoder.*".
        generate: options of `Engine.generate` for a model that writes texts, such as {"max_new_tokens": 128}; without
            beams and sampling. Default: the checkpoint's.
        min_agreement: smallest share, 0 to 1, of labels or of tokens of greedy search that must agree with float32.
        tokenizer: a folder with a tokenizer; default: the bundle's.
        progress: called with the name of each step.
    Returns:
        The new bundle's folder. Its manifest's `quantization` holds the options, the scale and zero point of each
        layer, and the accuracy on held-out text.
    Raises:
        ArtifactError: `bundle` is no bundle, or is broken.
        ExportError: the bundle is not float32, an option is out of range, or no layer can be quantized.
        InputError: the calibration file cannot be read, the model cannot take a document in it, or an option of
            `generate` is not known or out of range.
        ParityError: this machine's integer kernels do not give the results of the quantized graph, or less agrees than
            `min_agreement`.
    """
    folder = file_path(bundle, "bundle", ExportError)
    calibration = file_path(calibration, "calibration", ExportError)
    samples = whole_number(samples, "samples", 2, error=ExportError)  # at least one calibrates, one measures
    one_of(activations, "activations", ACTIVATIONS, ExportError)
    _check_types(full_range, keep_float, tokenizer, progress)
    if min_agreement is not None:
        min_agreement = real_number(min_agreement, "min_agreement", 0, 1, ExportError)
    manifest = Manifest.read(folder)
    _check_bundle(manifest, folder)
    check_min_agreement(min_agreement, manifest.signature)
    options = greedy_options(generate, manifest.signature.task)
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
    layers, steps = _layers(folder, manifest, keep_float), Steps(activations, full_range)
    signature = dataclasses.replace(manifest.signature, precision="int8", weight_bits=steps.weight_bits)
    with (
        atomic_folder(target) as new_folder,
        temporary_folder("quantize") as scratch,
        unchanged(folder, manifest),
    ):
        # The quantizer writes into the folder of its input, and does not follow links to weights.
        for name, file in artifact.files.items():
            copy(file, scratch / name)
        encoder, texts = scratch / manifest.model_file, []
        if signature.decoder is not None:
            texts = write_texts(folder, windows, options, lambda i: progress(f"writing texts in float32: {i}"))
        progress(f"calibrating on {len(windows[::2])} windows")
        feeds = _calibration(encoder, windows[::2], texts[::2], manifest.signature)
        scales = quantize_graphs(scratch, new_folder, feeds, layers, signature, steps)
        for name in manifest.files.keys() - artifact.files.keys():
            (new_folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, new_folder / name)
        drop_code(new_folder)
        model = new_folder / manifest.model_file
        if signature.decoder is None:
            report = measure_accuracy(folder, model, windows[1::2], signature, progress)
        else:
            report = measure_graphs(encoder, model, windows[1::2], texts[1::2], signature, progress)
        report.require()
        accuracy = summary(report)
        if signature.decoder is not None:
            own = write_texts(model, windows[1::2], options, lambda i: progress(f"writing texts in int8: {i}"))
            accuracy["texts"] = compare_texts(texts[1::2], own)
        if min_agreement is not None:
            require_agreement(accuracy, min_agreement)
        dataclasses.replace(
            manifest,
            signature=signature,
            versions={**manifest.versions, **package_versions(("onnx", "onnxruntime", "numpy"))},
            quantization={
                "bundle_sha256": sha256(folder / MANIFEST),
                "calibration": calibration_entry,
                "activations": activations,
                "weight_bits": steps.weight_bits,
                "layers": scales,
                **({"generate": options} if signature.decoder is not None else {}),
                "accuracy": accuracy,
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


def _check_bundle(manifest: Manifest, folder: Path) -> None:
    signature = manifest.signature
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
    if Path(manifest.model_file).name != manifest.model_file:
        raise ExportError(f"{folder} has the layout hf; quantize the bundle that it was made from, then relayout both")


def _target(folder: Path, output: str | Path | None) -> Path:
    name = f"{folder.resolve().name}-int8"
    target = file_path(output if output is not None else name, "output", ExportError)
    check_target(target)
    if is_same(target, folder):
        raise ExportError(f"{target} is the bundle that is quantized, which would be lost; give another output")
    return target


def _calibration(
    encoder: Path, windows: list[Feeds], texts: list[Int64], signature: Signature
) -> dict[str, Iterable[Arrays]]:
    """Return the inputs that calibrate each ONNX file, by the name of the file.

    Args:
        encoder: the ONNX file of a model of one graph, or of the encoder.
        texts: of a model that writes texts, one for each window.
    """
    feeds: dict[str, Iterable[Arrays]] = {encoder.name: windows}
    if signature.decoder is not None:
        feeds[signature.decoder.model_file] = decoder_feeds(encoder, windows, texts, signature)
    return feeds


def _layers(folder: Path, manifest: Manifest, keep_float: Sequence[str]) -> dict[str, dict[str, str]]:
    """List the layers to quantize.

    Returns:
        Name of each ONNX file, the encoder's first -> node name -> module name.
    Raises:
        ExportError: a pattern matches no layer, or no layer is left.
    """
    decoder = manifest.signature.decoder
    files = [manifest.model_file, *([] if decoder is None else [decoder.model_file])]
    models = {name: onnx.load(str(folder / name), load_external_data=False) for name in files}
    all_layers = [layer for model in models.values() for layer in linear_layers(model, ()).values()]
    for pattern in keep_float:
        left = [layer for model in models.values() for layer in linear_layers(model, [pattern]).values()]
        if len(left) == len(all_layers):
            raise ExportError(f"keep_float {pattern!r} matches no linear layer; the layers are {', '.join(all_layers)}")
    layers = {name: linear_layers(model, keep_float) for name, model in models.items()}
    if not any(layers.values()):
        raise ExportError(
            f"{folder} has no linear layer to quantize; keep_float keeps {', '.join(keep_float) or 'none'}"
        )
    return layers
