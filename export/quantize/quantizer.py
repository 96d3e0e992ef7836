"""`quantize_graphs`: run ONNX Runtime's quantizer over the graphs of a bundle."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import secrets
import tempfile
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxruntime import quantization as ortq

from lfx.errors import ExportError, LfxError, one_line
from lfx.export.quantize.calibration import CalibrationReader
from lfx.export.quantize.graph import finalize_quantized, join_weights
from lfx.export.quantize.head import separate_head
from lfx.parity import Arrays
from lfx.runtime.backends.onnxruntime import check_threads
from lfx.signature import Signature

_QUANTIZER = threading.Lock()  # held while it runs, with settings of the whole process


@dataclass(frozen=True)
class Steps:
    """The steps of int8 that activations and weights are rounded to.

    Attributes:
        activations: "uint8", asymmetric, or "int8", symmetric.
        full_range: use 8 bits for weights instead of 7.
    """

    activations: str
    full_range: bool

    @property
    def weight_bits(self) -> int:
        """Number of bits that weights use."""
        return 8 if self.full_range else 7


def quantize_graphs(
    source: Path,
    target: Path,
    calibration: Mapping[str, Iterable[Arrays]],
    layers: Mapping[str, Mapping[str, str]],
    signature: Signature,
    steps: Steps,
) -> dict[str, dict[str, Any]]:
    """Quantize the graphs of a bundle.

    Args:
        source: a folder with the bundle's ONNX files and weights, which is written into.
        target: the folder that the ONNX files and weights are written to. Several graphs share one file of weights.
        calibration: name of each ONNX file -> inputs that calibrate it.
        layers: name of each ONNX file -> its layers: node name -> module name. A file without layers stays float32.
        signature: of the quantized model.
    Returns:
        Module name -> {"scale", "zero_point"} of the layer's input.
    Raises:
        ExportError: the quantizer failed, or did not quantize a layer.
        LfxError: what `calibration` raises.
    """
    folder = source / "int8"
    folder.mkdir()
    files: dict[str, Path] = {}
    scales: dict[str, dict[str, Any]] = {}
    for name, chosen in layers.items():
        # A random name: onnx refuses a file of weights whose name is also that of a file in the current folder.
        files[name] = folder / f"{secrets.token_hex(8)}.onnx" if chosen else source / name
        if chosen:
            separate_head(source / name, chosen)
            _quantize_graph(source / name, files[name], calibration[name], chosen, steps)
        scales |= finalize_quantized(files[name], signature, chosen)
    join_weights(files, target)
    return scales


def _quantize_graph(
    source: Path, target: Path, calibration: Iterable[Arrays], layers: Mapping[str, str], steps: Steps
) -> None:
    """Run ONNX Runtime's quantizer over the MatMul nodes in `layers`."""
    check_threads(None, may_choose=False)  # its sessions have the default number
    with _QUANTIZER, _quiet_quantizer(), _temporary_folders_in(source.parent):
        ortq.quantize_static(
            str(source),
            str(target),
            CalibrationReader(calibration),
            quant_format=ortq.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],  # the ranges of other tensors are not collected
            per_channel=True,
            reduce_range=not steps.full_range,
            activation_type=ortq.QuantType.QUInt8 if steps.activations == "uint8" else ortq.QuantType.QInt8,
            weight_type=ortq.QuantType.QInt8,
            nodes_to_quantize=list(layers),
            use_external_data_format=True,
            calibrate_method=ortq.CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": steps.activations == "int8",
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],  # MatMul outputs stay float32
            },
        )


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Silence the quantizer's advice to pre-process the graph, which the exporter has done; turn its errors into ours.

    Raises:
        ExportError: the quantizer failed.
        LfxError: an error of lfx passes through.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except LfxError:
        raise
    except Exception as error:
        raise ExportError(f"ONNX Runtime's quantizer failed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _temporary_folders_in(folder: Path) -> Iterator[None]:
    """Have the quantizer make its temporary folders, which hold the model, in `folder`: a kill leaves them there."""
    own = types.SimpleNamespace(TemporaryDirectory=functools.partial(tempfile.TemporaryDirectory, dir=folder))
    modules = [importlib.import_module(f"onnxruntime.quantization.{name}") for name in ("quantize", "quant_utils")]
    try:
        for module in modules:
            module.tempfile = own  # type: ignore[attr-defined]
        yield
    finally:
        for module in modules:
            module.tempfile = tempfile  # type: ignore[attr-defined]
